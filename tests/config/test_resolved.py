"""What the program writes it reads: every resolved config parses again, to an equal config."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import Config, ConfigError, load_config, parse_config, parse_stored_config
from pretrain.config.engine import EngineConfig
from pretrain.config.evaluation import EvaluationConfig
from pretrain.config.loader import read_yaml
from pretrain.config.overrides import assign
from pretrain.config.reference import config_schema
from pretrain.config.yaml_text import dump_yaml, parse_yaml
from pretrain.sweep import is_sweep_file, load_sweep

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "configs").rglob("*.yaml"))
OTHERS = ("data", "eval", "facts")  # folders of files that are not run configs
RUNS = {path.stem: path for path in FILES if not is_sweep_file(path) and path.parent.name not in OTHERS}
SWEEPS = [path for path in FILES if is_sweep_file(path)]
SCHEMA = config_schema()

# Keys whose values have to fit others are drawn from values that often do.
FITTING: dict[str, list[Any]] = {
    "train.total_tokens": [2**k for k in range(15, 35)],
    "train.global_batch_tokens": [2**k for k in range(12, 20)],
    "train.micro_batch_sequences": [1, 2, 4, 8],
    "train.sequence_length": [None, 64, 256],
    "train.loss_chunk_tokens": [None, 64, 4096, 10**6],
    "model.num_heads": [1, 2, 4],
    "model.num_kv_heads": [1, 2, 4],
    "model.hidden_size": [256, 512],
    "model.context_length": [256, 1024],
    "telemetry.reference_step": [1, 10, 500, 10**6],
    "checkpoint.keep_every_steps": [None, 50, 1000, 10**6],
    "checkpoint.mirror": [None, "s3://bucket/runs", "file:///mnt/a b"],
    "schedule.warmup_tokens": [0, 4096],
    "schedule.decay_fraction": [0, 0.0, 0.5, 1],
    "schedule.decay_start_tokens": [None, 4096, 8192, 20480],
    "schedule.final_fraction": [0, 0.1, 1],
    "data.validation_fraction": [0, 0.0, 0.5],
    "data.sources.0.name": [None, "web"],
    "data.sources.0.where": [None, "language == 'en' and score >= 3", "no is null"],
    "data.mixture": [None, {"corpus": 1}, {"sotu": 1, "moby_dick": 0.3, "austen": 1e-9}],
    "data.stages": [
        None,
        [{"mixture": {"corpus": 0.5}, "until_tokens": 4096}, {"mixture": {"corpus": 1}}],
        [{"mixture": {"sotu": 1}, "until_tokens": 1e6}, {"mixture": {"moby_dick": 0.3, "austen": 1, "sotu": 0}}],
    ],
    "optimizer.row_blocks": [{}, {r"q_proj\.weight": 2, "k": [1, 2]}],
    "optimizer.heads": [0, 1],
    "run.name": ["1e5", "0_1", ".5", "true", "a.b-C"],
    "watch.webhook": [None, "env:_HOOK", "file:~/a b/é: #"],
}
# Keys that cannot change alone in the quickstart: they act with other settings only, or have to fit others.
NEVER_ALONE = {
    *(f"engine.{key}" for key in EngineConfig.model_fields if key != "kind"),
    *(f"optimizer.{key}" for key in ("beta", "beta2", "cautious", "normuon_target", "outer_steps")),
    *("optimizer.riemannian", "optimizer.running_norms"),
    *("model.architecture", "model.context_length", "model.embedding_dtype", "model.num_heads"),
    *("data.cache_dir", "data.cache_gib", "data.lock", "data.mirror"),
    *(f"evaluation.{key}" for key in EvaluationConfig.model_fields),  # needs steps at which the run saves
    *(
        "guards.max_rollbacks",
        "optimizer.adamw.head_lr",
        "init.take",
        "schedule.decay_start_tokens",
        "schedule.kind",
        "train.document_attention",
        "wandb.project",
    ),
}
# Text that other readers of YAML take for something else.
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.sampled_from(
        ["1e5", "1_000", "010", "1:30", "no", "null", "~", "true", ".5", "-", "2026-11-22", "[a]", "#", "é"]
    ),
)


def leaf_schemas(definition: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, of in definition["properties"].items():
        reference = of.get("$ref") or of.get("items", {}).get("$ref", "")
        inner = SCHEMA["$defs"].get(reference.rpartition("/")[2])
        if inner is None:
            yield prefix + name, of
        else:
            yield from leaf_schemas(inner, f"{prefix}{name}.{'0.' if 'items' in of else ''}")


def values(of: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a key's JSON schema."""
    if "anyOf" in of:
        return st.one_of([values(member) for member in of["anyOf"]])
    if "enum" in of or "const" in of:
        return st.sampled_from(of.get("enum") or [of["const"]])
    low, above = of.get("minimum"), of.get("exclusiveMinimum")
    high, below = of.get("maximum"), of.get("exclusiveMaximum")
    match of["type"]:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(low if low is not None else (above or 0) + 1, high or 1000)
        case "number":
            top = next((bound for bound in (high, below) if bound is not None), 1e6)
            bottom = low if low is not None else above or 0.0
            return st.floats(bottom, top, exclude_min=low is None, exclude_max=below is not None, allow_subnormal=False)
        case "string":
            return TEXT
        case "array" if "prefixItems" in of:
            return st.tuples(*([st.floats(0, 1, exclude_max=True)] * len(of["prefixItems"]))).map(list)
        case "array":
            return st.lists(values(of["items"]), min_size=of.get("minItems", 0), max_size=3)
        case "object":
            return st.dictionaries(st.sampled_from(["q_proj", r"\.1\.", "1e5"]), values(of["additionalProperties"]))
        case other:
            raise AssertionError(f"the schema has a type that this test does not draw: {other}")


