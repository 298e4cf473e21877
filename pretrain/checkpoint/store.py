"""Checkpoints that know no topology.

A checkpoint is a folder ``step-00000500``::

    index.json                what is in it; written last
    state-00000.safetensors   fragments of tensors written by rank 0, and so on for each rank that has any
    rng-00000.safetensors     random generators of rank 0, and so on for every rank

Every tensor of the run is named by its parameter and a *slot*: ``weight``, the name of an optimizer state such as
``momentum``, or ``telemetry_average``. A slot is stored flat, in one or more fragments (file, start, length) that
together cover it, so that any engine on any number of ranks can write its own part and read any other part. The index
holds the slots' shapes and dtypes, the optimizer's groups with their hyper-parameters, the counters, the data stream's
state, the config, the identity of the run, and the sha256 of every file.

A checkpoint is written to ``step-N.tmp``, synced, and renamed; a folder without an index does not exist.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain.engine.ranks import Ranks
from pretrain.files import file_sha256, publish_folder, sync
from pretrain.processes.errors import UserError

FORMAT = 1
INDEX = "index.json"
TELEMETRY_SLOT = "telemetry_average"
"""The slot of `pretrain.neurons.telemetry`; like every slot but ``weight`` it may be absent."""
_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit; the message names the file and what to do."""


class FragmentRecord(TypedDict):
    """Where one fragment of a slot is stored."""

    file: str
    start: int  # first element within the flattened slot
    length: int  # elements


class SlotRecord(TypedDict):
    """One tensor of the run."""

    shape: list[int]
    dtype: str  # torch's name, without "torch."
    fragments: list[FragmentRecord]


class Index(TypedDict):
    """index.json."""

    format: int
    step: int  # optimizer steps taken
    world_size: int  # ranks that wrote it (random generators are per rank)
    counters: dict[str, Any]  # TrainState
    config: dict[str, Any]  # the resolved config
    identity: dict[str, Any]  # what must match on resume: dotted key to value
    data_state: dict[str, Any]  # StreamState
    optimizer_groups: list[dict[str, Any]]  # hyper-parameters, and "names" of the group's parameters
    parameters: dict[str, dict[str, SlotRecord]]  # name -> slot -> record
    provenance: dict[str, Any]  # for the model card: commit, data sources, last losses
    files: dict[str, str]  # name -> sha256


@dataclass(frozen=True)
class Fragment:
    """A flat piece of a slot to be saved: elements [start, start + len(values)) of the flattened tensor."""

    name: str
    slot: str
    shape: tuple[int, ...]
    start: int
    values: Tensor

    @property
    def key(self) -> str:
        """Its name inside the safetensors file."""
        return f"{self.name}:{self.slot}:{self.start}"


def folder_name(step: int) -> str:
    """``step-00000500``."""
    return f"step-{step:08d}"


def save_checkpoint(
    root: Path,
    index: Index,
    fragments: Iterable[Fragment],
    generators: dict[str, Tensor],
    ranks: Ranks,
) -> Path:
    """Write one checkpoint; a collective: every rank calls it with its own fragments and random generators.

    `index` needs everything but `parameters`, `files` and `world_size`, which are filled in here. An older checkpoint
    of the same step is replaced once the new one is complete. An I/O error on any rank is raised on every rank, and
    leaves earlier checkpoints alone.

    Raises:
        OSError: it could not be written (disk full, permissions).
    """
    final = root / folder_name(index["step"])
    partial = final.with_name(final.name + ".tmp")
    error = None
    if ranks.rank == 0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as e:
            error = str(e)
    if problem := ranks.broadcast(error):
        raise OSError(f"checkpoint of step {index['step']} not saved: {problem}")
    own: dict[str, Any] = {"files": {}, "slots": []}
    try:
        own = _write_rank(partial, ranks.rank, list(fragments), generators)
    except (OSError, SafetensorError) as e:
        error = str(e)
    written = ranks.gather((own, error))
    problems = [problem for _, problem in written if problem]
    if not problems and ranks.rank == 0:
        try:
            index["world_size"] = ranks.world_size
            index["files"] = {name: digest for part, _ in written for name, digest in part["files"].items()}
            index["parameters"] = _merge_slots(slot for part, _ in written for slot in part["slots"])
            _publish(partial, final, index)
        except OSError as e:
            problems = [str(e)]
    problems = ranks.broadcast(problems)
    if problems:
        raise OSError(f"checkpoint of step {index['step']} not saved: {problems[0]}")
    return final


