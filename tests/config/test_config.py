"""The config reports every problem in one error, and reads what people write."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.cli import main
from pretrain.config import Config, ConfigError, load_config, parse_config
from pretrain.config.loader import read_yaml
from pretrain.config.overrides import apply_overrides

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"


def quickstart() -> dict[str, Any]:
    return copy.deepcopy(read_yaml(QUICKSTART))


def problems_of(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    return caught.value.problems


def with_value(path: str, value: Any) -> dict[str, Any]:
    data = quickstart()
    *parents, last = path.split(".")
    target: Any = data
    for key in parents:
        target = target[int(key)] if isinstance(target, list) else target.setdefault(key, {})
    target[last] = value
    return data


# What is broken -> what the message must say. Each is one mistake that a person makes.
BROKEN: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "misspelt key": ("model.hiden_size", 3, ("model.hiden_size", "did you mean hidden_size")),
    "misspelt section": ("optimiser", {}, ("optimiser", "did you mean optimizer")),
    "nested unknown key": ("optimizer.adamw.beta", 0.9, ("optimizer.adamw.beta", "did you mean betas")),
    "unknown key in a list": ("data.sources.0.pth", "x", ("data.sources.0.pth", "did you mean path")),
    "text for a number": ("train.total_tokens", "many", ("train.total_tokens", "'many'")),
    "negative": ("train.micro_batch_sequences", -1, ("train.micro_batch_sequences", "-1")),
    "fraction of a token": ("train.global_batch_tokens", 4096.5, ("train.global_batch_tokens", "4096.5")),
    "bool for a number": ("model.num_layers", True, ("model.num_layers",)),
    "heads do not divide": ("model.num_heads", 5, ("model.hidden_size", "num_heads (5)")),
    "kv heads do not divide": ("model.num_kv_heads", 3, ("model.num_kv_heads", "num_heads (4)")),
    "odd head size": ("model.num_heads", 256, ("num_heads", "even")),
    "batch does not divide": (
        "train.global_batch_tokens",
        1000,
        ("train.global_batch_tokens", "256", "1024"),
    ),
    "total does not divide": ("train.total_tokens", 5000, ("train.total_tokens", "4096", "8192")),
    "micro batch does not divide": ("train.micro_batch_sequences", 5, ("train.micro_batch_sequences", "16")),
    "sequence too long": ("train.sequence_length", 512, ("train.sequence_length", "context_length", "256")),
    "unknown optimizer": ("optimizer.name", "adamv", ("optimizer.name", "adamv", "aurora")),
    "unknown schedule": ("schedule.kind", "wds", ("schedule.kind", "wds")),
    "warm-up too long": ("schedule.warmup_tokens", 10**9, ("schedule.warmup_tokens",)),
    "fraction above 1": ("schedule.decay_fraction", 1.5, ("schedule.decay_fraction", "1.5")),
    "run name with a path": ("run.name", "../etc", ("run.name", "../etc")),
    "empty run name": ("run.name", "", ("run.name",)),
    "infinite rate": ("optimizer.lr", float("inf"), ("optimizer.lr",)),
    "no sources": ("data.sources", [], ("data.sources",)),
    "option without effect": ("optimizer.beta", 0.5, ("optimizer.beta",)),
    "unknown engine": ("engine.kind", "deep", ("engine.kind", "deep")),
    "section is a value": ("train", 3, ("train", "section")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_exits_2_with_a_message_and_no_traceback(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, value, expected = BROKEN[name]
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump(with_value(path, value)))
    assert main(["check", str(file)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert all(line.startswith("error: ") for line in error.strip().splitlines())
    for part in expected:
        assert part in error


def test_every_problem_is_reported_at_once() -> None:
    data = quickstart()
    for path in (
        "misspelt key",
        "text for a number",
        "unknown optimizer",
        "fraction above 1",
        "odd head size",
    ):
        key, value, _ = BROKEN[path]
        section, name = key.split(".", 1)
        data[section][name] = value
    del data["tokenizer"]
    text = "\n".join(problems_of(data))
    for part in (
        "model.hiden_size",
        "train.total_tokens",
        "optimizer.name",
        "schedule.decay_fraction",
        "even head size",
        "tokenizer: section is missing",
    ):
        assert part in text


def test_duplicate_keys_are_refused_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run:\n  name: a\n  seed: 1\n  name: b\nrun:\n  name: c\n")
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    assert sum("given twice" in problem for problem in caught.value.problems) == 2
    assert "lines 2 and 4" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e9", 1e9),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", 10),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("2026-11-22", "2026-11-22"),
        ("null", None),
        ("[1, 2e-1]", [1, 0.2]),
        ("trueish", "trueish"),
        ("1e", "1e"),
    ],
)
def test_yaml_1_2_scalars(text: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"key: {text}\n")
    read = read_yaml(file)["key"]
    assert read == value
    assert type(read) is type(value)


def test_overrides_take_precedence_and_reach_lists() -> None:
    data = quickstart()
    overrides = [
        "train.precision=fp32",
        "optimizer.adamw.lr=1e-2",
        "data.sources.1.split_units=2",
        "wandb.mode=offline",
    ]
    assert apply_overrides(data, overrides) == []
    config = parse_config(data)
    assert config.train.precision == "fp32"
    assert config.optimizer.adamw.lr == 1e-2
    assert config.data.sources[1].split_units == 2
    assert config.wandb.mode == "offline"


@pytest.mark.parametrize("override", ["train.precision", "=3", "train..x=1", "run.name.x=1", "data.sources.9.path=x"])
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0] or "section.key=value"):
        load_config(QUICKSTART, [override])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [1", b"- 1\n", b"", b"a: !!python/object:os.system {}"])
def test_a_file_that_is_no_config_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(file)


def test_a_missing_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_resolved_config_loads_back_to_the_same_config(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    file = tmp_path / "resolved.yaml"
    file.write_text(config.to_yaml())
    again = load_config(file)
    assert again == config
    assert again.resolved() == config.resolved()


def test_a_config_cannot_be_changed() -> None:
    config = parse_config(quickstart())
    with pytest.raises(ValueError, match="frozen"):
        config.train.total_tokens = 1  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    def undocumented(model: Any, prefix: str) -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                missing += undocumented(inner, f"{prefix}{name}.")
            elif not field.description:
                missing.append(f"{prefix}{name}")
        return missing

    assert undocumented(Config, "") == []


def test_a_fault_in_one_key_does_not_hide_faults_between_others() -> None:
    data = with_value("schedule.kind", "constant")
    data["schedule"]["warmup_tokens"] = -5
    text = "\n".join(problems_of(data))
    assert "schedule.warmup_tokens" in text
    assert "schedule.decay_fraction: has no effect" in text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schedule.kind", "cosine"),
        ("wandb.project", "mine"),
        ("data.validation_fraction", 0.0),
        ("samples.every_steps", None),
        ("optimizer.name", "adamw"),
    ],
)
def test_options_that_lost_their_effect_are_refused(path: str, value: Any) -> None:
    assert all("has no effect" in problem for problem in problems_of(with_value(path, value)))
