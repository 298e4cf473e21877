"""Writing a checkpoint: every rank its own files, then rank 0 the index."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint.format import (
    FORMAT,
    INDEX,
    Fragment,
    FragmentRecord,
    Index,
    SlotRecord,
    fragment_key,
    index_digest,
    index_problem,
    index_text,
)
from pretrain.checkpoint.store import clear_unfinished, folder_name
from pretrain.checkpoint.tensor_file import save_file
from pretrain.engine.ranks import Ranks
from pretrain.files import publish_folder, sync


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds besides tensors and random generators; see `Index`."""

    step: int
    counters: dict[str, Any]
    config: dict[str, Any]
    identity: dict[str, Any]
    data_state: dict[str, Any]
    optimizer_groups: list[dict[str, Any]]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class _Written:
    """What one rank has written."""

    files: dict[str, str]
    """Name -> sha256."""
    slots: list[tuple[str, str, list[int], str, FragmentRecord]]
    """Parameter, slot, the slot's shape and dtype, and where the fragment is."""


def save_checkpoint(
    root: Path,
    snapshot: Snapshot,
    fragments: Iterable[Fragment],
    generators: dict[str, Tensor],
    ranks: Ranks,
) -> Path:
    """Write one checkpoint; a collective, to which every rank brings its own fragments and random generators.

    The folder is written as ``step-N.tmp``, synced, and renamed. A checkpoint of the same step is replaced once the
    new one is complete; an error on any rank leaves all earlier checkpoints as they were.

    Raises:
        OSError: it could not be written here (disk full, permissions).
        ValueError: the fragments of all ranks do not make up the tensors.
        PeerError: another rank failed.
    """
    final = root / folder_name(snapshot.step)
    partial = final.with_name(final.name + ".tmp")
    own = list(fragments)
    needed = sum(ranks.gather(sum(fragment.values.nbytes for fragment in own)))

    def prepare() -> None:
        with named(snapshot.step):
            root.mkdir(parents=True, exist_ok=True)
            clear_unfinished(root)
            _check_space(root, needed)
            partial.mkdir()

    def write() -> _Written:
        with named(snapshot.step):
            return _write_rank(partial, ranks.rank, own, generators)

    def publish() -> None:
        with named(snapshot.step):
            _publish(partial, final, build_index(snapshot, written))

    try:
        ranks.on_rank_0(prepare)
        written = ranks.together(write)
        ranks.on_rank_0(publish)
    except Exception:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise
    return final


@contextmanager
def named(step: int) -> Iterator[None]:
    """Name the checkpoint in whatever goes wrong with its files."""
    try:
        yield
    except OSError as error:
        raise OSError(f"checkpoint of step {step} not saved: {error}") from error


def _check_space(root: Path, needed: int) -> None:
    """Find out before writing whether the disk has room, rather than fill it."""
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"No space left on device: {needed:,} bytes are needed, {free:,} are free", str(root)
        )


def _write_rank(folder: Path, rank: int, fragments: list[Fragment], generators: dict[str, Tensor]) -> _Written:
    """Write this rank's files."""
    state_file = f"state-{rank:05d}.safetensors"
    contents = {f"rng-{rank:05d}.safetensors": generators}
    if fragments:
        contents[state_file] = {fragment_key(f.name, f.slot, f.start): f.values.detach().reshape(-1) for f in fragments}
    files = {}
    for name, tensors in contents.items():
        files[name] = save_file(tensors, folder / name)
        sync(folder / name)
    slots = [
        (
            f.name,
            f.slot,
            list(f.shape),
            str(f.values.dtype).removeprefix("torch."),
            FragmentRecord(file=state_file, start=f.start, length=f.values.numel()),
        )
        for f in fragments
    ]
    return _Written(files, slots)


def build_index(snapshot: Snapshot, written: Sequence[_Written]) -> Index:
    """The index of a checkpoint that these ranks have written; this is the only place that makes one.

    Raises:
        ValueError: the fragments overlap, leave a gap, or disagree about a tensor.
    """
    parameters: dict[str, dict[str, SlotRecord]] = {}
    for part in written:
        for name, slot, shape, dtype, fragment in part.slots:
            empty = SlotRecord(shape=shape, dtype=dtype, fragments=[])
            record = parameters.setdefault(name, {}).setdefault(slot, empty)
            if (record["shape"], record["dtype"]) != (shape, dtype):
                raise ValueError(f"{slot} of {name}: the ranks disagree about its shape or dtype")
            record["fragments"].append(fragment)
    for slots in parameters.values():
        for record in slots.values():
            record["fragments"].sort(key=lambda fragment: fragment["start"])
    index = Index(
        format=FORMAT,
        step=snapshot.step,
        world_size=len(written),
        counters=snapshot.counters,
        config=snapshot.config,
        identity=snapshot.identity,
        data_state=snapshot.data_state,
        optimizer_groups=snapshot.optimizer_groups,
        parameters=parameters,
        provenance=snapshot.provenance,
        files={name: digest for part in written for name, digest in part.files.items()},
    )
    # Through JSON, so that the digest is that of what will be read: tuples become lists.
    index = json.loads(json.dumps(index))
    index["digest"] = index_digest(index)
    if problem := index_problem(index):
        raise ValueError(f"the index of step {snapshot.step} is not valid: {problem}")
    return index


def _publish(partial: Path, final: Path, index: Index) -> None:
    """Write the index, make everything durable, and give the folder its name."""
    path = partial / INDEX
    path.write_text(index_text(index), encoding="utf-8")
    sync(path)
    publish_folder(partial, final)
