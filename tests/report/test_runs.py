"""What the report reads: run and sweep folders, their states, their arrays, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pretrain.report.arrays import LOG_BINS, histograms, survival
from pretrain.report.errors import ReportError
from pretrain.report.sweep import load
from pretrain.report.tables import tables
from pretrain.run.folder import RunError
from pretrain.run.reader import read_run
from tests.report.folders import BASELINE, LAUNCH, job, records, write_run, write_sweep

AXES = {"optimizer": ["muon", "aurora"], "seed": ["1"]}
JOBS = [job("muon-1", {"optimizer": "muon", "seed": "1"})]


def test_disturbed_runs(tmp_path: Path) -> None:
    def with_share(share: float, **changes: Any) -> list[str]:
        rows = [{**row, "cpu_seconds": share * row["step_seconds"]} for row in records(5)]
        return read_run(write_run(tmp_path / "run", rows, **changes)).disturbances

    assert with_share(0.95) == []
    assert with_share(0.5) == ["its thread had a core for 50 % of the time"]
    threads = {**LAUNCH, "hardware": {**LAUNCH["hardware"], "threads": 2}}
    assert with_share(0.5, launches=[threads]) == []  # says nothing about several threads
    assert with_share(0.95, launches=[LAUNCH, LAUNCH]) == ["2 launches"]
    old = [{"step": 1, "loss": 1.0}]
    assert read_run(write_run(tmp_path / "old", old)).disturbances == []


def test_the_exit_codes_that_a_sweep_keeps_tell_failed_runs(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, AXES, JOBS)
    assert load(folder).jobs[0].run.state == "pending"
    (folder / "jobs").mkdir()
    (folder / "jobs" / "muon-1.exit").write_text("2\n")
    assert load(folder).jobs[0].run.state == "failed"


def test_jobs_may_wait_for_the_runs_that_choose_their_values(tmp_path: Path) -> None:
    """No trial is chosen yet; the other seeds have no run. The axis of the seeds may also be absent."""
    axes = {"optimizer": ["muon"], "seed": ["1", "2"]}
    trials = [
        job(f"muon-{lr}", {"optimizer": "muon", "seed": "1"}, {"optimizer.lr": lr}, chosen=False) for lr in (0.1, 0.2)
    ]
    write_run(tmp_path / "muon-0.1", records(3))
    waiting = {"run": None, "labels": {"optimizer": "muon", "seed": "2"}, "tuned": {}, "chosen": True}
    sweep = load(write_sweep(tmp_path, axes, [*trials, waiting]))
    assert [(one.run.state, one.is_waiting) for one in sweep.jobs] == [
        ("done", False),
        ("pending", False),
        ("pending", True),
    ]
    assert [(series.name, list(series.jobs)) for series in sweep.series] == [("muon", ["2"])]
    rows = tables(sweep)
    assert [row["run"] for row in rows["jobs"]] == ["muon-0.1", "muon-0.2", None]
    assert [(row["chosen"], row["mean"] is None) for row in rows["tuned"]] == [(False, False), (False, True)]
    only_trials = load(write_sweep(tmp_path, {"optimizer": ["muon"]}, [{**waiting, "labels": {"optimizer": "muon"}}]))
    assert only_trials.seed_axis is None


def write_leverages(run: Path, step: int, rows: list[float], matrix: str = "layers.0.gate_proj") -> None:
    (run / "telemetry").mkdir(exist_ok=True)
    save_file(
        {f"{matrix}.leverage": np.array(rows, dtype=np.float32)}, run / "telemetry" / f"step-{step:08d}.safetensors"
    )


def test_survival_of_the_rows_dead_at_the_reference_step(tmp_path: Path) -> None:
    """Three rows are dead at step 450, the measurement before 500: one stays, one comes back, one comes and goes."""
    folder = write_run(tmp_path / "run", records(3))
    write_leverages(folder, 400, [0.01, 0.01, 0.01, 0.01])
    write_leverages(folder, 450, [0.01, 0.02, 0.03, 4.0])
    write_leverages(folder, 550, [0.01, 1.0, 2.0, 0.01])
    write_leverages(folder, 600, [0.01, 1.0, 0.01, 4.0])
    found = survival(read_run(folder))
    assert found is not None
    assert (found.reference, found.count) == (450, 3)
    np.testing.assert_allclose(found.still[0], [450, 550, 600])
    np.testing.assert_allclose(found.still[1], [1, 1 / 3, 2 / 3])
    np.testing.assert_allclose(found.throughout[1], [1, 1 / 3, 1 / 3])


def test_survival_starts_at_the_configs_reference_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(3), config={"telemetry": {"reference_step": 250}})
    for step in (200, 250, 300):
        write_leverages(folder, step, [0.01, 2.0])
    found = survival(read_run(folder))
    assert found is not None
    assert found.reference == 250


def test_survival_is_undefined_without_a_later_measurement_or_dead_rows(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(3))
    assert survival(read_run(folder)) is None
    write_leverages(folder, 500, [0.01, 1.99])
    assert survival(read_run(folder)) is None
    write_leverages(folder, 550, [float("nan"), 1.0])  # not defined there
    assert survival(read_run(folder)) is None
    for rows in ([1.0, 1.0], [float("nan"), 1.0]):  # nothing dead; a square MLP, of which nothing is defined
        write_leverages(folder, 500, rows)
        write_leverages(folder, 550, rows)
        assert survival(read_run(folder)) is None


def test_histograms_hold_every_row(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(3))
    write_leverages(folder, 50, [0.0, 1e-9, 1.0, 500.0])
    found = histograms(read_run(folder))
    assert [(one.layer, one.steps) for one in found] == [(0, [50])]
    shares = found[0].shares[0]
    assert shares.sum() == pytest.approx(1.0)
    assert shares[0] == 0.5  # below the range
    assert shares[-1] == 0.25  # above it
    assert shares[np.searchsorted(LOG_BINS, 0.0)] + shares[np.searchsorted(LOG_BINS, 0.0) - 1] == 0.25


def test_damaged_arrays_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(3))
    (folder / "telemetry").mkdir()
    (folder / "telemetry" / "step-00000050.safetensors").write_bytes(b"half a file")
    with pytest.raises(ReportError, match=r"step-00000050\.safetensors: cannot be read"):
        histograms(read_run(folder))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"format": "other"}, ["expected format 'aurora-sweep' and version 1"]),
        ({"version": 2}, ["expected format 'aurora-sweep' and version 1"]),
        ({"axes": []}, ["axes is []"]),
        ({"baseline": {"optimizer": "sgd"}, "jobs": []}, ["baseline.optimizer is 'sgd'", "jobs is missing or empty"]),
        ({"baseline": ["muon"]}, ["baseline is ['muon']; expected a mapping"]),
        ({"jobs": [{"run": "x"}, 3]}, ["jobs[0]: expected a mapping with run and labels", "jobs[1]: expected"]),
        ({"jobs": [job("x", {"optimizer": "muon"})]}, ["jobs[0].labels is {'optimizer': 'muon'}; expected one label"]),
        ({"jobs": [{**JOBS[0], "tuned": [1]}]}, ["jobs[0].tuned is [1]; expected a mapping"]),
        ({"jobs": JOBS * 2}, ["two chosen jobs have the labels muon, 1"]),
        (
            {"claims": [{"claim": "x"}, 3]},
            ["'x': measure is None", "'x': where is None", "'x': exactly", "a claim is 3"],
        ),
        (
            {"claims": [{"claim": "x", "measure": "loss", "where": {"optimizer": "sgd"}, "above": 1}]},
            ["'x': where.optimizer is 'sgd'"],
        ),
    ],
)
def test_a_malformed_sweep_is_refused_with_every_problem(
    changes: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    folder = write_sweep(tmp_path, AXES, JOBS, **changes)
    with pytest.raises(ReportError) as caught:
        load(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(parts)
    for line, part in zip(lines, parts, strict=True):
        assert line.startswith(f"{folder / 'sweep.json'}: ")
        assert part in line


def test_what_is_no_run_and_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no such folder; expected a run or a sweep"):
        load(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="neither a run nor a sweep: it has no sweep"):
        load(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ReportError, match=r"sweep\.json: cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(("file", "text"), [("manifest.json", "{"), ("config.yaml", "a: ["), ("config.yaml", "- 1")])
def test_a_damaged_run_is_refused(file: str, text: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(3))
    (folder / file).write_text(text)
    with pytest.raises(RunError, match=file):
        load(folder)


def test_series_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    def names(axes: dict[str, list[str]], *labels: dict[str, str]) -> list[str]:
        jobs = [job(f"run-{i}", one) for i, one in enumerate(labels)]
        return [s.name for s in load(write_sweep(tmp_path, axes, jobs, baseline=None)).series]

    assert names({"optimizer": ["muon"], "seed": ["1", "2"]}, {"optimizer": "muon", "seed": "1"}) == ["muon"]
    two = {"optimizer": ["muon", "aurora"], "expansion": ["2", "4"], "nesterov": ["true"], "seed": ["1"]}
    aurora = {"optimizer": "aurora", "expansion": "4", "nesterov": "true", "seed": "1"}
    muon = {"optimizer": "muon", "expansion": "2", "nesterov": "true", "seed": "1"}
    assert names(two, aurora, muon) == ["muon · expansion 2", "aurora · expansion 4"]  # in the order of the labels
    assert names({"nesterov": ["true", "false"]}, {"nesterov": "true"}) == ["nesterov true"]


def test_the_baseline_of_a_series_has_its_other_labels(tmp_path: Path) -> None:
    axes = {"optimizer": ["muon", "aurora"], "expansion": ["2", "4"], "seed": ["1"]}
    jobs = [
        job(f"{o}-{e}", {"optimizer": o, "expansion": e, "seed": "1"}) for o in axes["optimizer"] for e in ("2", "4")
    ]
    sweep = load(write_sweep(tmp_path, axes, jobs, baseline=BASELINE))
    baselines = {series.name: sweep.baseline_of(series) for series in sweep.series}
    assert {name: other.name if other else None for name, other in baselines.items()} == {
        "muon · expansion 2": None,
        "muon · expansion 4": None,
        "aurora · expansion 2": "muon · expansion 2",
        "aurora · expansion 4": "muon · expansion 4",
    }
    assert json.loads((sweep.path / "sweep.json").read_text())["baseline"] == BASELINE
