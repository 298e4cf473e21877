"""mosaicml-streaming and litdata, in a Python of their own, for the comparison on prepared shards.

    python -m venv build/others
    build/others/bin/pip install mosaicml-streaming litdata
    python scripts/bench_data.py --others build/others/bin/python

The other Python runs this file, which therefore imports nothing of this project. It first writes the tokens in the
format of each library, in their order; then each line of its input names a library that it reads once, and it answers
with the seconds per token. Both give batches of int32 [rows, T+1] from a `DataLoader` without workers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self
from unittest.mock import MagicMock


class Others:
    """The other Python, seen from this one. Has no libraries if there is none.

    Args:
        python: its path, or None.
        folder: for its files; must not exist.
        files: arrays of tokens.
        dtype: of the tokens.
        sequence_length: T.
        rows: of a batch.
        epochs: how often the tokens are read in one measurement.

    """

    def __init__(
        self,
        python: str | None,
        folder: Path,
        files: list[Path],
        dtype: str,
        sequence_length: int,
        rows: int,
        epochs: int,
    ) -> None:
        self.versions: dict[str, str] = {}
        self._process: subprocess.Popen[str] | None = None
        if python is None:
            return
        task = [
            str(folder),
            json.dumps([str(file) for file in files]),
            dtype,
            str(sequence_length),
            str(rows),
            str(epochs),
        ]
        self._process = subprocess.Popen(
            [python, __file__, *task], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._answer()

    def seconds(self, name: str) -> float:
        """Read the tokens once with a library; return the seconds per token."""
        assert self._process and self._process.stdin  # noqa: PT018
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> Any:
        assert self._process and self._process.stdout  # noqa: PT018
        for line in self._process.stdout:
            if line.startswith("answer "):  # the libraries print as well
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError("the Python of --others ended; see its output above")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.communicate()


def main() -> None:
    """Write the tokens in the formats of the libraries, then read them whenever a line asks for it."""
    folder, files, dtype, sequence_length, rows, epochs = sys.argv[1:]
    length, batch = int(sequence_length), int(rows)
    windows = list(_windows(json.loads(files), dtype, length))
    readers: dict[str, Callable[[], Iterator[Any]]] = {
        "mosaicml-streaming": _mosaic(Path(folder) / "mosaic", windows, dtype, length, batch),
        "litdata": _litdata(Path(folder) / "litdata", windows, length, batch),
    }
    for name, read in readers.items():
        if any((row.numpy() != window).any() for row, window in zip(next(read()), windows, strict=False)):
            raise RuntimeError(f"{name} does not give the tokens that were written")
    _say({name: version(name) for name in readers})
    for line in sys.stdin:
        read, tokens, spent = readers[line.strip()], 0, 0.0
        for _ in range(int(epochs)):
            batches = read()
            next(batches)  # opens files
            begin = time.perf_counter()
            tokens += sum(found.shape[0] * (found.shape[1] - 1) for found in batches)
            spent += time.perf_counter() - begin
        _say(spent / tokens)


def _say(answer: object) -> None:
    print("answer " + json.dumps(answer), flush=True)


def _windows(files: list[str], dtype: str, length: int) -> Iterator[Any]:
    import numpy as np

    for file in files:
        tokens = np.memmap(file, dtype, "r")
        for begin in range(0, len(tokens) - length - 1, length):
            yield np.array(tokens[begin : begin + length + 1])


def _mosaic(folder: Path, windows: list[Any], dtype: str, length: int, rows: int) -> Callable[[], Iterator[Any]]:
    import torch

    _mend_torchvision()
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:{dtype}:{length + 1}"}) as writer:
        for window in windows:
            writer.write({"tokens": window})
    data = StreamingDataset(local=str(folder), shuffle=False, batch_size=rows)

    def stack(samples: list[dict[str, Any]]) -> Any:
        return torch.stack([torch.from_numpy(sample["tokens"].astype("int32")) for sample in samples])

    return lambda: iter(torch.utils.data.DataLoader(data, rows, collate_fn=stack, drop_last=True))


def _mend_torchvision() -> None:
    """Let streaming import its data sets of images where torchvision was built for another torch, as CPU wheels are."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ):
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
        sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]


def _litdata(folder: Path, windows: list[Any], length: int, rows: int) -> Callable[[], Iterator[Any]]:
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming.cache import Cache

    folder.mkdir(parents=True)
    cache = Cache(str(folder), chunk_bytes="64MB", item_loader=TokensLoader(length + 1))
    for index, window in enumerate(windows):
        cache._add_item(index, torch.from_numpy(window))
    cache.done()
    cache.merge()

    def stack(samples: list[Any]) -> Any:
        return torch.stack([sample.to(torch.int32) for sample in samples])

    def read() -> Iterator[Any]:
        data = StreamingDataset(str(folder), item_loader=TokensLoader(length + 1), shuffle=False, drop_last=True)
        return iter(StreamingDataLoader(data, batch_size=rows, collate_fn=stack, drop_last=True))

    return read


if __name__ == "__main__":
    main()
