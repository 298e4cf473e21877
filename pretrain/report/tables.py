"""The tables of a report, as stored in report.json and shown on the page."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

from pretrain.report.errors import ReportError
from pretrain.report.schema import (
    SCHEMA_VERSION,
    ClaimResult,
    FinalRow,
    JobRow,
    Provenance,
    ReportResult,
    SampleRow,
    Summary,
    TimingRow,
)
from pretrain.report.seeds import intervals_cover, varied_keys
from pretrain.report.statistics import mean_interval
from pretrain.report.sweep import Job, Series, Sweep
from pretrain.report.tuning import ends, tuned_rows
from pretrain.report.verdicts import Verdict, evaluate
from pretrain.run.reader import Run, is_number

LOSS = "validation_loss"
PHASES = ("data", "forward_backward", "optimizer")


def tables(sweep: Sweep) -> ReportResult:
    """Return all the numbers on the page."""
    varied = varied_keys(sweep)
    found: ReportResult = {
        "schema_version": SCHEMA_VERSION,
        "kind": sweep.kind,
        "name": sweep.name,
        "title": sweep.title,
        "question": sweep.question,
        "source": sweep.source,
        "overrides": sweep.overrides,
        "jobs": [_job_row(sweep, job) for job in sweep.jobs],
        "provenance": _provenance([job.run for job in sweep.jobs]),
        "claims": [_claim_row(verdict) for verdict in evaluate(sweep)],
        "varied_keys": varied,
        "intervals_cover": intervals_cover(varied),
        "final": [_final_row(sweep, series) for series in sweep.series],
        "tuned": [row for series in sweep.series for row in tuned_rows(sweep, series)],
        "timing": [_timing_row(series) for series in sweep.series],
    }
    if sweep.kind == "run" and (samples := _samples(sweep.jobs[0].run)):
        found["samples"] = samples
    return found


def _samples(run: Run) -> list[SampleRow]:
    """Return the samples that a run has written, oldest first."""
    try:
        records = run.folder.samples.read()
    except OSError as error:
        raise ReportError(f"{run.folder.samples.path}: cannot be read: {error.strerror}") from None
    return [
        {"step": record["step"], "prompt": record["prompt"], "text": record["text"]}
        for record in records
        if is_number(record.get("step")) and all(isinstance(record.get(key), str) for key in ("prompt", "text"))
    ]


def summary(values: Mapping[str, float | None]) -> Summary | None:
    """Return the mean and interval of the known values; None if there are none."""
    known = {seed: value for seed, value in values.items() if value is not None}
    interval = mean_interval(list(known.values()))
    if interval is None:
        return None
    return {"mean": interval.mean, "half_width": interval.half_width, "values": known}


def _claim_row(verdict: Verdict) -> ClaimResult:
    claim, interval = verdict.claim, verdict.judgement.interval
    return {
        "claim": claim.text,
        "source": claim.source,
        "reading": claim.reading,
        "scale": verdict.scale,
        "criterion": claim.criterion,
        "mean": None if interval is None else interval.mean,
        "half_width": None if interval is None else interval.half_width,
        "numbers": verdict.numbers,
        "verdict": verdict.judgement.outcome,
        "note": verdict.judgement.note,
        "reservations": verdict.reservations,
    }


def _final_row(sweep: Sweep, series: Series) -> FinalRow:
    runs = _compared(sweep, series)
    baseline = sweep.baseline_of(series)
    others = _compared(sweep, baseline) if baseline else {}
    losses = {seed: run.read(LOSS) for seed, run in runs.items()}
    pairs = {seed: (losses[seed].value, others[seed].read(LOSS).value) for seed in runs if seed in others}

    def last(key: str) -> Summary | None:
        return summary({seed: run.read(f"telemetry/{key}").value for seed, run in runs.items()})

    return {
        "series": series.name,
        "labels": dict(series.labels),
        "runs": len(runs),
        "jobs": len(series.jobs),
        "steps": ends([run.last_step for run in runs.values()]),
        "validation_loss": summary({seed: reading.value for seed, reading in losses.items()}),
        "is_baseline": sweep.baseline is not None
        and all(series.labels[a] == label for a, label in sweep.baseline.items()),
        "difference": summary({s: None if a is None or b is None else a - b for s, (a, b) in pairs.items()}),
        "baseline": baseline.name if baseline else None,
        "starved": last("starved"),
        "leverage_dead": last("leverage_dead"),
        "activation_dead": last("activation_dead"),
        "tokens_per_second": summary(
            {s: run.median(partial(_number, key="tokens_per_second")) for s, run in series.timed.items()}
        ),
        "not_finite": [seed for seed, reading in losses.items() if reading.broken],
    }


def _compared(sweep: Sweep, series: Series) -> dict[str, Run]:
    """Return the runs that may be compared: the finished ones, or a single run in any state."""
    return series.shown if sweep.kind == "run" else series.done


def _timing_row(series: Series) -> TimingRow:
    per_run = [seconds for run in series.timed.values() if (seconds := _phases(run))]
    phases = {phase: median(seconds[phase] for seconds in per_run) for phase in (*PHASES, "other") if per_run}
    disturbed = [job.run for job in series.jobs.values() if job.run.records and job.run.disturbances]
    return {
        "series": series.name,
        "runs": len(per_run),
        "seconds": phases or None,
        "left_out": [f"{run.name}: {', '.join(run.disturbances)}" for run in disturbed],
    }


def _phases(run: Run) -> dict[str, float] | None:
    """Return the median seconds of each phase; "other" is the rest of the median step."""
    total = run.median(partial(_number, key="step_seconds"))
    found = {phase: run.median(partial(_number, key=f"{phase}_seconds")) for phase in PHASES}
    known = {phase: seconds for phase, seconds in found.items() if seconds is not None}
    if total is None or len(known) < len(PHASES):
        return None
    return {**known, "other": max(0.0, total - sum(known.values()))}


def _number(record: dict[str, Any], key: str) -> float:
    return float(record[key])


def _job_row(sweep: Sweep, job: Job) -> JobRow:
    seed = job.labels.get(sweep.seed_axis, "") if sweep.seed_axis else ""
    labels = {axis: label for axis, label in job.labels.items() if axis != sweep.seed_axis}
    series = sweep.find(labels)
    tuned = "" if job.chosen else f" ({', '.join(f'{key}={value}' for key, value in job.tuned.items())})"
    return {
        "run": None if job.is_waiting else sweep.run_name(job),
        "series": (series.name if series else " · ".join(labels.values())) + tuned,
        "seed": seed,
        "state": job.run.state,
        "step": job.run.last_step,
        "total_steps": job.run.total_steps,
        "chosen": job.chosen,
        "disturbances": job.run.disturbances,
        "skipped_steps": job.run.skipped_steps,
        "skipped_because": job.run.skipped_because,
        "loss_spikes": sum(bool(record.get("loss_spike")) for record in job.run.records),
    }


def _provenance(runs: list[Run]) -> Provenance:
    launches = [launch for run in runs for launch in run.launches]
    days = [str(launch["time"])[:10] for launch in launches if launch.get("time")]
    return {
        "machines": _distinct([_machine(launch) for launch in launches]),
        "commits": _distinct([str(launch["git_commit"]) for launch in launches if launch.get("git_commit")]),
        "versions": _distinct([_versions(launch) for launch in launches]),
        "dates": [min(days), max(days)] if days else [],
    }


def _machine(launch: dict[str, Any]) -> str:
    """Describe a launch's hardware, such as "AMD EPYC, 2 cores, 1 thread, 1 process, fp32"."""
    hardware = launch.get("hardware") or {}
    parts = [*(hardware.get("gpus") or []), hardware.get("processor")]
    counts = (
        (hardware.get("cores"), "core"),
        (hardware.get("threads"), "thread"),
        (launch.get("world_size"), "process"),
    )
    plurals = {"process": "processes"}
    parts += [f"{n} {word if n == 1 else plurals.get(word, word + 's')}" for n, word in counts if n]
    return ", ".join(str(part) for part in (*parts, launch.get("precision")) if part)


def _versions(launch: dict[str, Any]) -> str:
    packages = launch.get("packages") or {}
    python = f"Python {launch['python']}" if launch.get("python") else ""
    return ", ".join(filter(None, [python, *(f"{name} {packages[name]}" for name in ("torch",) if name in packages)]))


def _distinct(values: list[str]) -> list[str]:
    return [value for value in dict.fromkeys(values) if value]
