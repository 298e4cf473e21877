"""Export of a run, or of one of its checkpoints, as a Hugging Face folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.format import INDEX, CheckpointError, digest_of
from pretrain.checkpoint.store import CheckpointReader, newest_intact
from pretrain.config import Config, parse_stored_config
from pretrain.export.card import CardScore, ModelCard
from pretrain.export.folder import ExportError, export_folder
from pretrain.files import file_sha256
from pretrain.model.llama import llama_config
from pretrain.run.folder import TOKENIZER_FILE, RunFolder
from pretrain.run.provenance import as_table, datasets_of, source_records


def is_run_or_checkpoint(source: Path) -> bool:
    """Return whether `source` is a run folder or a checkpoint, and not a model folder or a name on the Hub."""
    return (source / INDEX).is_file() or (source / "checkpoints").is_dir()


def open_checkpoint(source: Path) -> CheckpointReader:
    """Open the checkpoint at `source`, or the newest intact one of the run at `source`, and verify its files.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    if (source / INDEX).is_file():
        reader = CheckpointReader(source)
        reader.verify()
        return reader
    newest, damaged = newest_intact(RunFolder(source).checkpoints)
    if newest is None:
        raise CheckpointError(
            "\n".join([*damaged, f"{source}: neither a checkpoint nor a run with an intact checkpoint"])
        )
    for message in damaged:
        warnings.warn(f"{message}; using {newest.folder.name}", stacklevel=2)
    return newest


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    licence: str | None = None,
    scores_of: Callable[[CheckpointReader], Sequence[CardScore]] = lambda reader: (),
) -> CheckpointReader:
    """Export a run or checkpoint as the Hugging Face folder `out`; return the checkpoint that was exported.

    Args:
        source: the folder of a run or a checkpoint.
        out: the folder to write.
        dtype: of the exported weights; None: that of the checkpoint.
        max_shard_size: of a weights file: bytes, or a string such as "5GB".
        licence: of the weights, for the model card; None: not stated.
        scores_of: returns the scores of a checkpoint, for the model card.

    Raises:
        CheckpointError: there is no intact checkpoint, or the run's tokenizer cannot be found.
        ExportError: the architecture has no Hugging Face equivalent, or `out` is not an earlier export.
    """
    reader = open_checkpoint(source)
    config = parse_stored_config(reader.index["config"])
    if config.model.architecture != "llama":
        raise ExportError(
            f"{reader.folder}: model.architecture is {config.model.architecture!r}, which has no equivalent in "
            "Hugging Face transformers: only 'llama' can be exported and evaluated"
        )
    tokenizer = _tokenizer_file(reader, config)
    export_folder(
        reader.weights(),
        llama_config(config.model),
        tokenizer,
        _model_card(reader, config, licence, scores_of(reader)),
        out,
        eos_token=config.tokenizer.eos_token,
        max_shard_size=max_shard_size,
        dtype=dtype,
    )
    return reader


def _tokenizer_file(reader: CheckpointReader, config: Config) -> Path:
    """Find the tokenizer that the run was trained with: the copy in the run folder, or else the config's path."""
    digest = reader.index["identity"]["tokenizer contents"]
    copies = [reader.folder.parents[1] / TOKENIZER_FILE, Path(config.tokenizer.path)]
    for path in copies:
        if path.is_file() and file_sha256(path) == digest:
            return path
    raise CheckpointError(
        f"{reader.folder}: the tokenizer of the run (sha256 {digest}) is neither at {copies[0]} nor at {copies[1]}"
    )


def _model_card(
    reader: CheckpointReader, config: Config, licence: str | None, scores: Sequence[CardScore]
) -> ModelCard:
    counters, provenance = reader.index["counters"], reader.index["provenance"]
    # A checkpoint of an older version does not hold them, but what they are made of.
    sources = provenance.get("sources") or source_records(config.data, provenance["data"], reader.index["data_state"])
    return ModelCard(
        run_name=config.run.name,
        step=counters["step"],
        tokens=counters["tokens"],
        train_loss=counters["train_loss"],
        validation_loss=counters["validation_loss"],
        bits_per_byte=counters["bits_per_byte"],
        data_sources=as_table(sources),
        datasets=datasets_of(sources),
        config_yaml=config.to_yaml(),
        git_commit=provenance["git_commit"],
        optimizer=config.optimizer.name,
        start=_start(provenance.get("ancestry", [])),
        licence=licence,
        hyperparameters=_hyperparameters(config),
        scores=scores,
        checkpoint_sha256=digest_of(reader.index),
    )


def _hyperparameters(config: Config) -> dict[str, object]:
    """The keys of the config that people ask for first; the whole config is in the card as well."""
    wanted = {
        "optimizer": ("name", "lr", "momentum", "weight_decay", "adamw.lr", "adamw.betas", "adamw.weight_decay"),
        "schedule": ("kind", "warmup_tokens", "decay_fraction", "decay_start_tokens", "final_fraction"),
        "train": ("total_tokens", "global_batch_tokens", "grad_clip", "precision"),
        "run": ("seed",),
    }
    values = config.keys_of("result", "numerics")
    keys = (f"{section}.{key}" for section, keys in wanted.items() for key in keys)
    found = {key: values[key] for key in keys if values.get(key) is not None}
    shown = {
        key: f"{value:,}" if isinstance(value, int) and key != "run.seed" else value for key, value in found.items()
    }
    return {**shown, "sequence length (tokens)": config.sequence_length}


def _start(ancestry: Sequence[Mapping[str, Any]]) -> str | None:
    """What the weights were at first: those of the nearest ancestor; its own are in its card."""
    if not ancestry:
        return None
    nearest = ancestry[0]
    if nearest["kind"] == "checkpoint":
        return f"the weights of run {nearest['run']} at step {nearest['step']:,}"
    return f"the weights of {Path(nearest['folder']).name}"
