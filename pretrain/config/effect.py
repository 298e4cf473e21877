"""Options that have no effect because of another section; within one section see `Section.ineffective`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def without_effect(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys that have no effect, dotted, each with the reason; a whole section by its name.

    Args:
        sections: validated sections by name. What needs a section that is absent is not examined.
    """
    return {
        **_of_validation(sections),
        **_of_lengths(sections),
        **_of_documents(sections),
        **_of_optimizer(sections),
        **_of_guards(sections),
        **_past_the_end(sections),
    }


def _of_validation(sections: Mapping[str, Any]) -> dict[str, str]:
    data = sections.get("data")
    if data is None or data.validation_fraction > 0:
        return {}
    why = "data.validation_fraction is 0, so there is no validation split"
    keys = {"validation": "validation", "telemetry.activation_sequences": "telemetry"}
    return {key: why for key, section in keys.items() if section in sections}


def _of_lengths(sections: Mapping[str, Any]) -> dict[str, str]:
    """Chunks of the loss that are not smaller than what is computed in one pass."""
    model, train, data, validation = (sections.get(name) for name in ("model", "train", "data", "validation"))
    if not model or not train or train.loss_chunk_tokens is None:
        return {}
    sequences = train.micro_batch_sequences
    if data and data.validation_fraction > 0 and validation:
        sequences = max(sequences, validation.batch_sequences or 0)
    tokens = sequences * (train.sequence_length or model.context_length)
    if train.loss_chunk_tokens < tokens:
        return {}
    return {"train.loss_chunk_tokens": f"no forward pass has more than {tokens} tokens"}


def _of_documents(sections: Mapping[str, Any]) -> dict[str, str]:
    data = sections.get("data")
    if data is None or "train" not in sections or data.document_mask or data.reset_positions:
        return {}
    return {"train.document_attention": "neither data.document_mask nor data.reset_positions is set"}


def _of_optimizer(sections: Mapping[str, Any]) -> dict[str, str]:
    model, engine, optimizer = (sections.get(name) for name in ("model", "engine", "optimizer"))
    found = {}
    if optimizer and model and model.tie_embeddings and model.architecture == "llama":
        found["optimizer.adamw.head_lr"] = "with model.tie_embeddings the head is the input embedding"
    if optimizer and engine and optimizer.name == "adamw":
        key = "divide_matrices" if engine.kind == "plain" else "wire_dtype"
        found[f"engine.{key}"] = "with optimizer.name adamw no matrix is sent"
    return found


def _of_guards(sections: Mapping[str, Any]) -> dict[str, str]:
    engine = sections.get("engine")
    if not engine or "guards" not in sections or not engine.shards_weights:
        return {}
    sharded = "engine.kind fsdp2" if engine.kind == "fsdp2" else "engine.zero_stage 3"
    return {"guards.compare_weights_every_steps": f"with {sharded} every weight is on one rank only"}


def _past_the_end(sections: Mapping[str, Any]) -> dict[str, str]:
    """Steps that the run never reaches."""
    train, telemetry = sections.get("train"), sections.get("telemetry")
    if not train or not telemetry:
        return {}
    steps = train.total_tokens // train.global_batch_tokens
    if telemetry.reference_step <= steps:
        return {}
    return {"telemetry.reference_step": f"the run ends at step {steps}, before step {telemetry.reference_step}"}
