"""How often a run reads its text: refused, warned about and printed before the run starts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.config import Config, ConfigError, parse_config
from pretrain.data import load_tokenizer
from pretrain.data.budget import SourceBudget, budget_problems, budget_warnings, divide
from pretrain.data.mixture import Stage
from pretrain.data.quantity import Quantity
from pretrain.launch import check_inputs, train
from tests.conftest import REPOSITORY, TINY, merged

MakeConfig = Callable[..., Config]
TOKENS = 332_413  # of Moby Dick, with separators


def budget(tokens: float, available: Quantity, max_epochs: float = 4.0, ends: bool = False) -> SourceBudget:
    return SourceBudget("books", tokens, 1.0, available, max_epochs, ends)


def problems_of(one: SourceBudget) -> list[str]:
    return budget_problems([one], one.tokens)


def test_only_what_is_certainly_too_much_is_refused() -> None:
    config = parse_config(TINY)
    exact, estimated = Quantity(100_000), Quantity(100_000, 10_000)
    assert not problems_of(budget(400_000, exact))
    assert len(problems_of(budget(400_001, exact))) == 1
    assert not problems_of(budget(480_000, estimated))  # 4 times 120,000: two standard errors
    assert len(problems_of(budget(480_001, estimated))) == 1
    [warning] = budget_warnings(config, [budget(330_000, estimated)])
    assert "may be more than max_epochs" in warning
    assert not budget_warnings(config, [budget(310_000, estimated)])
    [problem] = problems_of(budget(1e9, estimated, max_epochs=2.5))
    for part in ("books", "about 100,000 +- 10.0 %", "1,000,000,000", "10,000 epochs", "2.5", "train.total_tokens"):
        assert part in problem


def test_what_is_allowed_but_hardly_meant_is_a_line_each() -> None:
    config = parse_config(TINY)
    [many] = budget_warnings(config, [budget(900_000, Quantity(100_000), max_epochs=50)])
    assert "9 times" in many
    [never] = budget_warnings(config, [budget(31, Quantity(100_000)), budget(1000, Quantity(1000))])
    assert "less than one sequence (32)" in never
    [tiny] = budget_warnings(config, [budget(3000, Quantity(3000))])
    assert "about 3,000 tokens, 3.9 steps" in tiny
    [nothing] = budget_warnings(config, [budget(0, Quantity(0)), budget(9e4, Quantity(9e4))])
    assert "no text was found" in nothing
    assert not budget_warnings(config, [budget(90_000, Quantity(90_000))])
    assert not any("\n" in line for line in (many, never, tiny, nothing))


def test_a_run_beyond_max_epochs_does_not_start(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = -(-5 * TOKENS // 768) * 768
    config = tiny_config({"train.total_tokens": tokens})
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.max_epochs: .*moby_dick.*5.* epochs"):
        train(config)
    assert not config.run_folder.exists()
    path = TINY["data"]["sources"][0]["path"]
    allowed = tiny_config({"train.total_tokens": tokens, "data.sources": [{"path": path, "max_epochs": 6}]})
    inputs = check_inputs(allowed, load_tokenizer(allowed.tokenizer))
    [one] = inputs.budgets
    assert one.epochs == pytest.approx(5 / 0.98, rel=0.05)
    assert any("reads it about 5" in line for line in inputs.warnings)


def test_a_run_prints_its_epochs_and_warnings(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config({"model.vocab_size": 10_000})
    train(config, stop_at=1)
    shown = capsys.readouterr().out
    assert "\ndata      " in shown
    assert "data      moby_dick: about 3" in shown
    assert "about 0.09" in shown
    assert "warning: model.vocab_size: " in shown
    assert "1,808 of the 10,000 rows of the embedding are never used" in shown


def stage(*shares: float, until: int | None = None) -> Stage:
    return Stage(tuple(Fraction(str(share)) for share in shares), until)


@pytest.mark.parametrize(
    ("stages", "total", "most", "expected"),
    [
        ([stage(3, 1)], 1000, [inf, inf], [750, 250]),
        ([stage(3, 1, until=400), stage(0, 1)], 1000, [inf, inf], [300, 700]),
        ([stage(3, 1, until=4000), stage(0, 1)], 1000, [inf, inf], [750, 250]),  # the run ends in the first stage
        ([stage(3, 1)], 1000, [300, inf], [300, 700]),  # the first ends at 400, the second has all from then on
        ([stage(2, 1, 1)], 1000, [200, 300, inf], [200, 300, 500]),
        ([stage(1, 0, until=500), stage(0, 1)], 1000, [100, inf], [100, 900]),  # the stage is left early
        ([stage(1, 1)], 1000, [100, 200], [100, 200]),  # all end
        ([stage(1, 1)], 1000, [0, inf], [0, 1000]),
    ],
)
def test_tokens_are_divided_as_the_stream_does(
    stages: list[Stage], total: float, most: list[float], expected: list[float]
) -> None:
    assert divide(stages, total, most) == pytest.approx(expected)


def two_sources(tiny_config: MakeConfig, **data: Any) -> Config:
    corpus = REPOSITORY / "assets/corpus"
    sources = [
        {"path": str(corpus / "moby_dick.parquet"), "name": "whale", "max_epochs": 2},
        {"path": str(corpus / "austen.parquet")},
    ]
    tokens = {"train.total_tokens": 1000 * 768}
    return tiny_config({"data.sources": sources, **tokens, **{f"data.{key}": value for key, value in data.items()}})


def test_shares_are_those_of_the_mixture(tiny_config: MakeConfig) -> None:
    config = two_sources(tiny_config, mixture={"whale": 3, "austen": 1})
    whale, austen = check_inputs(config, load_tokenizer(config.tokenizer)).budgets
    assert (whale.name, austen.name) == ("whale", "austen")
    assert (whale.tokens, austen.tokens) == (576_000, 192_000)
    assert whale.epochs == pytest.approx(576_000 / TOKENS / 0.98, rel=0.05)
    stages = [{"mixture": {"whale": 1}, "until_tokens": 76_800}, {"mixture": {"austen": 1}}]
    config = two_sources(tiny_config, stages=stages)
    whale, austen = check_inputs(config, load_tokenizer(config.tokenizer)).budgets
    assert (whale.tokens, austen.tokens) == (76_800, 691_200)


def test_a_source_that_ends_early_is_no_error(tiny_config: MakeConfig) -> None:
    mixture = {"whale": 9, "austen": 1}
    config = two_sources(tiny_config, mixture=mixture)
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.max_epochs: whale holds"):
        check_inputs(config, load_tokenizer(config.tokenizer))
    config = two_sources(tiny_config, mixture=mixture, past_max_epochs="end_source")
    inputs = check_inputs(config, load_tokenizer(config.tokenizer))
    whale, austen = inputs.budgets
    assert whale.epochs == pytest.approx(2)
    assert whale.tokens + austen.tokens == pytest.approx(768_000)
    assert any(line.startswith("whale: ends after 2 epochs") for line in inputs.warnings)
    alone = config.model_copy(update={"train": config.train.model_copy(update={"total_tokens": 768 * 10_000})})
    with pytest.raises(ConfigError, match=r"train\.total_tokens: the sources give at most"):
        check_inputs(alone, load_tokenizer(config.tokenizer))


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(changes: dict[str, Any]) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text(parse_config(merged(TINY, {"run.root": str(tmp_path / "runs"), **changes})).to_yaml())
        return file

    return write


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([768, 1536], None),
        ([768, 3040], None),
        ([768, 3041], r"data\.stages\.1\.until_tokens: stage 2 never begins, since stage 1 ends at 3,072 .* at 3,072"),
        (
            [4000, 5000],
            r"data\.stages\.0\.until_tokens: stages 1 to 2 never begin, since stage 0 ends at 4,000 .* 3,072",
        ),
    ],
)
def test_a_stage_that_never_begins_is_a_warning(
    ends: list[int],
    expected: str | None,
    config_file: Callable[[dict[str, Any]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not an error: the run may be extended later."""
    stages = [{"mixture": {"moby_dick": 1}, "until_tokens": until} for until in [*ends, None]]
    data = {"data.stages": stages, "train.total_tokens": 4 * 768, "schedule": {"kind": "constant"}}
    assert main(["check", str(config_file(data))]) == 0
    shown = capsys.readouterr().out
    assert re.search(expected, shown) if expected else "never begin" not in shown


