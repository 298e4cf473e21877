"""What a new run takes over by `init`: found, compared with the config, and recorded as its ancestry.

A run reads its ancestor only until it has a checkpoint of its own. From then on it knows it by the record in its
manifest, so the ancestor may be moved or deleted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypeAlias, TypedDict

import torch

from optimizers import Aurora
from pretrain.checkpoint.format import INDEX, TELEMETRY_SLOT, digest_of
from pretrain.checkpoint.store import CheckpointReader, folder_name, list_checkpoints, newest_intact
from pretrain.config import Config, ConfigError, parse_stored_config
from pretrain.config.init import InitConfig
from pretrain.export.weights import HuggingFaceWeights, is_hugging_face, model_problems
from pretrain.files import exists
from pretrain.launch.branching import continuation_notes, continuation_problems
from pretrain.model.build import build_model
from pretrain.processes.errors import UserError
from pretrain.run.folder import RunError, RunFolder
from pretrain.run.identity import Identity

MODEL_KEYS = (
    *("architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
    *("tie_embeddings", "norm_eps", "rope_theta", "context_length"),
)
"""The keys of the section `model` that say which function the weights are; the others initialise or store them."""


class AncestorRecord(TypedDict):
    """One ancestor of a run, in its manifest and its checkpoints. JSON-serialisable."""

    take: str
    path: str
    """As `init.from` gives it."""
    folder: str
    """Absolute path of the checkpoint, or of the Hugging Face folder, that was read."""
    kind: str
    """``checkpoint`` or ``huggingface``."""
    sha256: str
    """Of a checkpoint's index, which holds the digests of its files; or of the config and the weights of a folder."""
    run: NotRequired[str]
    """`run.name` of a checkpoint."""
    step: NotRequired[int]
    tokens: NotRequired[int]


Weights: TypeAlias = CheckpointReader | HuggingFaceWeights
"""A reader of weights by the names of our parameters."""


@dataclass(frozen=True)
class Ancestor:
    """What `init.from` names, opened.

    Attributes:
        weights: its weights.
        record: for the manifest.
        earlier: the ancestors of that one, nearest first.
    """

    weights: Weights
    record: AncestorRecord
    earlier: Sequence[AncestorRecord] = ()


def find_ancestor(init: InitConfig, run_folder: Path, recorded: AncestorRecord | None = None) -> Ancestor | None:
    """Open what `init.from` names; None if it names nothing.

    Args:
        init: the section.
        run_folder: of the new run, which cannot be its own ancestor.
        recorded: what an earlier launch of the new run took over; of a run, the same checkpoint is opened again.

    Raises:
        ConfigError: there is nothing that can be taken over.
        CheckpointError, FolderError: it is damaged.
    """
    if init.source is None:
        return None
    path = Path(init.source)
    if not exists(path):
        raise ConfigError([f"init.from: {path}: no such folder"])
    if path.resolve().is_relative_to(run_folder.resolve()):
        raise ConfigError(
            [f"init.from: {path} belongs to this run itself: choose another run.name for the new run, or remove init"]
        )
    if (path / INDEX).exists():
        return _of_checkpoint(init, CheckpointReader(path))
    if RunFolder(path).checkpoints.is_dir():
        return _of_checkpoint(init, _checkpoint_of(path, recorded))
    if not is_hugging_face(path):
        raise ConfigError(
            [
                f"init.from: {path}: expected a run folder, a checkpoint or a Hugging Face folder; it holds neither "
                f"checkpoints nor {INDEX} nor config.json"
            ]
        )
    if init.take != "weights":
        raise ConfigError([f"init.take: expected weights, the only thing that {path} holds, got {init.take}"])
    weights = HuggingFaceWeights(path)
    record = AncestorRecord(
        take=init.take,
        path=init.source,
        folder=str(path.resolve()),
        kind="huggingface",
        sha256=weights.sha256(),
    )
    return Ancestor(weights, record)


def _checkpoint_of(run: Path, recorded: AncestorRecord | None) -> CheckpointReader:
    """The newest intact checkpoint of a run, or the one that an earlier launch has read."""
    folder = RunFolder(run).checkpoints
    if recorded is not None and "step" in recorded:
        return CheckpointReader(folder / folder_name(recorded["step"]))
    newest, damaged = newest_intact(folder)
    if newest is None:
        raise ConfigError([*damaged, f"init.from: {run}: the run has no intact checkpoint"])
    return newest


def _of_checkpoint(init: InitConfig, reader: CheckpointReader) -> Ancestor:
    index = reader.index
    record = AncestorRecord(
        take=init.take,
        path=str(init.source),
        folder=str(reader.folder.resolve()),
        kind="checkpoint",
        sha256=digest_of(index),
        run=str((index["config"].get("run") or {}).get("name")),
        step=index["step"],
        tokens=index["counters"].get("tokens", 0),
    )
    return Ancestor(reader, record, index["provenance"].get("ancestry", []))


def reopen(record: AncestorRecord) -> Weights:
    """Open what `find_ancestor` has found, on another rank."""
    folder = Path(record["folder"])
    return CheckpointReader(folder) if record["kind"] == "checkpoint" else HuggingFaceWeights(folder)


