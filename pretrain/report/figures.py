"""The figures of a report: which curves are drawn in which panels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pretrain.report.arrays import DEAD, LOG_BINS, Histograms, Survival, histograms
from pretrain.report.statistics import Band, Curve, band, smoothed
from pretrain.report.styles import Group, Style
from pretrain.report.svg import AXIS, HoverLine, figure, percent_axis, short_number, tidy, to_svg
from pretrain.report.sweep import Series
from pretrain.run.reader import Run

_POINTS = 160  # maximum number of points per curve
_FEW = 12  # curves with at most this many points get markers
_SMOOTH = 60  # a noisy curve is reduced to this many means
_SKIPPED = 0.25  # a loss may lie above its panel in this first part of the x axis
_COLUMNS = 100  # maximum width of a heatmap
_MOST_LAYERS = 8  # maximum number of heatmaps per series
NATS = "nats per token"
_EMPTY: Curve = (np.empty(0), np.empty(0))


@dataclass(frozen=True)
class Panel:
    """One figure on the page.

    Attributes:
        title: what distinguishes it from its neighbours; plain text.
        svg: the drawing.
    """

    title: str
    svg: Markup


@dataclass(frozen=True)
class Plot:
    """What a row of panels shows.

    Attributes:
        title: title of the panels.
        x_label: label of the x axis.
        y_label: label of the y axis, with the unit.
        curve: returns the curve of a run.
        kind: scale of the y axis: a loss (without its steep beginning), a difference (the same, with 0), a share, or a
            plain number, both starting at 0.
        timing: use only runs with usable timings; a series without any is drawn anyway, and the caption names it.
        band: returns what is drawn of a series; None for the mean over its runs, from the smallest to the largest.
    """

    title: str
    x_label: str
    y_label: str
    curve: Callable[[Run], Curve] = lambda run: _EMPTY
    kind: Literal["number", "share", "loss", "difference"] = "number"
    timing: bool = False
    band: Callable[[Series], Band | None] | None = None


def loss_plots(runs: Sequence[Run]) -> list[Plot]:
    """Return plots of validation and training loss against tokens and training time."""
    longest = max((run.read("train_seconds").value or 0.0 for run in runs), default=0.0)
    scale, unit = next(
        (s, u) for s, u in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if longest >= 3 * s or s == 1
    )

    def curve(key: str, over: str) -> Callable[[Run], Curve]:
        def of(run: Run) -> Curve:
            x, y = run.curve(key, over)
            x = x / scale if over == "train_seconds" else x
            return smoothed((x, y), _SMOOTH) if key == "loss" else (x, y)

        return of

    axes = (("tokens", "tokens", "tokens"), ("train_seconds", "training time", f"training time, {unit}"))
    return [
        Plot(f"{title} against {name}", label, NATS, curve(key, over), "loss", timing=over == "train_seconds")
        for key, title in (("validation_loss", "Validation loss"), ("loss", "Training loss, smoothed,"))
        for over, name, label in axes
    ]


def neuron_plots() -> list[Plot]:
    """Return plots over steps: shares of starved and dead neurons, and the variation among down_proj's columns."""
    shares = (
        ("Starved rows, gate_proj and up_proj", "starved", "share of rows"),
        ("Leverage-dead rows, gate_proj and up_proj", "leverage_dead", "share of rows"),
        ("Activation-dead neurons", "activation_dead", "share of neurons"),
    )
    variations = (
        ("down_proj columns: variation of leverage", "down_proj/leverage_cv"),
        ("down_proj columns: variation of the direction applied", "down_proj/direction_cv"),
    )
    return [
        *(Plot(title, "steps", label, _telemetry(key), "share") for title, key, label in shares),
        *(Plot(title, "steps", "coefficient of variation", _telemetry(key)) for title, key in variations),
    ]


def training_plots() -> list[Plot]:
    """Return plots of what a run records of its training besides the loss."""

    def curve(key: str, points: int | None = None) -> Callable[[Run], Curve]:
        return lambda run: run.curve(key) if points is None else smoothed(run.curve(key), points)

    return [
        Plot("Bits per byte, validation", "steps", "bits per byte", curve("validation_bits_per_byte"), "loss"),
        Plot("Learning rate of the matrices", "steps", "learning rate", curve("lr", _POINTS)),
        Plot("Learning rate of everything else", "steps", "learning rate", curve("adamw_lr", _POINTS)),
        Plot("Gradient norm, smoothed, before clipping", "steps", "L2 norm", curve("grad_norm", _SMOOTH), "loss"),
    ]


def _telemetry(key: str) -> Callable[[Run], Curve]:
    return lambda run: run.curve(f"telemetry/{key}")


def survival_plots(found: Mapping[Path, Survival]) -> list[Plot]:
    """Return plots of how many rows dead at the reference step stay dead; `found` is keyed by the run's path."""

    def plot(title: str, curve: Callable[[Survival], Curve]) -> Plot:
        of_run: Callable[[Run], Curve] = lambda run: curve(found[run.path]) if run.path in found else _EMPTY  # noqa: E731
        return Plot(title, "steps", "share of these rows", of_run, "share")

    return [
        plot("Rows dead at the reference step, still dead", lambda result: result.still),
        plot("Rows dead at the reference step, dead ever since", lambda result: result.throughout),
    ]