def test_inspect_shows_each_source(
    config_file: Callable[[dict[str, Any]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["the whale\x1b[31m\u202e", "", "the sea", "the sea"] * 3
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    moby_dick = TINY["data"]["sources"][0]
    odd = {"path": str(tmp_path / "odd.jsonl"), "licence": "CC0", "max_epochs": None}
    file = config_file({"data.sources": [moby_dick, odd], "data.lanes": 2})
    assert main(["data", "inspect", str(file), "--json"]) == 0
    book, small = json.loads(capsys.readouterr().out)["sources"]
    assert book["documents"] == {"value": 156, "standard_error": 0, "exact": True}
    assert book["tokens"] == {"value": TOKENS, "standard_error": 0, "exact": True}
    assert book["licences"] == ["CC0-1.0"]
    assert book["run"]["epochs"] == pytest.approx(book["run"]["tokens"] / (0.98 * TOKENS))
    assert small["licences"] == ["CC0"]
    assert small["documents"]["value"] == 9
    assert small["sample"]["empty"] == 0.25
    assert small["sample"]["repeated"] == pytest.approx(7 / 9)
    assert main(["data", "inspect", str(file), "data.lanes=1"]) == 0
    shown = capsys.readouterr().out
    assert "332,413" in shown
    assert "the whale\\x1b[31m\\u202e" in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_inspect_of_data_that_does_not_exist_is_bad_input(
    config_file: Callable[[dict[str, Any]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file({"data.sources": [{"path": str(tmp_path / "nothing")}]})
    assert main(["data", "inspect", str(file)]) == 2
    assert "no such file or folder" in capsys.readouterr().err
