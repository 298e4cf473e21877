"""Small corpora in every format, and the streams over them that the tests compare."""

import gzip
import json
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import zstandard

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import BatchShare, Catalog, StreamState, TokenBatch, TokenStream, make_catalog
from pretrain.data.units import Unit
from pretrain.engine.ranks import Ranks

EOS = "<|endoftext|>"
WORDS = ["the", "whale", "sea", "ship", "crew", "naïve", "鯨", "🐋", "a", "\n", "Ahab", EOS, "and", "harpoon", "..."]

Result = TypeVar("Result")


def make_texts(seed: int, count: int, longest: int = 40) -> list[str]:
    """Documents of 0 to `longest` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, longest))) for _ in range(count)]


def write_parquet(path: Path, texts: Sequence[str], rows_per_group: int, field: str = "text") -> Path:
    table = pa.table({"id": [str(i) for i in range(len(texts))], field: pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    """Plain, gzip or zstd, by the name."""
    data = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":  # two frames, as parallel compressors write them
        half = len(data) // 2
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    path.write_bytes(data)
    return path


def source_units(source: SourceConfig) -> list[Unit]:
    """The read units of one source."""
    config = DataConfig(sources=[source], lanes=1)
    [units] = make_catalog(config).units(config)
    return list(units)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    elif path.suffix == ".zst":
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as frames:
            data = frames.read()
    return [json.loads(line) for line in data.split(b"\n") if line]


@dataclass(frozen=True)
class Setting:
    """What a stream needs, and may vary between two streams that must agree."""

    config: DataConfig
    tokenizer: TokenizerConfig
    sequence_length: int = 7
    epochs: int | None = 2
    split: Any = "train"

    def open(
        self, workers: int = 0, group: Any = None, state: StreamState | None = None, catalog: Catalog | None = None
    ) -> TokenStream:
        config = self.config.model_copy(update={"workers": workers})
        return TokenStream(
            config,
            self.tokenizer,
            self.sequence_length,
            split=self.split,
            epochs=self.epochs,
            group=group,
            state=state,
            catalog=catalog,
        )

    def changed(self, **data: Any) -> "Setting":
        config = DataConfig(**{**self.config.model_dump(), **data})
        return Setting(config, self.tokenizer, self.sequence_length, self.epochs, self.split)


def make_setting(tokenizer: TokenizerConfig, *paths: Path, **changes: Any) -> Setting:
    """Keys of SourceConfig hold for every source; those of Setting and DataConfig as they are."""
    of_source = {key: changes.pop(key) for key in list(changes) if key in SourceConfig.model_fields}
    of_setting = {key: changes.pop(key) for key in list(changes) if key in ("sequence_length", "epochs", "split")}
    sources = [SourceConfig(path=str(path), **of_source) for path in paths]
    data = {"lanes": 2, "validation_fraction": 0.0, **changes}
    return Setting(DataConfig(sources=sources, **data), tokenizer, **of_setting)


def drain(stream: TokenStream, batch: int, limit: int | None = None) -> list[BatchShare]:
    """All batches, or the first `limit`."""
    batches: list[BatchShare] = []
    while limit is None or len(batches) < limit:
        try:
            batches.append(stream.next_batch(batch))
        except StopIteration:
            break
    return batches


def whole(shares: Sequence[Sequence[BatchShare]]) -> list[TokenBatch]:
    """The global batches of what each rank got, in which every row is on one rank and ranks have equally many."""
    found = []
    for parts in zip(*shares, strict=True):
        [(total, targets)] = {(part.global_rows, part.global_targets) for part in parts}
        assert sorted(row for part in parts for row in part.rows) == list(range(total))
        assert {len(part.rows) for part in parts} <= {total // len(parts), -(-total // len(parts))}
        order = torch.tensor([row for part in parts for row in part.rows]).argsort()
        tokens, lengths = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("tokens", "lengths"))
        found.append(TokenBatch(tokens, lengths))
        assert found[-1].num_targets == targets
    return found


def rows(batches: Sequence[TokenBatch]) -> list[tuple[list[int], int]]:
    """(tokens, valid targets) of every sequence."""
    return [
        (tokens, length)
        for batch in batches
        for tokens, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
    ]


def fork(work: Callable[[], object]) -> int:
    """Do something in a forked process, which shows its error and ends with 1 if there is one; return its number."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def forked(work: Callable[[], object]) -> int:
    """Wait for something that is done in a forked process; return its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


def die_at_change(folder: Path, number: int) -> None:
    """Kill this process before it writes, makes, renames or deletes something at or below `folder` once more.

    Args:
        folder: the folder.
        number: of changes that it survives.
    """
    left = number

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            changes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if changes and isinstance(arguments[0], str) and f"{arguments[0]}/".startswith(f"{folder}/"):
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hear)


def ranks_of(group: Any) -> Ranks:
    """The ranks of a group, or a single one."""
    return Ranks(group.rank(), group.size(), group) if group else Ranks()


def on_ranks(size: int, function: Callable[[Any], Result]) -> list[Result]:
    """Run a function on `size` ranks, each a thread with a gloo group of its own; raises the first error."""
    store = dist.HashStore()
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    # Messages between two ranks ask for the ranks of the group, which a group of the process would have.
    known = dist.distributed_c10d._world.pg_group_ranks

    def run(rank: int) -> None:
        try:
            group = dist.ProcessGroupGloo(store, rank, size)
            known[group] = {number: number for number in range(size)}
            try:
                results[rank] = function(group)
            finally:
                # A forked process that leaves a group of its own would also end this one, and wait for its threads.
                del known[group]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
