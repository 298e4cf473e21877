"""Reading, listing and pruning checkpoints; `pretrain.checkpoint.format` describes what they hold."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.checkpoint.format import (
    INDEX,
    CheckpointError,
    FragmentRecord,
    Index,
    dtype_of,
    fragment_key,
    index_problem,
)
from pretrain.files import file_sha256

_FOLDER = re.compile(r"step-(\d{8,})")


def folder_name(step: int) -> str:
    """``step-00000500``."""
    return f"step-{step:08d}"


class CheckpointReader:
    """Reads one checkpoint.

    Args:
        folder: the checkpoint's folder.

    Attributes:
        index: its `Index`.

    Raises:
        CheckpointError: no index, a damaged one, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX
        if not path.is_file():
            raise CheckpointError(f"{folder}: not a checkpoint (it has no {INDEX})")
        try:
            self.index: Index = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: damaged: {error}") from None
        if problem := index_problem(self.index):
            raise CheckpointError(f"{path}: {problem}")

    def verify(self) -> None:
        """Compare every file with its checksum in the index, and its tensors with the records in the index.

        Raises:
            CheckpointError: naming the first file that is missing, cannot be read or differs.
        """
        for name, digest in self.index["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; this checkpoint cannot be used")
            try:
                found = file_sha256(path)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
            if found != digest:
                raise CheckpointError(f"{path}: damaged (its sha256 is not the recorded one)")
        self._compare_headers()

    def _compare_headers(self) -> None:
        """Compare what the files say of their tensors with the records: an index without a digest may say anything."""
        expected: dict[str, list[tuple[str, str, FragmentRecord, torch.dtype]]] = {}
        for name, slots in self.index["parameters"].items():
            for slot, record in slots.items():
                for fragment in record["fragments"]:
                    if fragment["length"]:
                        expected.setdefault(fragment["file"], []).append((name, slot, fragment, dtype_of(record)))
        for file_name, entries in expected.items():
            path = self.folder / file_name
            try:
                with safe_open(path, framework="pt") as file:
                    for name, slot, fragment, dtype in entries:
                        stored = file.get_slice(fragment_key(name, slot, fragment["start"]))
                        self._compare(path, f"{slot} of {name}", stored.get_shape(), stored[0:0].dtype, fragment, dtype)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: does not hold what the index says: {error}") from None

    @staticmethod
    def _compare(
        path: Path, label: str, shape: list[int], found: torch.dtype, fragment: FragmentRecord, dtype: torch.dtype
    ) -> None:
        if shape != [fragment["length"]] or found != dtype:
            raise CheckpointError(f"{path}: {label} is not what the index says: {shape}, {found}")

    def read(self, name: str, slot: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements [start, start + length) of a flattened slot; the whole slot in its own shape by default.

        Raises:
            CheckpointError: there is no such slot or no such elements, or a file does not hold what the index says.
        """
        record = self.index["parameters"].get(name, {}).get(slot)
        if record is None:
            raise CheckpointError(f"{self.folder}: holds no {slot} of {name}")
        shape, dtype = torch.Size(record["shape"]), dtype_of(record)
        end = shape.numel() if length is None else start + length
        if not 0 <= start <= end <= shape.numel():
            raise CheckpointError(
                f"{self.folder}: elements {start} to {end} of {slot} of {name} are asked for; it has {shape.numel()}"
            )
        values = torch.empty(end - start, dtype=dtype)
        for fragment in record["fragments"]:
            low = max(start, fragment["start"])
            high = min(end, fragment["start"] + fragment["length"])
            if low < high:
                values[low - start : high - start] = self._elements(name, slot, fragment, dtype, low, high)
        return values.reshape(shape) if length is None and start == 0 else values

    def _elements(
        self, name: str, slot: str, fragment: FragmentRecord, dtype: torch.dtype, low: int, high: int
    ) -> Tensor:
        """Elements [low, high) of a slot, from the fragment that holds them."""
        path, first = self.folder / fragment["file"], fragment["start"]
        try:
            with safe_open(path, framework="pt") as file:
                stored = file.get_slice(fragment_key(name, slot, first))
                found, part = stored.get_shape(), stored[low - first : high - first]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {slot} of {name} cannot be read: {error}") from None
        self._compare(path, f"{slot} of {name}", found, part.dtype, fragment, dtype)
        return part

    def weights(self) -> dict[str, Tensor]:
        """All weights by parameter name."""
        return {name: self.read(name, "weight") for name in self.index["parameters"]}

    def generators(self, rank: int) -> dict[str, Tensor] | None:
        """The random generators that `rank` saved; None if there was no such rank."""
        path = self.folder / f"rng-{rank:05d}.safetensors"
        if path.name not in self.index["files"]:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None


def recover_replaced(root: Path) -> list[Path]:
    """Give a checkpoint its name back if the process that was replacing it died in between; returns those.

    `pretrain.files.publish_folder` renames the earlier folder to ``step-N.old`` for a moment. Only the process that
    holds the run's lock may call this.
    """
    found = []
    for replaced in sorted(root.glob("step-*.old")):
        final = replaced.with_suffix("")
        if not final.exists():
            replaced.rename(final)
            found.append(final)
    return found


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / INDEX).is_file()]


def newest_intact(root: Path) -> tuple[CheckpointReader | None, list[str]]:
    """The newest checkpoint whose files match their checksums, and a message for each newer one that is damaged."""
    damaged = []
    for folder in reversed(list_checkpoints(root)):
        try:
            reader = CheckpointReader(folder)
            reader.verify()
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        return reader, damaged
    return None, damaged


def prune(root: Path, keep_last: int, keep_every_steps: int | None) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every_steps`."""
    removed = []
    for folder in list_checkpoints(root)[:-keep_last]:
        step = int(folder.name.removeprefix("step-"))
        if keep_every_steps and step % keep_every_steps == 0:
            continue
        # The index first: what is left of an interrupted deletion is not a checkpoint.
        (folder / INDEX).unlink()
        shutil.rmtree(folder)
        removed.append(folder)
    return removed
