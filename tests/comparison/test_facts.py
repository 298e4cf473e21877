"""The file of published figures: every figure has a source, and what cannot be right is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.config import load_eval_config
from eval.suites import SUITES
from pretrain.cli.compared_models import models_of
from pretrain.comparison.errors import ComparisonError
from pretrain.comparison.facts import Facts, cited, read_facts
from pretrain.comparison.sizes import training_flops
from pretrain.config import load_config
from pretrain.model.cost import flops_per_token, parameter_count
from tests.comparison.files import MODELS, facts

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs/eval/paper.yaml"
FIGURES = {"value", "scores", "ratio", "vocab_size"}
FILE = REPOSITORY / "configs/eval/facts/paper.yaml"


def read(data: Any, folder: Path) -> Facts:
    file = folder / "facts.yaml"
    file.write_text(yaml.safe_dump(data, allow_unicode=True))
    return read_facts(file, MODELS)


def shipped() -> Facts:
    return read_facts(FILE, models_of(CONFIG))


def mappings(value: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield where, value
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from mappings(part, f"{where}.{key}")


def test_every_published_figure_of_ours_has_a_source() -> None:
    """Independent of how the file is validated: wherever a value, a score or a name stands, a known source stands."""
    data = yaml.safe_load(FILE.read_text())
    figures = [(where, part) for where, part in mappings(data) if FIGURES & set(part)]
    assert len(figures) > 30
    for where, part in figures:
        assert part.get("source") in data["sources"], where
    for name, source in data["sources"].items():
        assert source["text"].strip(), name
        assert source["read"], name


def test_the_facts_of_our_own_model_are_those_of_its_config() -> None:
    config = load_config(REPOSITORY / "configs/aurora-1.1b.yaml")
    ours = shipped().models["ours-1.1b"]
    assert ours.tokens is not None
    assert ours.shape is not None
    assert ours.tokens.value == config.train.total_tokens
    own, theirs = ours.shape.config().model_dump(), config.model.model_dump()
    sizes = {key for key in own if key.startswith("num_") or key.endswith("_size")} | {"tie_embeddings"}
    assert {key: own[key] for key in sizes} == {key: theirs[key] for key in sizes}
    flops = training_flops(ours)
    assert flops is not None
    assert flops.value == flops_per_token(config.model, 2048) * config.train.total_tokens


def test_the_shapes_give_the_published_numbers_of_parameters() -> None:
    """As the model cards have them, in billions."""
    for label, total in (("qwen3-1.7b-base", 1.7), ("smollm2-1.7b", 1.7), ("llama-3.2-1b", 1.2), ("tinyllama-3t", 1.1)):
        shape = shipped().models[label].shape
        assert shape is not None
        assert parameter_count(shape.config())["total"] / 1e9 == pytest.approx(total, abs=0.05), label


def test_the_shipped_config_is_a_plain_one_and_every_model_has_facts() -> None:
    config = load_eval_config(CONFIG)
    assert config.choices() == list(SUITES["core"])
    assert {model.name for model in config.models} == set(shipped().models)


def test_the_sources_are_found_wherever_they_are_named(tmp_path: Path) -> None:
    found = dict(cited(read(facts(), tmp_path)))
    assert found["models.ours.tokens.source"] == "card"
    assert found["models.theirs.shape.source"] == "card"
    assert found["models.theirs.published.0.source"] == "card"
    assert found["by_data.0.source"] == "plot"
    assert found["by_tokens.0.points.3.source"] == "card"
    assert found["claims.0.source"] == "card"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models__ours__published__0__source": ...}, "models.ours.published.0.source: required, but missing"),
        ({"models__ours__published__0__source": " "}, "models.ours.published.0.source: expected some text"),
        ({"models__ours__published__0__source": None}, "models.ours.published.0.source"),
        ({"models__ours__published__0__source": "crad"}, "'crad' is not one of the sources; did you mean card?"),
        ({"models__ours__tokens__source": ...}, "models.ours.tokens.source: required"),
        ({"models__theirs__licence__source": ...}, "models.theirs.licence.source: required"),
        ({"models__theirs__shape__source": ...}, "models.theirs.shape.source: required"),
        ({"by_data__0__source": ...}, "by_data.0.source: required"),
        ({"by_tokens__0__points__1__source": ...}, "by_tokens.0.points.1.source: required"),
        ({"by_tokens__0__points__1__source": "x"}, "by_tokens.0.points.1.source: 'x' is not one of"),
        ({"claims__0__source": ...}, "claims.0.source: required"),
        ({"sources__card__text": ""}, "sources.card.text: expected some text"),
        ({"sources__card__read": "yesterday"}, "sources.card.read"),
        ({"sources__card__url": "javascript:alert(1)"}, "sources.card.url: expected an http"),
        ({"sources__card__url": "https://user:pass@example.org/"}, "sources.card.url: expected an http"),
        ({"sources__card__url": "https://example.org/?token=abc"}, "sources.card.url: expected an http"),
        ({"sources__more": {"text": "x", "read": "2026-01-01"}}, "sources.more: no figure comes from it"),
        ({"models__ours__published__0__value": 67.6}, "models.ours.published.0.value"),
        ({"models__ours__published__0__value": float("nan")}, "models.ours.published.0.value"),
        ({"models__ours__published__0__shots": -1}, "models.ours.published.0.shots"),
        ({"models__ours__published__0__metrik": "acc"}, "metrik: unknown key; did you mean metric?"),
        (
            {"models__tokens": {"optimizer": "x", "tokkens": 1}},
            "models.tokens.tokkens: unknown key; did you mean tokens?",
        ),
        ({"models__ours__tokens__value": 0}, "models.ours.tokens.value"),
        ({"models__ours__tokens": ...}, "claims.0.subject: the token count of 'ours'"),
        ({"claims__0__reference": "third"}, "claims.0.reference: the token count of 'third'"),
        ({"models__tirhd": {"optimizer": "x"}}, "models.tirhd: no model of the config has this label; did you mean"),
        ({"models__theirs__shape__num_heads": 5}, "models.theirs.shape.num_heads: 5 does not divide hidden_size"),
        ({"by_data__0__scores": {}}, "by_data.0.scores"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ComparisonError) as error:
        read(facts(**changes), tmp_path)
    assert message in str(error.value)
    assert all(line.startswith(f"{tmp_path / 'facts.yaml'}: ") for line in str(error.value).splitlines())
    assert "pass@" not in str(error.value)
    assert "abc" not in str(error.value)


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError) as error:
        read(facts(by_data__0__source="x", claims__0__source="y", models__other={"optimizer": "z"}), tmp_path)
    assert len(str(error.value).splitlines()) == 4  # and the plot is no longer used


@pytest.mark.parametrize("text", ["- a\n- b\n", "models: [1]\n", "a: [\n", "", "models:\n  ours: 1\n"])
def test_other_files_are_refused_in_one_line_each(text: str, tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    if text:
        with pytest.raises(ComparisonError, match=r"f\.yaml"):
            read_facts(file, MODELS)
    else:
        with pytest.raises(ComparisonError):
            read_facts(file, MODELS)