CHANGES = {path: st.sampled_from(FITTING[path]) if path in FITTING else values(of) for path, of in leaf_schemas(SCHEMA)}


def at(data: Any, path: str) -> Any:
    """The value at a dotted path; None if there is none."""
    for key in path.split("."):
        data = data[int(key)] if isinstance(data, list) else (data or {}).get(key)
    return data


def corrected(base: dict[str, Any], data: dict[str, Any]) -> Config:
    """The config in `data` once it follows the messages: options without effect are removed.

    A section with another fault becomes that of `base`, and if that is not enough, so does everything.
    """
    for attempt in range(8):
        try:
            return parse_config(data)
        except ConfigError as error:
            for problem in error.problems:
                *parents, last = problem.partition(":")[0].split(".")
                if "has no effect" in problem:
                    at(data, ".".join(parents)).pop(last, None)
                elif attempt < 3:
                    data[parents[0]] = copy.deepcopy(base.get(parents[0], {}))
                else:
                    data = copy.deepcopy(base)
    raise AssertionError(f"not accepted after 8 corrections: {data}")


def assert_round_trip(config: Config) -> None:
    assert parse_config(config.resolved()) == config
    assert parse_stored_config(config.resolved()) == config
    read, duplicates = parse_yaml(config.to_yaml())
    assert duplicates == []
    assert parse_config(read) == config
    # PyYAML's own reader, as used by other programs, sees the same text.
    assert yaml.safe_load(config.to_yaml()).keys() == read.keys()


@pytest.mark.parametrize("name", RUNS)
@settings(max_examples=40)
@given(data=st.data())
def test_a_resolved_config_parses_to_an_equal_config(name: str, data: st.DataObject) -> None:
    base = read_yaml(RUNS[name])
    changed = copy.deepcopy(base)
    paths = data.draw(st.lists(st.sampled_from(sorted(CHANGES)), max_size=12, unique=True))
    for path in paths:
        assert assign(changed, path, data.draw(CHANGES[path], label=path)) is None
    assert_round_trip(corrected(base, changed))


@pytest.mark.parametrize("path", sorted(CHANGES))
def test_every_key_survives_the_round_trip_alone(path: str) -> None:
    """Counts that the property above has something to lose: most changes are accepted and show in the config."""
    base = read_yaml(RUNS["quickstart"])

    @settings(max_examples=8)
    @given(value=CHANGES[path])
    def check(value: Any) -> None:
        changed = copy.deepcopy(base)
        assign(changed, path, value)
        try:
            config = parse_config(changed)
        except ConfigError:
            return
        assert_round_trip(config)
        accepted.append(at(config.resolved(), path) == at(parse_config(base).resolved(), path))

    accepted: list[bool] = []
    check()
    if path not in NEVER_ALONE:
        assert not all(accepted), f"no value of {path} changes the config"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_jobs_of_shipped_sweeps_parse_again(path: Path) -> None:
    sweep = load_sweep(path)
    configs = [sweep.config(cell, values) for cell in sweep.cells for values in cell.alternatives]
    assert configs
    for config in configs:
        assert parse_config(config.resolved()) == config


@pytest.mark.parametrize(
    "text",
    ["1e5", "1_000", "010", "1:30", "no", "~", "", "0x1F", ".5", "1e-3", "2026-11-22", "a\x85b", "\u2028"],
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse_yaml(dump_yaml({"key": [text]})) == ({"key": [text]}, [])


def test_a_run_called_like_a_number_can_be_resumed_from_its_config(tmp_path: Path) -> None:
    config = load_config(RUNS["quickstart"], ["run.name='1e5'"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config


def test_a_run_without_validation_data_leaves_a_config_that_is_read(tmp_path: Path) -> None:
    base = read_yaml(RUNS["quickstart"])
    del base["validation"]
    base["data"]["validation_fraction"] = 0
    config = parse_config(base)
    assert "validation" not in config.resolved()
    assert_round_trip(config)
