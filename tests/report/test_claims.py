"""Claims as written: what is refused, with which message, and how they are put into words."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.report.claims import ClaimError, check_claim, claim_problems, parse_claim
from pretrain.report.errors import ReportError

AXES = {"optimizer": ["muon", "aurora"], "expansion": ["2", "4", "8"], "seed": ["1", "2"]}
CLAIM: dict[str, Any] = {
    "claim": "Muon starves neurons",
    "measure": "telemetry/starved",
    "step": 500,
    "where": {"optimizer": "muon", "expansion": 4},
    "above": 0.25,
}


def changed(**changes: Any) -> dict[str, Any]:
    """The claim with some keys replaced; None removes one."""
    return {key: value for key, value in {**CLAIM, **changes}.items() if value is not None}


def test_a_claim_is_read_and_put_into_words() -> None:
    claim = parse_claim(CLAIM)
    assert claim.reading == "telemetry/starved at step 500: optimizer=muon, expansion=4"
    assert claim.criterion == "above 0.25"
    assert claim.where["expansion"] == "4"  # YAML reads a number, axes have text
    check_claim(claim, AXES, "seed")
    slope = parse_claim(
        changed(
            step=None, where={"optimizer": "aurora"}, minus={"optimizer": "muon"}, slope_over="expansion", source="x"
        )
    )
    assert slope.reading == (
        "telemetry/starved at the last step: optimizer=aurora minus optimizer=muon, paired by seed, "
        "slope per doubling of expansion"
    )
    assert (slope.step, slope.source) == (None, "x")
    check_claim(slope, AXES, "seed")
    assert (
        "at equal training time" in parse_claim(changed(step=None, at="equal_time", minus={"optimizer": "a"})).reading
    )
    assert parse_claim(changed(step="last")).step is None


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"claim": None}, ["claim is None; expected text"]),
        ({"measure": 3}, ["measure is 3; expected text"]),
        ({"mesure": "x"}, ["unknown key 'mesure'; did you mean measure?"]),
        ({"step": "first"}, ["step is 'first'; expected a step such as 500, or last"]),
        ({"step": True}, ["step is True"]),
        ({"step": 0}, ["step is 0"]),
        ({"at": "equal_tokens", "step": None, "minus": {"optimizer": "aurora"}}, ["at is 'equal_tokens'"]),
        ({"at": "equal_time", "minus": {"optimizer": "aurora"}}, ["step and at cannot be combined"]),
        (
            {"at": "equal_time", "step": None},
            ["equal_time compares two runs; name the other series under minus or over"],
        ),
        ({"above": None}, ["exactly one of above and below is needed, got neither"]),
        ({"below": 1}, ["exactly one of above and below is needed, got above and below"]),
        ({"above": "much"}, ["above is 'much'; expected a finite number"]),
        ({"above": float("nan")}, ["above is nan"]),
        ({"above": True}, ["above is True"]),
        ({"where": None}, ["where is None; expected a mapping"]),
        ({"where": ["muon"]}, ["where is ['muon']"]),
        ({"minus": {}}, ["minus is empty"]),
        ({"over": {}}, ["over is empty"]),
        ({"minus": {"optimizer": "a"}, "over": {"optimizer": "b"}}, ["minus and over cannot be combined"]),
        ({"minus": {"optimizer": None}}, ["minus is {'optimizer': None}"]),
        ({"slope_over": 3, "source": 4}, ["slope_over is 3", "source is 4"]),
        ({"measure": "", "where": 1, "above": None}, ["measure is ''", "where is 1", "exactly one"]),
    ],
)
def test_a_malformed_claim_is_refused_with_every_problem(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ClaimError) as caught:
        parse_claim(changed(**changes))
    lines = str(caught.value).splitlines()
    assert len(lines) == len(parts)
    for part in parts:
        assert any(part in line for line in lines)
    if "claim" not in changes:
        assert all(line.startswith("'Muon starves neurons': ") for line in lines)


def test_problems_as_a_list() -> None:
    assert claim_problems(CLAIM, AXES, "seed") == []
    assert len(claim_problems({"claim": "x"}, AXES, "seed")) == 3


def test_claims_on_speed_are_told_apart() -> None:
    """Disturbed runs do not count for them."""
    for measure, timing in (("train_seconds", True), ("tokens_per_second", True), ("validation_loss", False)):
        assert parse_claim(changed(measure=measure)).is_timing is timing


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(ReportError, match="a claim is 'Muon wins'; expected a mapping"):
        parse_claim("Muon wins")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"where": {"optimizer": "muon"}}, "where leaves the axis expansion open; choose one of 2, 4, 8"),
        ({"where": {}}, "where leaves the axis optimizer open"),
        ({"where": {"optimiser": "muon", "expansion": "4"}}, "where.optimiser: no such axis; did you mean optimizer?"),
        ({"where": {"optimizer": "sgd", "expansion": "4"}}, "where.optimizer is 'sgd'; expected one of muon, aurora"),
        ({"where": {**CLAIM["where"], "seed": "1"}}, "where.seed: a claim is about all seeds"),
        ({"minus": {"optimizer": "sgd"}}, "minus.optimizer is 'sgd'"),
        ({"minus": {"optimizer": "muon"}}, "minus is the same series as where"),
        ({"over": {"optimizer": "muon"}}, "over is the same series as where"),
        ({"over": {"optimizer": "sgd"}}, "over.optimizer is 'sgd'"),
        ({"slope_over": "expansion"}, "where.expansion and slope_over name the same axis"),
        (
            {"where": {"expansion": "4"}, "slope_over": "optimizer"},
            "label 'muon' of optimizer is not a positive number",
        ),
        ({"slope_over": "width"}, "slope_over is 'width': no such axis"),
        ({"slope_over": "seed"}, "slope_over is 'seed': no such axis"),
    ],
)
def test_a_claim_that_does_not_fit_the_axes_is_refused(changes: dict[str, Any], part: str) -> None:
    claim = changed(**changes)
    with pytest.raises(ClaimError) as caught:
        check_claim(parse_claim(claim), AXES, "seed")
    assert part in str(caught.value)
    assert claim_problems(claim, AXES, "seed") == str(caught.value).splitlines()


def test_a_slope_needs_two_labels() -> None:
    claim = parse_claim(changed(where={}, slope_over="expansion"))
    with pytest.raises(ClaimError, match="expansion has one label"):
        check_claim(claim, {"expansion": ["4"]}, None)


def test_claims_are_checked_without_loading_numpy_or_torch() -> None:
    code = (
        "import sys, pretrain.report.claims; print([m for m in ('numpy', 'torch', 'matplotlib') if m in sys.modules])"
    )
    repository = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    assert done.stdout.strip() == "[]"
