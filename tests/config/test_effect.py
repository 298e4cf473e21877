"""Options that have no effect are rejected where a person gives them, and left out where a program writes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import ConfigError, load_config, parse_config, parse_stored_config
from tests.conftest import TINY, merged

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
ZERO = {"engine.kind": "deepspeed"}
FSDP2 = {"engine.kind": "fsdp2"}
WATCHED = {"telemetry.every_steps": 10}

# What is given -> the key that has no effect. The run has 40 steps, micro-batches of 6 x 32 tokens, tied embeddings.
WITHOUT_EFFECT: dict[str, tuple[dict[str, Any], str]] = {
    "wsd without decay": ({"schedule.decay_fraction": 0, "schedule.final_fraction": 0.1}, "schedule.final_fraction"),
    "wsd that decays to 1": ({"schedule.final_fraction": 1, "schedule.decay_fraction": 0.2}, "schedule.decay_fraction"),
    "chunk as large as the micro-batch": ({"train.loss_chunk_tokens": 192}, "train.loss_chunk_tokens"),
    "chunk as large as the validation batch": (
        {"train.loss_chunk_tokens": 256, "validation.batch_sequences": 8},
        "train.loss_chunk_tokens",
    ),
    "reference step past the end": (WATCHED | {"telemetry.reference_step": 41}, "telemetry.reference_step"),
    "attention within documents without masks": (
        {"train.document_attention": "dense"},
        "train.document_attention",
    ),
    "no telemetry": ({"telemetry.reference_step": 4}, "telemetry.reference_step"),
    "no validation split": ({"data.validation_fraction": 0, "validation.every_steps": 5}, "validation.every_steps"),
    "activations without validation text": (
        WATCHED | {"data.validation_fraction": 0, "telemetry.activation_sequences": 4},
        "telemetry.activation_sequences",
    ),
    "head of its own without one": ({"optimizer.adamw.head_lr": 0.1}, "optimizer.adamw.head_lr"),
    "wire dtype without matrices": (
        ZERO | {"optimizer": {"name": "adamw"}, "engine.wire_dtype": "fp32"},
        "engine.wire_dtype",
    ),
    "gather bucket of stage 0": (
        ZERO | {"engine.zero_stage": 0, "engine.gather_bucket_elements": 100},
        "engine.gather_bucket_elements",
    ),
    "buckets of FSDP2": (FSDP2 | {"engine.reduce_bucket_elements": 100}, "engine.reduce_bucket_elements"),
    "stage of FSDP2": (FSDP2 | {"engine.zero_stage": 3}, "engine.zero_stage"),
    "replicas under ZeRO": (ZERO | {"engine.shard_ranks": 2}, "engine.shard_ranks"),
    "weights compared where each is on one rank": (
        FSDP2 | {"guards.compare_weights_every_steps": 5},
        "guards.compare_weights_every_steps",
    ),
    "reduce bucket of stage 0": (
        ZERO | {"engine.zero_stage": 0, "engine.reduce_bucket_elements": 100},
        "engine.reduce_bucket_elements",
    ),
}
# Neighbours of these that do have an effect.
WITH_EFFECT: dict[str, dict[str, Any]] = {
    "wsd that decays": {"schedule.decay_fraction": 0.1, "schedule.final_fraction": 0.1},
    "wsd without decay": {"schedule.decay_fraction": 0},
    "smaller chunk": {"train.loss_chunk_tokens": 191},
    "chunk of a larger validation batch": {"train.loss_chunk_tokens": 256, "validation.batch_sequences": 9},
    "dense masks": {"train.document_attention": "dense", "data.document_mask": True},
    "dense masks for positions": {"train.document_attention": "dense", "data.reset_positions": True},
    "last step as reference": WATCHED | {"telemetry.reference_step": 40},
    "kept beyond the end": {"checkpoint.keep_every_steps": 15_000, "checkpoint.save_every_steps": 10},
    "validation only at the end": {"validation.every_steps": 1000},
    "head of its own": {"model.tie_embeddings": False, "optimizer.adamw.head_lr": 0.1},
    "replicas": FSDP2 | {"engine.shard_ranks": 2, "engine.reshard_after_forward": False},
    "reduce bucket of stage 2": ZERO | {"engine.zero_stage": 2, "engine.reduce_bucket_elements": 100},
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(name: str) -> None:
    changes, key = WITHOUT_EFFECT[name]
    with pytest.raises(ConfigError) as caught:
        parse_config(merged(TINY, changes))
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key}: has no effect: ")
    assert problem.endswith("; remove it")


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_without_it_the_dump_leaves_it_out_and_an_older_dump_with_it_is_read(name: str) -> None:
    changes, key = WITHOUT_EFFECT[name]
    config = parse_config(merged(TINY, {path: value for path, value in changes.items() if path != key}))
    section: Any = config.resolved()
    for part in key.split(".")[:-1]:
        section = section.get(part, {})
    assert section.get(key.rpartition(".")[2]) is None
    assert parse_config(config.resolved()) == config
    stored = parse_stored_config(merged(TINY, changes))
    assert parse_config(stored.resolved()) == config


@pytest.mark.parametrize("name", WITH_EFFECT)
def test_an_option_with_effect_is_accepted(name: str) -> None:
    config = parse_config(merged(TINY, WITH_EFFECT[name]))
    assert parse_config(config.resolved()) == config


def test_a_stored_config_is_checked_in_all_other_respects() -> None:
    for changes in ({"model.num_heads": 5}, {"model.hiden_size": 3}, {"train.total_tokens": 5000}):
        with pytest.raises(ConfigError):
            parse_stored_config(merged(TINY, changes))


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"init": {"from": "", "take": "all"}}, "init.from"),
        ({"init": {"from": 3, "take": "all"}}, "init.from"),
        ({"init": {"form": "runs/a", "take": "all"}}, "init.form"),
        ({"engine": {"kind": 7, "zero_stage": 3}}, "engine.kind"),
        ({"engine": {"kind": "deepspeed", "zero_stage": 9, "reduce_bucket_elements": 100}}, "engine.zero_stage"),
        ({"samples": {"every_steps": "x", "temperature": 0.5}}, "samples.every_steps"),
        ({"wandb": {"mode": "on", "project": "a"}}, "wandb.mode"),
        ({"watch": {"hang_seconds": "x", "slow_seconds": 1.0}}, "watch.hang_seconds"),
        ({"guards": {"on_loss_spike": "ignor", "max_rollbacks": 2}}, "guards.on_loss_spike"),
        ({"model": {**TINY["model"], "architecture": "speedrn", "embedding_dtype": "bf16"}}, "model.architecture"),
    ],
)
def test_no_problem_of_other_keys_comes_from_the_default_of_one_at_fault(section: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**TINY, **section})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key}: ")


@pytest.mark.parametrize("override", ["optimizer=", "train=", "train=null", "validation=", "optimizer.adamw="])
def test_an_empty_override_does_not_reset_a_section(override: str) -> None:
    with pytest.raises(ConfigError, match="would reset the whole section") as caught:
        load_config(QUICKSTART, [override])
    assert caught.value.problems[0].startswith(override.partition("=")[0] + ": ")


@pytest.mark.parametrize("override", ["train.grad_clip=", "optimizer.row_blocks={}", "train.grad_clip=null"])
def test_an_empty_value_of_a_single_key_is_a_value(override: str) -> None:
    assert load_config(QUICKSTART, [override]) != load_config(QUICKSTART, ["optimizer.lr=0.5"])
    grad_clip = load_config(QUICKSTART, [override]).train.grad_clip
    assert grad_clip is None or override.startswith("optimizer")


def test_a_section_is_reset_in_so_many_words() -> None:
    assert load_config(QUICKSTART).telemetry.every_steps is not None
    assert load_config(QUICKSTART, ["telemetry={}"]).telemetry.every_steps is None


def test_a_section_left_empty_in_a_file_has_its_defaults() -> None:
    data = copy.deepcopy(TINY) | {"validation": None}
    assert parse_config(data) == parse_config(TINY)