def check_ancestor(ancestor: Ancestor, config: Config, identity: Identity | None = None) -> list[str]:
    """Compare what is taken over with the config, and the files with their digests; return what is worth a warning.

    Args:
        ancestor: opened.
        config: of the new run.
        identity: of the new run; None: its inputs are not on this machine and are not compared.

    Raises:
        ConfigError: with every key that does not fit.
        CheckpointError: the checkpoint is damaged.
    """
    outline = build_model(config.model, config.run.seed, device="meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in outline.named_parameters()}
    if isinstance(ancestor.weights, HuggingFaceWeights):
        if problems := ancestor.weights.problems(config.model, shapes):
            raise ConfigError([f"init.from: {problem}" for problem in problems])
        return []
    reader = ancestor.weights
    try:
        saved = parse_stored_config(reader.index["config"])
        before = Identity.of_checkpoint(reader.index)
    except UserError as error:
        raise ConfigError([f"init.from: {reader.folder}: its config cannot be used: {error}"]) from None
    found = {key: getattr(saved.model, key) for key in MODEL_KEYS}
    problems = model_problems(found, config.model, reader.folder)
    if not problems and config.init.take != "weights":
        problems = _state_problems(reader, config, outline)
    notes = []
    if config.init.take == "all":
        problems += continuation_problems(saved, before, config, identity, reader.index["counters"].get("tokens", 0))
        notes = [] if problems else continuation_notes(saved, config, reader.index["counters"].get("tokens", 0))
    elif identity is not None and before.tokenizer != identity.tokenizer:
        notes.append(f"the weights of {reader.folder} were trained with another tokenizer than {config.tokenizer.path}")
    if problems:
        raise ConfigError([f"init.from: {problem}" for problem in problems])
    reader.verify()
    return notes


def _state_problems(reader: CheckpointReader, config: Config, outline: torch.nn.Module) -> list[str]:
    """The tensors of the optimizer's state that are not those that this optimizer keeps; one message for each kind."""
    optimizer = Aurora(config.optimizer.param_groups(outline))
    kinds: dict[tuple[str, str], list[str]] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            slots = reader.index["parameters"].get(name, {})
            saved = {
                slot: tuple(record["shape"]) for slot, record in slots.items() if slot not in ("weight", TELEMETRY_SLOT)
            }
            kept = {slot: tuple(values.shape) for slot, values in optimizer.state_of(parameter, group).items()}
            if saved and saved != kept:  # a parameter that was never stepped has none
                kinds.setdefault((_listed(saved, kept), _listed(kept, saved)), []).append(name)
    return [
        f"the optimizer state of {names[0]}{f' and {len(names) - 1} others' if len(names) > 1 else ''} is {saved} in "
        f"{reader.folder}, and {kept} with this config: set init.take=weights, or restore the keys of optimizer"
        for (saved, kept), names in kinds.items()
    ]


def _listed(slots: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]]) -> str:
    """The names of slots, with the shape where only that differs."""
    differing = slots.keys() == others.keys()
    return ", ".join(sorted(f"{slot} {list(slots[slot])}" if differing else slot for slot in slots))


def ancestry_of(config: Config, folder: RunFolder) -> tuple[AncestorRecord | None, list[AncestorRecord]]:
    """Return the record of a run's ancestor, from its manifest or from what `init.from` names, and all its ancestry.

    Raises:
        ConfigError, CheckpointError, FolderError, RunError: see `find_ancestor` and `RunFolder.manifest`.
    """
    init = config.init
    recorded: list[AncestorRecord] = (folder.manifest() or {}).get("ancestry") or []
    needed = AncestorRecord.__annotations__.keys() - {"run", "step", "tokens"}
    if not isinstance(recorded, list) or not all(isinstance(one, dict) and needed <= one.keys() for one in recorded):
        raise RunError(f"{folder.manifest_path}: damaged: its ancestry is not that of a run")
    if init.source is None:
        return None, recorded
    if recorded and recorded[0]["path"] == init.source:
        return recorded[0], recorded
    found = find_ancestor(init, folder.path, recorded[0] if recorded else None)
    if found is None:
        return None, recorded
    return found.record, [found.record, *found.earlier]


def preview_ancestor(config: Config, identity: Identity | None) -> list[str]:
    """Check what `init` names for a run that is not started now; return what is worth a warning.

    Once the run has checkpoints of its own, it reads no ancestor, and nothing is checked.

    Raises:
        ConfigError, CheckpointError, FolderError: see `find_ancestor` and `check_ancestor`.
    """
    folder = RunFolder(config.run_folder)
    if list_checkpoints(folder.checkpoints):
        return []
    ancestor = find_ancestor(config.init, folder.path)
    return [] if ancestor is None else check_ancestor(ancestor, config, identity)


def as_facts(records: Sequence[AncestorRecord]) -> dict[str, Any]:
    """Return what a manifest and a checkpoint hold of the ancestry; nothing for a run from initial weights."""
    return {"ancestry": list(records)} if records else {}
