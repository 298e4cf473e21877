"""The format of a checkpoint, and what has to hold of its index.

A checkpoint is a folder ``step-00000500``::

    index.json                what is in it; written last
    state-00000.safetensors   fragments of tensors written by rank 0, and so on for each rank that has any
    rng-00000.safetensors     random generators of rank 0, and so on for every rank

Every tensor of the run is named by its parameter and a *slot*: ``weight``, the name of an optimizer state such as
``momentum``, or ``telemetry_average``. A slot is stored flat, in one or more fragments (file, start, length) that
together cover it exactly once, so that any engine on any number of ranks can write its own part and read any other.

The index guards everything else, so it carries a digest of itself: the sha256 of its content as canonical JSON
without the key ``digest``. A digest inside the file cannot be lost or left behind, as a second file can.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from pretrain.processes.errors import UserError

FORMAT = 2
FORMAT_WITHOUT_DIGEST = 1
"""Checkpoints up to commit fb900ae; the only ones whose index may lack a digest."""
INDEX = "index.json"
TELEMETRY_SLOT = "telemetry_average"
"""The slot of `pretrain.neurons.telemetry`; like every slot but ``weight`` it may be absent."""

_FILE_NAME = re.compile(r"(state|rng)-\d{5,}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    fragments: list[FragmentRecord]  # by rising start; together they cover the slot exactly once


class Index(TypedDict):
    """index.json."""

    format: int
    digest: NotRequired[str]  # sha256 of the rest; absent in format 1 only
    step: int  # optimizer steps taken
    world_size: int  # ranks that wrote it (random generators are per rank)
    counters: dict[str, Any]  # TrainState
    config: dict[str, Any]  # the resolved config
    identity: dict[str, Any]  # what must match on resume
    data_state: dict[str, Any]  # StreamState
    optimizer_groups: list[dict[str, Any]]  # hyper-parameters, and "names" of the group's parameters
    parameters: dict[str, dict[str, SlotRecord]]  # name -> slot -> record
    provenance: dict[str, Any]  # for the model card: commit, data sources, precision
    files: dict[str, str]  # name -> sha256


@dataclass(frozen=True)
class Fragment:
    """A flat piece of a slot: elements [start, start + len(values)) of the flattened tensor."""

    name: str
    slot: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


def fragment_key(name: str, slot: str, start: int) -> str:
    """The name of a fragment inside its safetensors file."""
    return f"{name}:{slot}:{start}"


def dtype_of(record: SlotRecord) -> torch.dtype:
    """The dtype of a slot that `index_problem` has accepted."""
    dtype = getattr(torch, record["dtype"])
    assert isinstance(dtype, torch.dtype), "checked when the index was read"
    return dtype


def index_digest(index: Mapping[str, Any]) -> str:
    """sha256 of an index as canonical JSON, without its own digest."""
    content = {key: value for key, value in index.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_of(index: Mapping[str, Any]) -> str:
    """The digest of a checkpoint: that in its index, or for one of an earlier version, which has none, the index's."""
    return index.get("digest") or index_digest(index)


def index_text(index: Mapping[str, Any]) -> str:
    """index.json of this content, as it is written."""
    return json.dumps(index, indent=1)


def index_problem(index: Any) -> str | None:
    """The first thing that is wrong with the content of an index.json, or None."""
    if not isinstance(index, dict) or not isinstance(index.get("format"), int):
        return "damaged: not an index"
    if index["format"] not in (FORMAT, FORMAT_WITHOUT_DIGEST):
        return f"format {index['format']}; this version reads formats {FORMAT_WITHOUT_DIGEST} and {FORMAT}"
    if "digest" not in index and index["format"] != FORMAT_WITHOUT_DIGEST:
        return "damaged: its digest is missing"
    if "digest" in index and index["digest"] != index_digest(index):
        return "damaged: its digest is not that of its content"
    if missing := Index.__annotations__.keys() - index.keys() - {"digest"}:
        return f"damaged: {', '.join(sorted(missing))} missing"
    return next(_content_problems(index), None)


def _content_problems(index: dict[str, Any]) -> Iterator[str]:
    for key in ("counters", "config", "identity", "data_state", "provenance", "parameters", "files"):
        if not isinstance(index[key], dict):
            yield f"damaged: {key} is not a mapping"
            return
    for key in ("step", "world_size"):
        if not _is_count(index[key]):
            yield f"damaged: {key} is {index[key]!r}"
    if index["counters"].get("step", index["step"]) != index["step"]:
        yield f"damaged: step is {index['step']}, but the counters say {index['counters']['step']}"
    groups = index["optimizer_groups"]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        yield "damaged: optimizer_groups is not a list of mappings"
    generators = sorted(name for name in index["files"] if name.startswith("rng-"))
    if generators != [f"rng-{rank:05d}.safetensors" for rank in range(len(generators))]:
        yield f"damaged: the files of the random generators are {', '.join(generators)}"
    if len(generators) != index["world_size"]:
        yield f"damaged: random generators of {len(generators)} ranks, but world_size is {index['world_size']!r}"
    for name, digest in index["files"].items():
        if not _FILE_NAME.fullmatch(name):
            yield f"damaged: {name!r} is not a file of a checkpoint"
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            yield f"damaged: the sha256 of {name} is {digest!r}"
    for name, slots in index["parameters"].items():
        if not isinstance(slots, dict) or "weight" not in slots:
            yield f"damaged: the weight of {name} is missing"
            continue
        for slot, record in slots.items():
            if problem := slot_problem(record, index["files"]):
                yield f"damaged: {slot} of {name}: {problem}"


def slot_problem(record: Any, files: Mapping[str, str]) -> str | None:
    """What is wrong with one slot: its fragments must lie in `files` and cover it exactly once."""
    try:
        shape, dtype, fragments = record["shape"], record["dtype"], record["fragments"]
        if not all(map(_is_count, shape)) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            return f"shape {shape!r} or dtype {dtype!r} is not one of a tensor"
        end = 0
        for fragment in fragments:
            start, length = fragment["start"], fragment["length"]
            if fragment["file"] not in files:
                return f"{fragment['file']!r} is not a file of this checkpoint"
            if not _is_count(length) or start != end:
                return f"its fragments overlap or leave a gap at element {end}"
            end += length
    except (TypeError, KeyError) as error:
        return f"its record cannot be read ({type(error).__name__}: {error})"
    if end != prod(shape):
        return f"its fragments cover {end} of {prod(shape)} elements"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
