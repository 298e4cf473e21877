"""Rendering of the HTML page: contents of its sections, number formats, template."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pretrain.report.arrays import survival, why_no_survival
from pretrain.report.differences import difference_panels, difference_plot
from pretrain.report.evaluated import current, evaluation_panels, split_groups
from pretrain.report.figures import (
    Panel,
    Plot,
    heatmap_panels,
    line_panels,
    loss_plots,
    neuron_plots,
    survival_plots,
    training_plots,
)
from pretrain.report.judgement import Outcome
from pretrain.report.schema import ReportResult, Summary
from pretrain.report.styles import Style, arrange
from pretrain.report.sweep import Series, Sweep
from pretrain.report.trends import Trend, trends
from pretrain.report.tuned import tuned_panels
from pretrain.run.reader import STATES, Run

_FOLDER = Path(__file__).parent
_MOST_HEATMAPS = 12  # maximum number of series with heatmaps
_MOST_TILES = 4  # maximum number of scores at the top of the page
_TONES: dict[Outcome, str] = {
    "holds": "holds",
    "does not hold": "contradicted",
    "undecided": "undecided",
    "not tested": "untested",
}
DASH = "–"


@dataclass(frozen=True)
class Row:
    """The panels of one plot.

    Attributes:
        title: title of the plot.
        panels: one per group of series.
    """

    title: str
    panels: list[Panel]


@dataclass(frozen=True)
class Tile:
    """One of the main results, at the top of the page.

    Attributes:
        label: what it is; plain text.
        value: as shown.
        note: small print below it; may be empty.
        tone: class for its colour; may be empty.
    """

    label: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Heatmaps:
    """The leverage histograms of a series.

    Attributes:
        series: name of the series.
        run: name of the run they come from.
        panels: one per layer shown.
        layers: number of layers of the model.
    """

    series: str
    run: str
    panels: list[Panel]
    layers: int


@dataclass(frozen=True)
class Figures:
    """The figures of the page, and the data for their captions.

    Attributes:
        trends: final values over numeric axes.
        differences: final differences to the baseline.
        tuned: loss against the values tried.
        evaluations: scores over checkpoints.
        losses: validation and training loss, and the difference of the former to the baseline.
        training: what a single run records besides the loss.
        neurons: shares and variation over steps, and how many dead rows stay dead.
        not_followed: reason -> series for which it is not shown whether dead rows stay dead.
        references: reference steps at which the dead rows were counted.
        dead_rows: series -> number of rows dead at the reference step; smallest and largest over the seeds.
        heatmaps: leverage histograms by series.
        heatmaps_left_out: number of series without heatmaps because there are too many series.
        facets: number of panels per plot.
        styles: series -> line style.
        legend: (text, style) pairs.
        tuned_legend: the same for the series with tuned values.
    """

    trends: list[Trend]
    differences: list[Panel]
    tuned: list[Panel]
    evaluations: list[Panel]
    losses: list[Row]
    training: list[Row]
    neurons: list[Row]
    not_followed: dict[str, list[str]]
    references: list[int]
    dead_rows: dict[str, list[int]]
    heatmaps: list[Heatmaps]
    heatmaps_left_out: int
    facets: int
    styles: dict[str, Style]
    legend: list[tuple[str, Style]]
    tuned_legend: list[tuple[str, Style]]


def render(sweep: Sweep, found: ReportResult) -> str:
    """Return the HTML of the page.

    Args:
        sweep: the data for the figures.
        found: its tables.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "share": share,
        "number": number,
        "loss": lambda value: DASH if value is None else f"{value:.4f}",
        "plus_minus": plus_minus,
        "values": values,
        "current": current,
        "split_groups": split_groups,
        "tone": lambda verdict: _TONES[verdict],
        "yaml": lambda data: yaml.safe_dump(data, sort_keys=False, allow_unicode=True),
    }
    environment.filters.update(filters)
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        report=found,
        tiles=tiles(sweep, found),
        figures=_figures(sweep, found),
        style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        state=state_line(sweep),
        configs=[(series.name, series.first.config_text) for series in sweep.series if series.first],
        slowest=max((sum(row["seconds"].values()) for row in found["timing"] if row["seconds"]), default=1.0) or 1.0,
        final_notes=_final_notes(found),
        unfinished=[row for row in found["jobs"] if row["state"] != "done"],
        DASH=DASH,
    )


