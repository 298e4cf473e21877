"""Plots of the differences of validation loss to the baseline, paired by seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from pretrain.report.figures import NATS, Panel, Plot
from pretrain.report.schema import FinalRow, Summary
from pretrain.report.statistics import Band, paired_band
from pretrain.report.styles import Arrangement, Style
from pretrain.report.svg import AXIS, figure, short_number, to_svg
from pretrain.report.sweep import Series, Sweep
from pretrain.run.reader import LOSS

_POINTS = 160
_OUTLIER = 8  # a difference so many times the median is shown by an arrow at the edge of the panel
_LONGEST = 40  # characters of a name
_ROW = 0.44  # inches
Drawn = list[tuple[FinalRow, Summary]]


def difference_plot(sweep: Sweep) -> Plot:
    """Return the plot of the differences over training, with 95 % t intervals at each point."""

    def of_series(series: Series) -> Band | None:
        baseline = sweep.baseline_of(series)
        if baseline is None:
            return None
        mine, others = series.shown, baseline.shown
        pairs = [
            (mine[seed].curve(LOSS, "tokens"), others[seed].curve(LOSS, "tokens")) for seed in mine if seed in others
        ]
        return paired_band(pairs, _POINTS)

    title = "Difference of validation loss to the baseline"
    return Plot(title, "tokens", NATS, kind="difference", band=of_series)


def difference_panels(rows: Sequence[FinalRow], arranged: Arrangement) -> list[Panel]:
    """Draw the final differences, a row for each series: seeds as rings, the mean as a dot in its 95 % interval."""
    drawn: list[tuple[str, Drawn]] = []
    for group in arranged.groups:
        names = {series.name for series in group.series}
        found = [(row, row["difference"]) for row in rows if row["series"] in names]
        drawn.append((group.name, [(row, difference) for row, difference in found if difference is not None]))
    drawn = [(name, members) for name, members in drawn if members]
    if not drawn:
        return []
    low, high = _limits([difference for _, members in drawn for _, difference in members])
    panels = []
    for number, (name, members) in enumerate(drawn):
        with figure(3.8, 0.85 + _ROW * len(members)) as (canvas, axes):
            axes.set_xlim(low, high)
            axes.set_ylim(len(members) - 0.35, -0.75)
            axes.axvline(0, color=AXIS, linewidth=1)
            for place, (row, difference) in enumerate(members):
                _draw(axes, place, row["series"], difference, arranged.styles[row["series"]])
            axes.yaxis.set_major_locator(NullLocator())
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
            axes.tick_params(length=3)
            axes.spines["left"].set_visible(False)
            axes.set_xlabel(NATS)
            title = "Final validation loss minus the baseline's"
            panels.append(Panel(name or title, to_svg(canvas, f"difference-{number}", f"{title} {name}".strip())))
    return panels


def _ends(found: Summary) -> tuple[float, float]:
    """Return the range of the seeds and, from three seeds on, of the interval; with two, it would hide all others."""
    half_width = found["half_width"] if found["half_width"] is not None and len(found["values"]) > 2 else 0.0
    values = found["values"].values()
    return min(*values, found["mean"] - half_width), max(*values, found["mean"] + half_width)


def _limits(found: Sequence[Summary]) -> tuple[float, float]:
    """Return limits that include 0 and all differences, except those that would make the others invisible."""
    reach = [max(map(abs, _ends(summary))) for summary in found]
    most = _OUTLIER * median_low(reach) or max(reach)
    kept = [_ends(summary) for summary, far in zip(found, reach, strict=True) if far <= most]
    low, high = min(0.0, *(ends[0] for ends in kept)), max(0.0, *(ends[1] for ends in kept))
    margin = 0.08 * (high - low) or 0.01
    return low - margin, high + margin


def _draw(axes: Axes, place: int, name: str, found: Summary, style: Style) -> None:
    low, high = axes.get_xlim()
    mean, half_width = found["mean"], found["half_width"]
    short = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
    size = "" if half_width is None else f" ± {half_width:.4f}"
    text = f"{short}: {f'{mean:+.4f}'.replace('-', '−')}{size}"
    axes.text(0, place - 0.28, text, transform=axes.get_yaxis_transform(), color="#3d434b", fontsize=10.5)
    if not low < mean < high:
        edge, marker = (high, ">") if mean > 0 else (low, "<")
        axes.plot([edge], [place], marker=marker, color=style.colour, markersize=8, clip_on=False)
        return
    if half_width is not None:
        axes.errorbar([mean], [place], xerr=[half_width], color=style.colour, capsize=3, linewidth=1.7)
    values = list(found["values"].values())
    axes.plot(values, [place] * len(values), "o", color=style.colour, fillstyle="none", markersize=4, linewidth=0)
    axes.plot([mean], [place], "o", color=style.colour, markersize=6)
