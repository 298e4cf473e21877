"""Verdicts: one number per seed, its interval, and on which side of the threshold they lie."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pretrain.report.sweep import load
from pretrain.report.verdicts import Verdict, evaluate
from tests.report.folders import CONFIG, LAUNCH, job, write_run, write_sweep

OPTIMIZERS = ["muon", "aurora"]


def rows(
    values: Mapping[int, float | None], key: str = "validation_loss", seconds: float = 1.0
) -> list[dict[str, Any]]:
    """Steps 1 to the last of `values`, with `key` at those."""
    found = []
    for step in range(1, max(values) + 1):
        row: dict[str, Any] = {"step": step, "tokens": 10 * step, "loss": 1.0, "train_seconds": seconds * step}
        found.append({**row, key: values[step]} if step in values else row)
    return found


def sweep_of(
    root: Path,
    losses: Mapping[str, Sequence[float | None]],
    claim: Mapping[str, Any],
    *,
    key: str = "validation_loss",
    seconds: Mapping[str, float] | None = None,
    unfinished: Sequence[str] = (),
    launches: Mapping[str, list[dict[str, Any]]] | None = None,
) -> Verdict:
    """The verdict on `claim` over runs named optimizer-seed of 4 steps, with the given numbers at the last."""
    count = max(map(len, losses.values()))
    jobs = []
    for name, values in losses.items():
        for seed, value in enumerate(values, start=1):
            run = f"{name}-{seed}"
            write_run(
                root / run,
                rows({2: 9.0, 4: value}, key, (seconds or {}).get(name, 1.0)),
                finished=run not in unfinished,
                launches=(launches or {}).get(run, [LAUNCH]),
            )
            jobs.append(job(run, {"optimizer": name, "seed": str(seed)}))
    axes = {"optimizer": list(losses), "seed": [str(seed) for seed in range(1, count + 1)]}
    folder = write_sweep(root, axes, jobs, claims=[{"claim": "it is so", "measure": key, **claim}])
    return evaluate(load(folder))[0]


def muon(values: Sequence[float | None], root: Path, **claim: Any) -> Verdict:
    return sweep_of(root, {"muon": values}, {"where": {"optimizer": "muon"}, **claim})


def test_holds_if_every_seed_and_the_interval_are_on_the_right_side(tmp_path: Path) -> None:
    found = muon([4.0, 4.1, 4.2], tmp_path, below=5.0)
    assert (found.judgement.outcome, found.judgement.note) == ("holds", "")
    assert found.numbers == {"1": 4.0, "2": 4.1, "3": 4.2}
    assert found.judgement.interval is not None
    assert found.judgement.interval.mean == pytest.approx(4.1)
    assert found.judgement.interval.half_width == pytest.approx(0.2484138, abs=1e-6)
    assert found.scale == "4.2M parameters without embeddings, 40 tokens, step 4 of 500"


def test_every_seed_right_but_the_interval_crossing_is_undecided(tmp_path: Path) -> None:
    found = muon([4.0, 4.1, 4.2], tmp_path, below=4.3)  # interval to 4.348
    assert found.judgement.outcome == "undecided"
    assert found.judgement.note == "every seed lies on the right side, but the interval crosses the threshold"


def test_a_seed_on_the_threshold_is_not_on_the_right_side(tmp_path: Path) -> None:
    found = muon([4.0, 3.9, 3.95], tmp_path, below=4.0)
    assert (found.judgement.outcome, found.judgement.note) == (
        "undecided",
        "the seeds or the interval lie on both sides",
    )


def test_one_seed_wrong_is_undecided(tmp_path: Path) -> None:
    found = muon([4.0, 4.1, 4.4], tmp_path, below=4.3)
    assert (found.judgement.outcome, found.judgement.note) == (
        "undecided",
        "the seeds or the interval lie on both sides",
    )


def test_everything_on_the_other_side_is_contradicted(tmp_path: Path) -> None:
    found = muon([4.0, 4.1, 4.2], tmp_path, above=5.0)
    assert found.judgement.outcome == "does not hold"
    assert found.judgement.note.startswith("contradicted")


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    found = muon([4.0], tmp_path, below=5.0)
    assert found.judgement.outcome == "undecided"
    assert found.judgement.note == "one seed gives no interval; a verdict needs at least 3"
    assert found.numbers == {"1": 4.0}


def test_no_value_is_not_a_test(tmp_path: Path) -> None:
    found = muon([4.0, 4.1], tmp_path, below=5.0, measure="telemetry/absent")
    assert found.judgement.outcome == "not tested"
    assert (
        found.judgement.note
        == "no seed has a value; seed 1: muon-1 has no telemetry/absent; seed 2: muon-2 has no telemetry/absent"
    )


def test_unfinished_runs_do_not_count_and_are_named(tmp_path: Path) -> None:
    found = sweep_of(
        tmp_path, {"muon": [4.0, 4.1, 1.0, 4.2]}, {"where": {"optimizer": "muon"}, "below": 5.0}, unfinished=["muon-3"]
    )
    assert found.judgement.outcome == "holds"
    assert found.judgement.note in {
        f"provisional: some seeds are missing; seed 3: muon is {state}" for state in ("running", "stopped")
    }
    assert found.numbers["3"] is None


def test_a_loss_that_is_not_finite_counts_against_the_claim(tmp_path: Path) -> None:
    """An earlier finite value must not stand in for it, nor may the seed just be dropped."""
    found = muon([4.0, 4.1, None, 4.2], tmp_path, below=5.0)
    assert found.numbers["3"] is None
    assert found.judgement.outcome == "undecided"
    assert found.judgement.note == (
        "a seed has no value because its loss was not finite; seed 3: muon-3 validation_loss not finite at step 4"
    )


def test_telemetry_that_was_not_defined_falls_back_to_the_measurement_before(tmp_path: Path) -> None:
    found = sweep_of(
        tmp_path, {"muon": [0.3, None]}, {"where": {"optimizer": "muon"}, "above": 0.1}, key="telemetry/starved"
    )
    assert found.numbers == {"1": 0.3, "2": 9.0}


def test_a_step_takes_the_last_value_at_or_before_it(tmp_path: Path) -> None:
    assert muon([4.0, 4.1], tmp_path / "a", below=5.0, step=3).numbers == {"1": 9.0, "2": 9.0}
    assert muon([4.0, 4.1], tmp_path / "b", below=5.0, step=4).numbers == {"1": 4.0, "2": 4.1}
    too_far = muon([4.0, 4.1], tmp_path / "c", below=5.0, step=5)
    assert too_far.judgement.outcome == "not tested"
    assert "muon-1 ends at step 4" in too_far.judgement.note


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """The series overlap, the pairs do not."""
    claim = {"where": {"optimizer": "aurora"}, "minus": {"optimizer": "muon"}, "below": 0}
    found = sweep_of(tmp_path, {"muon": [4.0, 5.0, 6.0], "aurora": [3.9, 4.88, 5.9]}, claim)
    assert list(found.numbers.values()) == pytest.approx([-0.1, -0.12, -0.1])
    assert found.judgement.outcome == "holds"


def test_ratios_are_paired_by_seed(tmp_path: Path) -> None:
    claim = {"where": {"optimizer": "aurora"}, "over": {"optimizer": "muon"}, "below": 0.99}
    found = sweep_of(tmp_path / "a", {"muon": [4.0, 5.0, 2.0], "aurora": [3.6, 4.51, 1.81]}, claim)
    assert list(found.numbers.values()) == pytest.approx([0.9, 0.902, 0.905])
    assert found.judgement.outcome == "holds"
    zero = sweep_of(tmp_path / "b", {"muon": [0.0, 5.0], "aurora": [3.6, 4.51]}, claim)
    assert "muon-1 has validation_loss 0, so the ratio is undefined" in zero.judgement.note


def test_disturbed_runs_do_not_count_for_claims_on_times(tmp_path: Path) -> None:
    claim = {"where": {"optimizer": "aurora"}, "over": {"optimizer": "muon"}, "below": 1.1, "measure": "train_seconds"}
    losses = {"muon": [4.0] * 3, "aurora": [4.0] * 3}
    found = sweep_of(
        tmp_path, losses, claim, seconds={"muon": 1.0, "aurora": 1.05}, launches={"muon-3": [LAUNCH, LAUNCH]}
    )
    assert found.numbers == {"1": pytest.approx(1.05), "2": pytest.approx(1.05), "3": None}
    assert "seed 3: muon-3 has no usable timings: 2 launches" in found.judgement.note


def test_equal_time_interpolates_the_slower_run(tmp_path: Path) -> None:
    """Muon ends after 4 s; Aurora, at 2 s a step, is then at step 2 of 4, with 9.0; at 1.6 s between 9 and its end."""
    claim = {"where": {"optimizer": "aurora"}, "minus": {"optimizer": "muon"}, "at": "equal_time", "below": 0}
    losses = {"muon": [4.0, 4.0], "aurora": [3.0, 3.2]}
    at_two = sweep_of(tmp_path / "a", losses, claim, seconds={"muon": 1.0, "aurora": 2.0})
    assert list(at_two.numbers.values()) == pytest.approx([5.0, 5.0])
    between = sweep_of(tmp_path / "b", losses, claim, seconds={"muon": 1.2, "aurora": 1.6})
    # 4.8 s: half-way from 3.2 s (9.0) to 6.4 s (3.0 and 3.2).
    assert list(between.numbers.values()) == pytest.approx([6.0 - 4.0, 6.1 - 4.0])
    faster = sweep_of(tmp_path / "c", losses, claim, seconds={"muon": 2.0, "aurora": 1.0})
    assert list(faster.numbers.values()) == pytest.approx([3.0 - 9.0, 3.2 - 9.0])


def test_equal_time_does_not_extrapolate_nor_use_disturbed_runs(tmp_path: Path) -> None:
    claim = {"where": {"optimizer": "aurora"}, "minus": {"optimizer": "muon"}, "at": "equal_time", "below": 0}
    losses = {"muon": [4.0, 4.0, 4.0], "aurora": [3.0, 3.1, 3.0]}
    early = sweep_of(tmp_path / "a", losses, claim, seconds={"muon": 1.0, "aurora": 9.0})
    assert early.judgement.outcome == "not tested"
    assert "aurora-1 has no validation_loss around 4 s of training" in early.judgement.note
    losses = {"muon": [4.0, 4.0, 4.0, 4.0], "aurora": [3.0, 3.1, 3.0, 3.05]}
    disturbed = sweep_of(tmp_path / "b", losses, claim, launches={"aurora-2": [LAUNCH, LAUNCH]})
    assert disturbed.numbers["2"] is None
    assert "seed 2: aurora-2 has no usable timings: 2 launches" in disturbed.judgement.note
    assert disturbed.judgement.outcome == "holds"
    assert disturbed.judgement.note.startswith("provisional")


def width_sweep(root: Path, gains: Mapping[str, Sequence[float]], claim: Mapping[str, Any]) -> Verdict:
    """Muon at 5.0 and Aurora better by `gains` (one per seed) at each expansion."""
    jobs = []
    for expansion, per_seed in gains.items():
        for seed, gain in enumerate(per_seed, start=1):
            for name, loss in (("muon", 5.0), ("aurora", 5.0 - gain)):
                run = f"{name}-{expansion}-{seed}"
                model = {**CONFIG["model"], "intermediate_size": 256 * int(expansion)}
                write_run(root / run, rows({4: loss}), config={"model": model})
                jobs.append(job(run, {"optimizer": name, "expansion": expansion, "seed": str(seed)}))
    seeds = [str(seed) for seed in range(1, 1 + max(map(len, gains.values())))]
    axes = {"optimizer": OPTIMIZERS, "expansion": list(gains), "seed": seeds}
    full = {"claim": "grows", "measure": "validation_loss", **claim}
    return evaluate(load(write_sweep(root, axes, jobs, claims=[full])))[0]


def test_slope_of_a_difference_per_seed(tmp_path: Path) -> None:
    claim = {"where": {"optimizer": "aurora"}, "minus": {"optimizer": "muon"}, "slope_over": "expansion", "below": 0}
    found = width_sweep(tmp_path, {"2": [0.1, 0.1, 0.1], "4": [0.2, 0.21, 0.2], "8": [0.3, 0.3, 0.32]}, claim)
    assert list(found.numbers.values()) == pytest.approx([-0.1, -0.1, -0.11])
    assert found.judgement.outcome == "holds"
    assert found.scale.startswith("2.62M to 7.34M parameters")


def test_slope_of_a_series_without_difference(tmp_path: Path) -> None:
    claim = {"where": {"optimizer": "muon"}, "slope_over": "expansion", "above": 0}
    found = width_sweep(tmp_path, {"2": [0.1, 0.1], "4": [0.2, 0.2]}, claim)
    assert list(found.numbers.values()) == [0.0, 0.0]
    assert found.judgement.outcome == "undecided"


def test_a_slope_needs_every_label(tmp_path: Path) -> None:
    claim = {"where": {"optimizer": "aurora"}, "slope_over": "expansion", "below": 0}
    found = width_sweep(tmp_path, {"2": [0.1, 0.1], "4": [0.2], "8": [0.3, 0.3]}, claim)
    assert found.numbers["2"] is None
    assert found.judgement.outcome == "undecided"
    assert "seed 2: aurora · expansion 4 has no chosen run" in found.judgement.note


def test_two_seeds_decide_nothing_however_clear(tmp_path: Path) -> None:
    """Neither for the claim nor against it."""
    for name, threshold in (("a", {"below": 5.0}), ("b", {"above": 5.0})):
        found = muon([4.0, 4.0001], tmp_path / name, **threshold)
        assert (found.judgement.outcome, found.judgement.note) == (
            *("undecided", "only 2 seeds; a verdict needs at least 3"),
        )
    assert muon([4.0, 4.0001, 4.0002], tmp_path / "c", below=5.0).judgement.outcome == "holds"


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("side", ["above", "below"])
def test_seeds_that_agree_are_no_certainty(count: int, side: str, tmp_path: Path) -> None:
    """Also if they agree but for the rounding of a difference: here, one row in 4,096."""
    claim = {"where": {"optimizer": "aurora"}, "minus": {"optimizer": "muon"}, side: 0}
    rows = [0.1 * seed for seed in range(1, count + 1)]
    found = sweep_of(tmp_path, {"muon": rows, "aurora": [row - 1 / 4096 for row in rows]}, claim)
    assert found.judgement.outcome == "undecided"
    assert "all seeds have the same value, which says nothing about their spread" in found.judgement.note


def test_all_seeds_on_the_threshold(tmp_path: Path) -> None:
    found = muon([4.0] * 3, tmp_path, below=4.0)
    assert found.judgement.outcome == "undecided"
    assert found.judgement.note.endswith("they lie on the threshold")


def test_a_slope_through_a_point_that_is_true_by_construction_is_undecided(tmp_path: Path) -> None:
    claim = {"where": {"optimizer": "aurora"}, "minus": {"optimizer": "muon"}, "slope_over": "expansion", "below": 0}
    gains = {"1": [0.0, 0.0, 0.0], "2": [0.1, 0.11, 0.1], "4": [0.2, 0.21, 0.2], "8": [0.3, 0.3, 0.32]}
    found = width_sweep(tmp_path / "a", gains, claim)
    assert found.judgement.outcome == "undecided"
    assert found.reservations == [
        "at expansion 1 both series have the same value for every seed, which is true by construction or a limit of "
        "the measure; without it, the slope is -0.1017 ± 0.0190"
    ]
    # One seed that differs is a measurement.
    found = width_sweep(tmp_path / "b", {**gains, "1": [0.0, 0.0, 0.001]}, claim)
    assert (found.judgement.outcome, found.reservations) == ("holds", [])
    # The slope of one series compares nothing.
    alone = {"where": {"optimizer": "aurora"}, "slope_over": "expansion", "below": 0}
    assert width_sweep(tmp_path / "c", gains, alone).judgement.outcome == "holds"


def test_equal_series_are_true_by_construction(tmp_path: Path) -> None:
    claim = {"where": {"optimizer": "aurora"}, "over": {"optimizer": "muon"}, "below": 2}
    same = [4.0, 4.1, 4.2]
    found = sweep_of(tmp_path, {"muon": same, "aurora": same}, claim)
    assert found.judgement.outcome == "undecided"
    assert found.reservations == [
        "both series have the same value for every seed, which is true by construction or a limit of the measure"
    ]


def tuned_sweep(root: Path, tried: Mapping[str, Sequence[float]], chosen: Mapping[str, float]) -> Verdict:
    """Muon at 4.0 and Aurora at 3.9 with three seeds, at the chosen of the rates tried with the first seed."""
    jobs = []
    for name, loss in (("muon", 4.0), ("aurora", 3.9)):
        for rate in tried[name]:
            for seed in (1, 2, 3) if rate == chosen[name] else (1,):
                run = f"{name}-{rate}-{seed}"
                write_run(
                    root / run, rows({4: loss + 0.01 * seed * seed * (name == "muon") + abs(rate - chosen[name])})
                )
                labels = {"optimizer": name, "seed": str(seed)}
                jobs.append(job(run, labels, {"optimizer.lr": rate}, chosen=rate == chosen[name]))
    claim = {"claim": "better", "measure": "validation_loss", "where": {"optimizer": "aurora"}, "below": 0}
    axes = {"optimizer": OPTIMIZERS, "seed": ["1", "2", "3"]}
    return evaluate(load(write_sweep(root, axes, jobs, claims=[{**claim, "minus": {"optimizer": "muon"}}])))[0]


def test_a_rate_at_the_edge_of_its_grid_decides_nothing(tmp_path: Path) -> None:
    """Whichever of the two series it is of."""
    grid, inside = [0.01, 0.02, 0.04], {"muon": 0.02, "aurora": 0.02}
    both = {"muon": grid, "aurora": grid}
    assert tuned_sweep(tmp_path / "inside", both, inside).judgement.outcome == "holds"
    for number, (name, rate, side) in enumerate(
        [("muon", 0.01, "smallest"), ("aurora", 0.04, "largest"), ("aurora", 0.01, "smallest")]
    ):
        found = tuned_sweep(tmp_path / str(number), both, {**inside, name: rate})
        assert found.judgement.outcome == "undecided"
        assert found.judgement.note == f"optimizer.lr of {name}, {rate}, is the {side} value tried"
    # A single value is no grid.
    assert tuned_sweep(tmp_path / "one", {**both, "aurora": [0.02]}, inside).judgement.outcome == "holds"


def test_a_contradiction_needs_the_same(tmp_path: Path) -> None:
    found = tuned_sweep(tmp_path, {"muon": [0.01, 0.02], "aurora": [0.02]}, {"muon": 0.01, "aurora": 0.02})
    assert found.judgement.outcome == "undecided"
    claim = {"where": {"optimizer": "muon"}, "above": 5.0}
    missing = sweep_of(tmp_path / "m", {"muon": [4.0, 4.1, 4.2, 1.0]}, claim, unfinished=["muon-4"])
    assert missing.judgement.outcome == "does not hold"
    assert "provisional: some seeds are missing" in missing.judgement.note