def state_line(sweep: Sweep) -> str:
    """Summarise the state, such as "28 of 30 jobs done, 1 running, 1 pending"."""
    counts = Counter(job.run.state for job in sweep.jobs)
    if sweep.kind == "run":
        run = sweep.jobs[0].run
        steps = f"step {run.last_step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")
        return f"{run.state}, {steps}"
    rest = [f"{counts[state]} {state}" for state in STATES if state != "done" and counts[state]]
    what = "runs" if sweep.kind == "runs" else "jobs"
    return ", ".join([f"{counts['done']} of {len(sweep.jobs)} {what} done", *rest])


def _figures(sweep: Sweep, found: ReportResult) -> Figures:
    arranged = arrange(sweep)
    runs = [run for series in sweep.series for run in series.shown.values()]
    survivals = {run.path: result for run in runs if (result := survival(run))}
    not_followed: dict[str, list[str]] = {}
    for series in sweep.series:
        reasons = {why_no_survival(run) for run in series.shown.values() if run.path not in survivals}
        if len(reasons) and not any(run.path in survivals for run in series.shown.values()):
            not_followed.setdefault("; ".join(sorted(reasons)), []).append(series.name)
    dead_rows = {
        series.name: [survivals[run.path].count for run in series.shown.values() if run.path in survivals]
        for series in sweep.series
    }

    def rows(plots: list[Plot], name: str) -> list[Row]:
        drawn = [
            Row(plot.title, line_panels(plot, arranged.groups, arranged.styles, f"{name}{i}"))
            for i, plot in enumerate(plots)
        ]
        return [row for row in drawn if row.panels]

    mapped = _with_heatmaps(sweep)
    heatmaps = []
    for i, series in enumerate(mapped):
        if series.first is not None:
            drawn, layers = heatmap_panels(series.first, f"map{i}")
            heatmaps += [Heatmaps(series.name, series.first.name, drawn, layers)] if drawn else []
    return Figures(
        trends=trends(sweep, found["final"], arranged.styles),
        differences=difference_panels(found["final"], arranged),
        tuned=tuned_panels(found["tuned"], arranged.styles),
        evaluations=evaluation_panels(found["evaluations"], sweep) if "evaluations" in found else [],
        losses=rows([*loss_plots(runs), difference_plot(sweep)], "loss"),
        training=rows(training_plots(), "training") if sweep.kind == "run" else [],
        neurons=rows(neuron_plots() + survival_plots(survivals), "neurons"),
        not_followed=not_followed,
        references=sorted({result.reference for result in survivals.values()}),
        dead_rows={name: sorted({min(counts), max(counts)}) for name, counts in dead_rows.items() if counts},
        heatmaps=heatmaps,
        heatmaps_left_out=len(sweep.series) - len(mapped),
        facets=len(arranged.groups),
        styles=arranged.styles,
        legend=arranged.legend,
        tuned_legend=[(name, arranged.styles[name]) for name in dict.fromkeys(row["series"] for row in found["tuned"])],
    )


def _with_heatmaps(sweep: Sweep) -> list[Series]:
    """Return the series that get heatmaps.

    With more than `_MOST_HEATMAPS` series, these are the first ones that are baselines or that a claim names.
    """
    if len(sweep.series) <= _MOST_HEATMAPS:
        return sweep.series

    def matters(series: Series) -> bool:
        named = [{**claim.where, **other} for claim in sweep.claims for other in ({}, claim.other or {})]
        wanted = [*named, *([sweep.baseline] if sweep.baseline else [])]
        return any(all(series.labels.get(axis) == label for axis, label in labels.items()) for labels in wanted)

    return [series for series in sweep.series if matters(series)][:_MOST_HEATMAPS]


