"""A config may take sections from another file."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config import ConfigError, load_config, parse_config
from pretrain.config.loader import read_yaml
from tests.conftest import REPOSITORY, TINY

MIXTURES = sorted((REPOSITORY / "configs" / "data").glob("*.yaml"))


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(data))
    return path


def test_the_keys_of_the_including_file_take_precedence(tmp_path: Path) -> None:
    rest = {key: value for key, value in TINY.items() if key != "data"}
    write(tmp_path / "parts" / "data.yaml", {"data": {**TINY["data"], "seed": 3}, "schedule": {"kind": "cosine"}})
    path = write(tmp_path / "a.yaml", {**rest, "include": "parts/data.yaml", "data": {"lanes": 2}})
    config = load_config(path, ["data.seed=9"])
    assert (config.data.lanes, config.data.seed, config.schedule.kind) == (2, 9, "wsd")
    assert config.data.sources[0].path == TINY["data"]["sources"][0]["path"]
    assert "include" not in config.resolved()


@pytest.mark.parametrize(
    ("value", "message"),
    [("none.yaml", "none.yaml: no such config file"), (3, "expected the path"), ("a.yaml", "cannot include another")],
)
def test_what_cannot_be_included_is_named(tmp_path: Path, value: Any, message: str) -> None:
    path = write(tmp_path / "a.yaml", {"include": value})
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.stem)
def test_the_mixtures_are_pinned_and_state_their_licence(path: Path) -> None:
    base = read_yaml(REPOSITORY / "configs" / "aurora-1.1b.yaml")
    data = read_yaml(path)
    assert list(data) == ["data"]
    config = parse_config({**base, **data})
    for source in config.data.sources:
        assert source.licence
        assert re.search(r"^hf://datasets/[\w-]+/[\w.-]+@[0-9a-f]{40}/.*\*\.(jsonl\.zst|parquet)$", source.path)


def test_there_are_three_mixtures_and_the_stages_follow_the_schedule() -> None:
    assert len(MIXTURES) == 3
    config = load_config(REPOSITORY / "configs" / "aurora-1.1b.yaml")
    decay = config.schedule.decay_fraction * config.train.total_tokens
    assert config.data.stages is not None
    assert config.data.stages[0].until_tokens == round(config.train.total_tokens - decay)
