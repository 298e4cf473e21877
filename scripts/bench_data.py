#!/usr/bin/env python
"""Speed of the input pipeline, in one process, against bare batch encoding of the same text into arrays.

Both sides run in this process with the same threads (set RAYON_NUM_THREADS to choose them), by turns, so that
whatever else the machine does hits both. What counts is the median of the rounds' ratios. The bare side has its texts
in memory and encodes them in one call; the pipeline also opens the files, decodes parquet, orders and packs.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import TokenStream, load_tokenizer
from pretrain.data.readers import read_unit
from pretrain.data.sources import source_units

TARGET = 0.9


def encode_bare(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """Encode all texts in one call, turn them into int32 arrays and return the number of tokens."""
    arrays = [np.array(e.ids, dtype=np.int32) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return sum(len(array) for array in arrays)


def run_pipeline(
    config: DataConfig, tokenizer: TokenizerConfig, context_length: int, batch_sequences: int
) -> int:
    """Read one epoch from the files to the last batch and return the number of targets."""
    stream = TokenStream(config, tokenizer, context_length, epochs=1)
    targets = 0
    try:
        while True:
            targets += stream.next_batch(batch_sequences).num_targets
    except StopIteration:
        return targets
    finally:
        stream.close()


def timed(function: Callable[[], int]) -> tuple[int, float]:
    """Return what the function returns, and the seconds that it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="assets/corpus", help="file, folder or glob (default: %(default)s)")
    parser.add_argument("--tokenizer", default="assets/tokenizer/tokenizer.json", help="(default: %(default)s)")
    parser.add_argument("--lanes", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--context-length", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--batch-sequences", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    args = parser.parse_args()

    source = SourceConfig(path=args.source)
    config = DataConfig(sources=(source,), lanes=args.lanes, validation_fraction=0.0)
    tokenizer_config = TokenizerConfig(path=args.tokenizer)
    tokenizer = load_tokenizer(tokenizer_config)
    texts = [text for unit in source_units(source) for _, text in read_unit(unit, 0, 1 << 20)]
    size = sum(len(text.encode()) for text in texts)
    threads = os.environ.get("RAYON_NUM_THREADS") or len(os.sched_getaffinity(0))
    print(f"{args.source}: {len(texts):,} documents, {size / 1e6:.1f} MB; {threads} tokenizer threads")
    print(f"{args.lanes} lanes, context {args.context_length}, batches of {args.batch_sequences} sequences\n")

    print(f"{'round':>5} {'bare tokens/s':>14} {'pipeline tokens/s':>18} {'ratio':>6}")
    bare_rates, rates, ratios = [], [], []
    for number in range(args.rounds + 1):  # the first warms up both
        sides = [
            lambda: timed(lambda: encode_bare(tokenizer, texts)),
            lambda: timed(lambda: run_pipeline(config, tokenizer_config, args.context_length, args.batch_sequences)),
        ]
        if number % 2:
            (targets, seconds), (tokens, bare_seconds) = sides[1](), sides[0]()
        else:
            (tokens, bare_seconds), (targets, seconds) = sides[0](), sides[1]()
        assert targets == tokens + len(texts), "every token and one separator per document is a target once"
        if number == 0:
            continue
        bare_rates.append(tokens / bare_seconds)
        rates.append(tokens / seconds)  # separators do not count as work done
        ratios.append(bare_seconds / seconds)
        print(f"{number:>5} {bare_rates[-1]:>14,.0f} {rates[-1]:>18,.0f} {ratios[-1]:>6.3f}")
    medians = [statistics.median(values) for values in (bare_rates, rates, ratios)]
    print(f"{'median':>5}{medians[0]:>14,.0f} {medians[1]:>18,.0f} {medians[2]:>6.3f}   (target: at least {TARGET})")


if __name__ == "__main__":
    main()
