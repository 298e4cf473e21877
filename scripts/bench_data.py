#!/usr/bin/env python
"""Speed of the input pipeline, in one process, against bare batch encoding of the same text into arrays.

In each round, both sides process all of the text, in alternating parts, in this process and with the same threads (set
RAYON_NUM_THREADS to choose their number), so that other load on the machine affects both. The result is the median of
the ratios of the rounds. The bare side has its texts in memory and a warm tokenizer; the pipeline also lists and opens
the files, loads the tokenizer, decodes parquet, orders, packs and assembles batches.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import TokenStream, load_tokenizer, make_catalog
from pretrain.data.formats import read_unit

TARGET = 0.9
PARTS = 8


def encode_bare(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[int]:
    """Encode the texts in `PARTS` calls, turn them into int32 arrays; yield the number of tokens of each part."""
    for begin in range(0, len(texts), step := -(-len(texts) // PARTS)):
        encodings = tokenizer.encode_batch(texts[begin : begin + step], add_special_tokens=False)
        yield sum(len(array) for array in [np.array(encoding.ids, dtype=np.int32) for encoding in encodings])


def run_pipeline(
    config: DataConfig, tokenizer: TokenizerConfig, sequence_length: int, batch_sequences: int, total: int
) -> Iterator[int]:
    """Read one epoch from the files to the last batch; yield the number of targets after every 1/PARTS of `total`."""
    stream = TokenStream(config, tokenizer, sequence_length, epochs=1)
    targets = 0
    try:
        while True:
            targets += stream.next_batch(batch_sequences).num_targets
            if targets > total // PARTS:
                yield targets
                targets = 0
    except StopIteration:
        yield targets
    finally:
        stream.close()


class Clock:
    """Runs one side part by part and sums the time and the tokens."""

    def __init__(self, parts: Iterator[int]) -> None:
        self.parts = parts
        self.seconds = 0.0
        self.tokens = 0

    def run_part(self) -> bool:
        """Process the next part; return whether there was one."""
        start = time.perf_counter()
        tokens = next(self.parts, None)
        self.seconds += time.perf_counter() - start
        self.tokens += tokens or 0
        return tokens is not None


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="assets/corpus", help="file, folder or glob (default: %(default)s)")
    parser.add_argument("--tokenizer", default="assets/tokenizer/tokenizer.json", help="(default: %(default)s)")
    parser.add_argument("--lanes", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--batch-sequences", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    args = parser.parse_args()

    source = SourceConfig(path=args.source)
    config = DataConfig(sources=(source,), lanes=args.lanes, validation_fraction=0.0)
    tokenizer_config = TokenizerConfig(path=args.tokenizer)
    tokenizer = load_tokenizer(tokenizer_config)
    [units] = make_catalog(config).units(config)
    texts = [text for unit in units for _, text in read_unit(unit, 0, 1 << 20) if isinstance(text, str)]
    size = sum(len(text.encode()) for text in texts)
    threads = os.environ.get("RAYON_NUM_THREADS") or len(os.sched_getaffinity(0))
    print(f"{args.source}: {len(texts):,} documents, {size / 1e6:.1f} MB; {threads} tokenizer threads")
    print(f"{args.lanes} lanes, sequences of {args.sequence_length} tokens, {args.batch_sequences} per batch\n")

    print(f"{'round':>6} {'bare tokens/s':>14} {'pipeline tokens/s':>18} {'ratio':>6}")
    bare_rates, rates, ratios = [], [], []
    total = sum(encode_bare(tokenizer, texts)) + len(texts)  # the separators are targets as well
    for number in range(1, args.rounds + 1):
        bare = Clock(encode_bare(tokenizer, texts))
        pipeline = Clock(run_pipeline(config, tokenizer_config, args.sequence_length, args.batch_sequences, total))
        turns = [bare, pipeline] if number % 2 else [pipeline, bare]
        while sum(side.run_part() for side in turns):  # both sides run, even if the other has finished
            pass
        assert pipeline.tokens == total, "every token, and one separator per document, is a target exactly once"
        bare_rates.append(bare.tokens / bare.seconds)
        rates.append(bare.tokens / pipeline.seconds)  # separators do not count as work
        ratios.append(bare.seconds / pipeline.seconds)
        print(f"{number:>6} {bare_rates[-1]:>14,.0f} {rates[-1]:>18,.0f} {ratios[-1]:>6.3f}")
    medians = [statistics.median(values) for values in (bare_rates, rates, ratios)]
    print(f"{'median':>6} {medians[0]:>14,.0f} {medians[1]:>18,.0f} {medians[2]:>6.3f}  (target: at least {TARGET})")


if __name__ == "__main__":
    main()
