"""Numbers 1 and 5: the speed of the tokenizing path, compared with bare encoding and with `datasets`."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_data_common import Row, Setting, alternate, count_targets, ratios
from bench_data_inputs import write_files
from tokenizers import Tokenizer

from pretrain.config.data import DataConfig
from pretrain.data import load_tokenizer, make_catalog, separator_id
from pretrain.data.formats import read_unit

_SPAWN = multiprocessing.get_context("spawn")


def tokenizing(setting: Setting) -> Iterator[Row]:
    """1: one process over bare encoding, and two workers over two processes."""
    files = write_files(setting.folder / "text", ".parquet", setting.megabytes, files=16)
    yield against_encoding(setting, files)
    yield two_workers(setting, files)


def against_encoding(setting: Setting, files: Path) -> Row:
    """1: one process, files to batches, compared with batch encoding of the texts in memory."""
    config, tokenizer = setting.config(files), load_tokenizer(setting.tokenizer)
    [units] = make_catalog(config).units(config)
    texts = [text for unit in units for _, text in read_unit(unit, 0, 1 << 20) if isinstance(text, str)]
    total = sum(encode_bare(tokenizer, texts))
    seconds = alternate(
        {
            "bare": lambda: encode_bare(load_tokenizer(setting.tokenizer), texts),
            "pipeline": lambda: count_targets(setting.stream(config), setting.batch_sequences),
        },
        setting.rounds,
    )
    rate = total / statistics.median(seconds["pipeline"])
    value = ratios(seconds["bare"], seconds["pipeline"])
    return Row(1, "one process, over raw batch encoding", value, "x", "at least 0.9", f"{rate:,.0f} tokens/s")


def encode_bare(tokenizer: Tokenizer, texts: list[str]) -> Iterator[int]:
    """Encode the texts in 32 calls, turn them into int32 arrays; yield the number of tokens of each call."""
    for begin in range(0, len(texts), step := -(-len(texts) // 32)):
        encodings = tokenizer.encode_batch_fast(texts[begin : begin + step], add_special_tokens=False)
        yield sum(len(array) for array in [np.array(encoding.ids, dtype=np.int32) for encoding in encodings])


def two_workers(setting: Setting, files: Path) -> Row:
    """1: two workers, compared with two independent processes that read half of the files each."""
    paths = sorted(files.iterdir())
    halves = [files.parent / f"half-{side}" for side in (0, 1)]
    for side, half in enumerate(halves):
        half.mkdir(exist_ok=True)
        for path in paths[side::2]:
            os.link(path, half / path.name)
    apart, workers = [], []
    for _ in range(setting.rounds):
        workers.append(_timed(setting, [files], workers=2))
        apart.append(_timed(setting, halves, workers=0))
    value = ratios(apart, workers)
    detail = f"{statistics.median(workers):.2f} s and {statistics.median(apart):.2f} s"
    return Row(1, "two workers, over two independent processes", value, "x", "at least 0.85", detail)


def _timed(setting: Setting, folders: list[Path], workers: int) -> float:
    """Seconds from the moment when all processes have their first batch to the last batch of any."""
    barrier, ends = _SPAWN.Barrier(len(folders) + 1), _SPAWN.Array("d", len(folders))
    processes = [
        _SPAWN.Process(target=_read_all, args=(setting, folder, workers, barrier, ends, index))
        for index, folder in enumerate(folders)
    ]
    for process in processes:
        process.start()
    barrier.wait(timeout=600)
    start = time.monotonic()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process of the benchmark failed")
    return max(ends) - start


def _read_all(setting: Setting, folder: Path, workers: int, barrier: Any, ends: Any, index: int) -> None:
    try:
        stream = setting.stream(setting.config(folder, lanes=8, workers=workers))
        stream.next_batch(setting.batch_sequences)
    except BaseException:
        barrier.abort()
        raise
    barrier.wait(timeout=600)
    for _ in count_targets(stream, setting.batch_sequences):
        pass
    ends[index] = time.monotonic()


def against_datasets(setting: Setting) -> Iterator[Row]:
    """5: compared with Hugging Face `datasets` streaming the same files, tokenizer and packing."""
    eos_id = separator_id(load_tokenizer(setting.tokenizer), setting.tokenizer)
    for suffix in (".parquet", ".jsonl"):
        files = write_files(setting.folder / f"datasets-{suffix[1:]}", suffix, setting.megabytes, files=16)
        config = setting.config(files)
        total = sum(count_targets(setting.stream(config), setting.batch_sequences))

        # Like a stream of ours, both begin with a tokenizer whose cache of words is empty.
        def by_hand(files: Path = files) -> Iterator[int]:
            return stream_datasets(setting, _encoded(files, load_tokenizer(setting.tokenizer)), eos_id)

        def by_map(files: Path = files) -> Iterator[int]:
            return stream_datasets(setting, _mapped(files, load_tokenizer(setting.tokenizer)), eos_id)

        def ours(config: DataConfig = config) -> Iterator[int]:
            return count_targets(setting.stream(config), setting.batch_sequences)

        seconds = alternate({"by hand": by_hand, "map": by_map, "ours": ours}, setting.rounds)
        rates = {name: f"{total / statistics.median(of):,.0f} tokens/s" for name, of in seconds.items()}
        for name, how in (("map", "its `map` with a tokenizer of transformers"), ("by hand", "our batched encoding")):
            what = f"over `datasets` streaming, {how}: {suffix[1:]}"
            detail = f"datasets {rates[name]}, ours {rates['ours']}"
            yield Row(5, what, ratios(seconds[name], seconds["ours"]), "x", "above 1", detail)


def _streamed(files: Path) -> Any:
    """The files as a data set in streaming mode."""
    import datasets

    datasets.disable_progress_bars()
    paths = sorted(map(str, files.iterdir()))
    kind = "parquet" if paths[0].endswith(".parquet") else "json"
    return datasets.load_dataset(kind, data_files=paths, split="train", streaming=True)


def _encoded(files: Path, tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """Token ids, 1000 documents at a time: the texts of `datasets`, encoded by the fastest call of `tokenizers`."""
    for texts in _streamed(files).batch(1000):
        encodings = tokenizer.encode_batch_fast(texts["text"], add_special_tokens=False)
        yield [encoding.ids for encoding in encodings]


def _mapped(files: Path, tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """Token ids, 1000 documents at a time: the way that the documentation of `datasets` shows."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = fast(rows["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": ids}

    mapped = _streamed(files).map(encode, batched=True, batch_size=1000, remove_columns=["text"])
    for rows in mapped.batch(1000):
        yield rows["input_ids"]


def stream_datasets(setting: Setting, documents: Iterator[list[list[int]]], eos_id: int) -> Iterator[int]:
    """Batches as ours from the token ids of documents, packed without gaps; yields targets."""
    length, rows = setting.sequence_length, setting.batch_sequences
    tokens = np.full(1, eos_id, dtype=np.int32)
    for texts in documents:
        tokens = np.concatenate([tokens, *(np.array([*ids, eos_id], dtype=np.int32) for ids in texts)])
        while len(tokens) > rows * length:
            batch = np.stack([tokens[row * length : (row + 1) * length + 1] for row in range(rows)])
            yield batch.size - rows
            tokens = tokens[rows * length :]
    if len(tokens) > 1:
        yield len(tokens) - 1
