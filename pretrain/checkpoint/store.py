"""Reading, listing and pruning checkpoints; `pretrain.checkpoint.format` describes what they hold."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
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
    index_text,
)
from pretrain.engine.ranks import Ranks
from pretrain.files import delete, file_sha256

_FOLDER = re.compile(r"step-(\d{8,})")


ALONE = Ranks()
"""A process that shares its work with no other."""


def folder_name(step: int) -> str:
    """``step-00000500``."""
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is that of a checkpoint."""
    return _FOLDER.fullmatch(name) is not None


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(folder.name.removeprefix("step-"))


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
        try:
            if not path.is_file():
                raise CheckpointError(f"{folder}: not a checkpoint (it has no {INDEX})")
            text = path.read_text(encoding="utf-8")
            self.index: Index = json.loads(text)
        except CheckpointError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: damaged: {error}") from None
        if problem := index_problem(self.index):
            raise CheckpointError(f"{path}: {problem}")
        if "digest" in self.index and text not in (index_text(self.index), json.dumps(self.index)):
            raise CheckpointError(f"{path}: damaged: its text is not what this program writes")  # 1e-05 and 1E-05

    def name_problem(self) -> str | None:
        """What is wrong if the folder has the name of a checkpoint, but of another step; None under other names."""
        if not is_checkpoint_name(self.folder.name) or self.index["step"] == step_of(self.folder):
            return None
        return f"{self.folder / INDEX}: damaged: it is the index of step {self.index['step']}"

    def verify(self, ranks: Ranks = ALONE) -> None:
        """Compare files with their checksums in the index, their tensors with its records, and the name with its step.

        Args:
            ranks: the processes that share the files out. With more than one this is a collective.

        Raises:
            CheckpointError: naming each file that is missing, cannot be read or differs; on all ranks.
        """
        if problems := self.problems(ranks):
            raise CheckpointError("\n".join(problems))

    def problems(self, ranks: Ranks = ALONE) -> list[str]:
        """Return what `verify` would raise, a line a file; empty if the checkpoint is intact."""
        if misnamed := self.name_problem():
            return [misnamed]  # on all ranks, which have read the same index
        names = sorted(self.index["files"])
        own = names[ranks.rank :: ranks.world_size]
        with ThreadPoolExecutor(verifying_threads()) as pool:
            found = [problem for problem in pool.map(self._file_problem, own) if problem]
        found = [problem for part in ranks.gather(found) for problem in part]
        if found:
            return found
        try:
            self._compare_headers(own)
        except CheckpointError as error:
            found = [str(error)]
        return [problem for part in ranks.gather(found) for problem in part]

    def _file_problem(self, name: str) -> str | None:
        """What is wrong with the contents of one file, or None."""
        path = self.folder / name
        try:
            if not path.is_file():
                return f"{path}: missing; this checkpoint cannot be used"
            if file_sha256(path) != self.index["files"][name]:
                return f"{path}: damaged (its sha256 is not the recorded one)"
        except OSError as error:
            return f"{path}: cannot be read: {error.strerror}"
        return None

    def _compare_headers(self, names: Collection[str]) -> None:
        """Compare what files say of their tensors with the records: an index without a digest may say anything."""
        expected: dict[str, list[tuple[str, str, FragmentRecord, torch.dtype]]] = {}
        for name, slots in self.index["parameters"].items():
            for slot, record in slots.items():
                for fragment in record["fragments"]:
                    if fragment["length"] and fragment["file"] in names:
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


def verifying_threads() -> int:
    """The number of files that one process hashes at the same time: its share of this machine's processors."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, len(os.sched_getaffinity(0)) // here))


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


def list_unfinished(root: Path) -> list[Path]:
    """What saves and deletions that did not end have left: ``step-N.tmp``, and ``step-N.old`` that was replaced."""
    replaced = (folder for folder in root.glob("step-*.old") if folder.with_suffix("").exists())
    return sorted([*root.glob("step-*.tmp"), *replaced])


def clear_unfinished(root: Path) -> None:
    """Delete what `list_unfinished` finds. Only the process that holds the run's lock may call this."""
    recover_replaced(root)
    for folder in list_unfinished(root):
        delete(folder, as_far_as_possible=True)


def step_folders(root: Path) -> list[Path]:
    """The folders under `root` with the name of a checkpoint, complete or not, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    return [path for path in step_folders(root) if (path / INDEX).is_file()]


def newest_intact(root: Path, ranks: Ranks = ALONE) -> tuple[CheckpointReader | None, list[str]]:
    """The newest checkpoint whose files match their checksums, and a message for each newer one that is damaged.

    A checkpoint gets its name together with its index, so one without an index, or under the name of another step, is
    damaged as well.

    Args:
        root: the folder of the checkpoints.
        ranks: the processes that share the reading. With more than one this is a collective.
    """
    damaged: list[str] = []
    for folder in reversed(ranks.on_rank_0(lambda: step_folders(root))):
        reader, problem = None, None
        try:
            reader = CheckpointReader(folder)
        except CheckpointError as error:
            problem = str(error)
        # All ranks look at the files, or none does.
        problems = [found for found in ranks.gather(problem) if found]
        if not problems and reader is not None:
            problems = reader.problems(ranks)
            if not problems:
                return reader, damaged
        damaged.append(problems[0] if len(problems) == 1 else f"{problems[0]} (and {len(problems) - 1} more)")
    return None, damaged


def prune(root: Path, keep_last: int, keep_every_steps: int | None, intact: Path | None = None) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every_steps`.

    The newest intact checkpoint is never deleted. Only the process that holds the run's lock may call this.

    Args:
        root: the folder of the checkpoints.
        keep_last: how many of the newest to keep.
        keep_every_steps: also keep the multiples of this.
        intact: a checkpoint known to be intact, such as the one just written, which stays; None: find out by reading.

    Returns:
        What was deleted.
    """
    removed = prunable(root, keep_last, keep_every_steps, intact)
    for folder in removed:
        # In one rename, so that what is left of an interrupted deletion does not look like a damaged checkpoint.
        doomed = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        delete(doomed)
    return removed


def prunable(root: Path, keep_last: int, keep_every_steps: int | None, intact: Path | None = None) -> list[Path]:
    """Return what `prune` would delete."""
    everything = list_checkpoints(root)
    kept = [f for f in everything if keep_every_steps and step_of(f) % keep_every_steps == 0] + everything[-keep_last:]
    removable = [folder for folder in everything if folder not in kept and folder != intact]
    if removable and intact is None:
        newest, _ = newest_intact(root)
        if newest is None:
            return []  # nothing is certain to be good: leave it all to people
        removable = [folder for folder in removable if folder != newest.folder]
    return removable