def line_panels(plot: Plot, groups: Sequence[Group], styles: dict[str, Style], name: str) -> list[Panel]:
    """Draw one panel per group, all with the same axis limits; return an empty list if no run has the curve."""
    drawn = [(group, [(series, _band(plot, series)) for series in group.series]) for group in groups]
    bands = [found for _, members in drawn for _, found in members if found is not None]
    if not bands:
        return []
    end = max(found[0][-1] for found in bands)
    start = min(found[0][0] for found in bands) if plot.x_label == "steps" else 0.0
    bottom, top = _limits(plot, bands, end)
    panels = []
    for number, (group, members) in enumerate(drawn):
        label = f"{plot.title}, {group.name}" if group.name else plot.title
        with figure(3.8, 2.55) as (canvas, axes):
            for series, found in members:
                if found is not None:
                    draw_band(axes, found, styles[series.name])
            if plot.kind == "difference":
                axes.axhline(0, color=AXIS, linewidth=1)
            margin = 0.02 * (end - start) or 1.0
            axes.set_xlim(start - margin * (start > 0), end + margin)
            axes.set_ylim(bottom, top)
            tidy(axes, plot.x_label, plot.y_label)
            if plot.kind == "share":
                percent_axis(axes)
            hover = [hover_line(series.name, styles[series.name], found) for series, found in members if found]
            panels.append(Panel(_caption(plot, group), to_svg(canvas, f"{name}-{number}", label, hover)))
    return panels


def _caption(plot: Plot, group: Group) -> str:
    """Return what distinguishes a panel from its neighbours, and its series without usable timings."""
    unusable = [series.name for series in group.series if plot.timing and series.shown and not series.timed]
    return (group.name or plot.title) + (f"; without usable timings: {', '.join(unusable)}" if unusable else "")


def _band(plot: Plot, series: Series) -> Band | None:
    if plot.band is not None:
        return plot.band(series)
    runs = (series.timed if plot.timing else {}) or series.shown
    return band([plot.curve(run) for run in runs.values()], _POINTS)


def _limits(plot: Plot, bands: Sequence[Band], end: float) -> tuple[float, float]:
    """Return the limits of the y axis; losses and differences are limited to their range after the first part.

    Those of a difference are the means and 0, with room for intervals: with two seeds, these are so wide that a
    difference of 0.01 would not be seen.
    """
    if plot.kind in ("number", "share"):
        return 0.0, max(float(found[3].max()) for found in bands) * 1.06 or 1.0
    late = [tuple(part[keep] for part in found) for found in bands if (keep := found[0] >= _SKIPPED * end).any()]
    late = late or list(bands)
    if plot.kind == "difference":
        means = np.concatenate([np.zeros(1), *(found[1] for found in late)])
        room = 0.4 * float(np.ptp(means)) or 0.01
        return float(means.min()) - room, float(means.max()) + room
    low, high = min(float(found[2].min()) for found in late), max(float(found[3].max()) for found in late)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def draw_band(axes: Axes, found: Band, style: Style) -> None:
    """Draw the mean as a line, in a band from the lower to the upper values."""
    x, mean, lowest, highest = found
    if not np.array_equal(lowest, highest):
        axes.fill_between(x, lowest, highest, color=style.colour, alpha=0.18, linewidth=0)
    marker = "o" if len(x) <= _FEW else None
    axes.plot(x, mean, color=style.colour, linestyle=style.pattern, linewidth=1.7, marker=marker, markersize=3.5)


def hover_line(name: str, style: Style, found: Band) -> HoverLine:
    """Return the values of a line for the page's display of values under the pointer."""
    x, mean, lowest, highest = found
    return HoverLine(name, style, x, mean, lowest, highest)


def heatmap_panels(run: Run, name: str) -> tuple[list[Panel], int]:
    """Return heatmaps of leverage over time for up to `_MOST_LAYERS` evenly spaced layers, and the number of layers."""
    layers = histograms(run)
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round().astype(int))
    return [_heatmap(layers[index], name) for index in (chosen if layers else ())], len(layers)


def _heatmap(found: Histograms, name: str) -> Panel:
    """Draw steps from left to right and log10 of leverage upwards; darker means more rows."""
    steps = np.array(found.steps, dtype=np.float64)
    columns = np.linspace(steps[0], steps[-1], min(_COLUMNS, max(2 * len(steps), 2)))
    nearest = np.abs(steps[None, :] - columns[:, None]).argmin(axis=1)
    title = f"layer {found.layer}"
    with figure(2.45, 2.0) as (canvas, axes):
        extent = (steps[0], max(steps[-1], steps[0] + 1), float(LOG_BINS[0]), float(LOG_BINS[-1]))
        axes.imshow(
            found.shares[nearest].T,
            extent=extent,
            origin="lower",
            aspect="auto",
            interpolation="none",
            cmap="Blues",
            norm=PowerNorm(0.5, vmin=0, vmax=0.25, clip=True),
        )
        axes.axhline(float(np.log10(DEAD)), color="#D55E00", linewidth=1.2, linestyle="dashed")
        axes.grid(visible=False)
        axes.set_yticks([-3, -2, -1, 0, 1])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10.0**value:g}"))
        axes.set_xlabel("steps")
        axes.set_ylabel("leverage")
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        return Panel(title, to_svg(canvas, f"{name}-{found.layer}", f"Leverage histogram over steps, {title}"))