def _write_rank(folder: Path, rank: int, fragments: list[Fragment], generators: dict[str, Tensor]) -> dict[str, Any]:
    """Write this rank's files; returns their checksums and the records of its fragments."""
    files = {f"rng-{rank:05d}.safetensors": generators}
    if fragments:
        state = {f.key: f.values.detach().reshape(-1).cpu().contiguous() for f in fragments}
        # Several parameters may have one step counter; safetensors refuses to save a tensor under two names.
        state = {key: values.clone() if values.numel() == 1 else values for key, values in state.items()}
        files[f"state-{rank:05d}.safetensors"] = state
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        sync(folder / name)
    slots = []
    for f in fragments:
        record = FragmentRecord(file=f"state-{rank:05d}.safetensors", start=f.start, length=f.values.numel())
        slots.append((f.name, f.slot, list(f.shape), str(f.values.dtype).removeprefix("torch."), record))
    return {"files": {name: file_sha256(folder / name) for name in files}, "slots": slots}


def _merge_slots(slots: Iterable[tuple[Any, ...]]) -> dict[str, dict[str, SlotRecord]]:
    parameters: dict[str, dict[str, SlotRecord]] = {}
    for name, slot, shape, dtype, fragment in slots:
        empty = SlotRecord(shape=shape, dtype=dtype, fragments=[])
        parameters.setdefault(name, {}).setdefault(slot, empty)["fragments"].append(fragment)
    for name, record in parameters.items():
        for slot, entry in record.items():
            entry["fragments"].sort(key=lambda f: f["start"])
            _check_cover(f"{name} {slot}", entry)
    return parameters


def _check_cover(label: str, record: SlotRecord) -> None:
    end = 0
    for fragment in record["fragments"]:
        assert fragment["start"] == end, f"{label}: fragments overlap or leave a gap at element {end}"
        end += fragment["length"]
    assert end == torch.Size(record["shape"]).numel(), f"{label}: fragments cover {end} elements"


def _publish(partial: Path, final: Path, index: Index) -> None:
    """Write the index, make everything durable, and give the folder its name."""
    path = partial / INDEX
    path.write_text(json.dumps(index, indent=1), encoding="utf-8")
    sync(path)
    publish_folder(partial, final)


class CheckpointReader:
    """Reads one checkpoint.

    Args:
        folder: the checkpoint's folder.

    Attributes:
        index: its `Index`.

    Raises:
        CheckpointError: no index, an unreadable one, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX
        if not path.is_file():
            raise CheckpointError(f"{folder}: not a checkpoint (it has no {INDEX})")
        try:
            self.index: Index = json.loads(path.read_text(encoding="utf-8"))
            found = self.index["format"]
            missing = [key for key in Index.__annotations__ if key not in self.index]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged: {error}") from None
        if found != FORMAT:
            raise CheckpointError(f"{path}: format {found}, this version reads format {FORMAT}")
        if missing:
            raise CheckpointError(f"{path}: damaged: {', '.join(missing)} missing")

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            CheckpointError: naming the first file that is missing or differs.
        """
        for name, digest in self.index["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; this checkpoint cannot be used")
            if file_sha256(path) != digest:
                raise CheckpointError(f"{path}: damaged (its sha256 is not the recorded one)")

    def read(self, name: str, slot: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements [start, start + length) of a flattened slot; the whole slot in its own shape by default."""
        record = self.index["parameters"][name][slot]
        shape = torch.Size(record["shape"])
        end = shape.numel() if length is None else start + length
        values = torch.empty(end - start, dtype=getattr(torch, record["dtype"]))
        for fragment in record["fragments"]:
            low = max(start, fragment["start"])
            high = min(end, fragment["start"] + fragment["length"])
            if low < high:
                key = f"{name}:{slot}:{fragment['start']}"
                with safe_open(self.folder / fragment["file"], framework="pt") as file:
                    part = file.get_slice(key)[low - fragment["start"] : high - fragment["start"]]
                values[low - start : high - start] = part
        return values.reshape(shape) if length is None and start == 0 else values

    def weights(self) -> dict[str, Tensor]:
        """All weights by parameter name."""
        return {name: self.read(name, "weight") for name in self.index["parameters"]}

    def generators(self, rank: int) -> dict[str, Tensor] | None:
        """The random generators that `rank` saved; None if there was no such rank."""
        path = self.folder / f"rng-{rank:05d}.safetensors"
        if path.name not in self.index["files"]:
            return None
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


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