def tiles(sweep: Sweep, found: ReportResult) -> list[Tile]:
    """Return the main results: the verdicts and the best series of a sweep; losses and scores of a run."""
    if sweep.kind == "run":
        return _tiles_of_run(sweep.jobs[0].run, found)
    counts = Counter(claim["verdict"] for claim in found["claims"])
    shown = [
        Tile(outcome, f"{counts[outcome]} of {len(found['claims'])}", "claims", tone)
        for outcome, tone in _TONES.items()
        if counts[outcome]
    ]
    losses = [(row["validation_loss"]["mean"], row) for row in found["final"] if row["validation_loss"]]
    if losses:
        _, best = min(losses, key=lambda entry: entry[0])
        note = best["series"]
        if best["difference"]:
            note += f"; {plus_minus(best['difference'], signed=True)} against {best['baseline']}"
        shown.append(Tile("lowest validation loss", plus_minus(best["validation_loss"]), note))
    return shown


def _tiles_of_run(run: Run, found: ReportResult) -> list[Tile]:
    shown = []
    for key, label, unit in (
        ("validation_loss", "validation loss", "nats per token"),
        ("validation_bits_per_byte", "validation", "bits per byte"),
    ):
        reading = run.read(key)
        if reading.value is not None:
            shown.append(Tile(label, f"{reading.value:.4f}", f"{unit}, step {reading.step:,}"))
    if not shown and (loss := run.read("loss")).value is not None:
        shown.append(Tile("training loss", f"{loss.value:.4f}", f"nats per token, step {loss.step:,}"))
    scores, _ = split_groups(found["evaluations"]["scores"] if "evaluations" in found else [])
    for row in scores[:_MOST_TILES]:
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        shown.append(Tile(row["task"], f"{row['score']:.4f}{error}", f"{row['metric']}, {row['num_items']:,} items"))
    return shown


def _final_notes(found: ReportResult) -> list[str]:
    """Return notes on losses that were not finite and on skipped steps."""
    notes = []
    for row in found["final"]:
        seeds = ", ".join(seed for seed in row["not_finite"] if seed)
        if row["not_finite"]:
            notes.append(f"{row['series']}: last validation loss not finite" + (f", seed {seeds}" if seeds else ""))
    for job in found["jobs"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in job["skipped_because"].items())
        if reasons:
            notes.append(f"{job['run']}: steps skipped: {reasons}")
        taken = job["loss_spikes"] - job["skipped_because"].get("loss spike", 0)
        if taken:
            notes.append(f"{job['run']}: steps taken although their loss was a spike: {taken:,}")
    return notes


def share(value: float | None) -> str:
    """Format a fraction as a percentage."""
    if value is None:
        return DASH
    return f"{100 * value:.0f} %" if abs(value) >= 0.995 else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 4) -> str:
    """Format a number with `digits` significant digits, and at most `digits` decimal places."""
    if value is None:
        return DASH
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = min(digits, max(0, digits - 1 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def plus_minus(found: Summary | None, digits: int = 4, signed: bool = False) -> str:
    """Format the mean and the half-width of its interval."""
    if found is None:
        return DASH
    mean = f"{found['mean']:+.{digits}f}" if signed else f"{found['mean']:.{digits}f}"
    half = found["half_width"]
    return mean.replace("-", "−") + ("" if half is None else f" ± {half:.{digits}f}")


def values(found: Summary | None) -> list[float]:
    """Return the smallest and largest value; empty if there are none."""
    return [] if found is None else [min(found["values"].values()), max(found["values"].values())]
