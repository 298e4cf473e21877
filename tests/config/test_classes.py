"""Every key declares its class, and the class is the right one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import load_config
from pretrain.config.base import KeyClass, Section, class_of, leaves, section_in
from pretrain.config.schema import Config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

# What is not of class result, written out: a key that moves between classes changes what a resume accepts.
OTHERS = {
    "run.name": "note",
    "run.root": "execution",
    "run.deterministic": "numerics",
    "run.max_seconds": "execution",
    "run.stop_seconds": "execution",
    "run.lock_wait_seconds": "execution",
    "tokenizer.path": "result (contents)",
    "init.from": "result (contents)",
    "data.sources.path": "result (contents)",
    "data.sources.name": "note",
    "data.sources.licence": "note",
    "data.max_bad_rows": "execution",
    "data.max_document_mib": "execution",
    "data.max_zstd_window_mib": "execution",
    "data.retry_minutes": "execution",
    "data.workers": "execution",
    "data.lock": "execution",
    "data.mirror": "execution",
    "data.cache_dir": "execution",
    "data.cache_gib": "execution",
    "optimizer.polar_accuracy": "numerics",
    "optimizer.polar_dtype": "numerics",
    "optimizer.adamw.fused": "numerics",
    "train.total_tokens": "result (may be extended)",
    "train.micro_batch_sequences": "numerics",
    "train.precision": "numerics",
    "train.activation_checkpointing": "execution",
    "train.compile": "numerics",
    "train.document_attention": "numerics",
    "train.loss_chunk_tokens": "numerics",
    "train.max_skipped_steps": "execution",
    "train.peak_tflops": "execution",
    "wandb.project": "note",
}
WHOLE_SECTIONS = {
    "engine": "numerics",
    "validation": "execution",
    "samples": "execution",
    "evaluation": "execution",
    "telemetry": "execution",
    "guards": "execution",
    "checkpoint": "execution",
    "logging": "execution",
    "wandb": "execution",
    "watch": "execution",
}


def declared(section: type[Section], prefix: str = "") -> Iterator[tuple[str, KeyClass | None]]:
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        if inner is None:
            yield prefix + name, class_of(section, name)
        else:
            yield from declared(inner, f"{prefix}{name}.")


def test_every_key_declares_a_class() -> None:
    found = dict(declared(Config))
    assert len(found) > 80
    assert [path for path, of in found.items() if of is None] == []


def test_a_section_without_a_class_is_noticed() -> None:
    class Bare(Section):
        key: int = 1

    assert dict(declared(Bare)) == {"key": None}
    with pytest.raises(AssertionError, match="key declares no class"):
        list(leaves(Bare, {"key": 1}))


def test_the_classes_are_these() -> None:
    found = {path: str(of) for path, of in declared(Config)}
    expected = {path: OTHERS.get(path, WHOLE_SECTIONS.get(path.partition(".")[0], "result")) for path in found}
    assert found == expected
    assert OTHERS.keys() <= found.keys()


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("optimizer.lr=0.01", "result"),
        ("data.sources.1.split_units=2", "result"),
        ("data.mixture={sotu: 1, moby_dick: 2, austen: 3}", "result"),
        ("data.sources.1.max_epochs=2", "result"),
        ("data.past_max_epochs=end_source", "result"),
        ("tokenizer.path=elsewhere.json", "result"),
        ("train.total_tokens=4096000", "result"),
        ("train.precision=fp32", "numerics"),
        ("engine.kind=deepspeed", "numerics"),
        ("data.workers=2", "execution"),
        ("data.sources.0.licence=CC0", "note"),
    ],
)
def test_a_change_shows_in_the_keys_of_its_class_alone(override: str, kind: str) -> None:
    before, after = load_config(QUICKSTART), load_config(QUICKSTART, [override])
    kinds: tuple[Any, ...] = ("result", "numerics", "execution", "note")
    assert [k for k in kinds if before.keys_of(k) != after.keys_of(k)] == [kind]


def test_the_classes_divide_the_resolved_config() -> None:
    config = load_config(QUICKSTART)
    paths = [path for path, _, _ in leaves(Config, config.resolved())]
    by_class = [path for k in ("result", "numerics", "execution", "note") for path in config.keys_of(k)]  # type: ignore[arg-type]
    assert sorted(paths) == sorted(by_class)
    assert {"data.sources.2.path", "optimizer.adamw.betas", "optimizer.row_blocks", "samples.prompts"} <= set(paths)
