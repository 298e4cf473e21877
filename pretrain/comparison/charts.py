"""The charts: scores against training FLOPs."""

from __future__ import annotations

import math

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pretrain.comparison.document import Chart, Mark
from pretrain.report.svg import figure, to_svg

# Okabe-Ito, which colour-blind readers can tell apart; the shapes differ as well.
_COLOURS = {"measured": "#0072B2", "published": "#D55E00", "by data": "#8a8f98"}
_MOST_TICKS = 5


def draw(chart: Chart, name: str) -> Markup:
    """Return the chart as an <svg> element.

    Args:
        chart: its marks.
        name: prefix for its ids, unique on the page.
    """
    with figure(4.6, 3.2) as (canvas, axes):
        for mark in chart.marks:
            _draw(axes, mark)
        _scale(axes, chart)
        axes.set_xlabel("training FLOPs")
        axes.set_ylabel("score")
        axes.tick_params(length=3)
        kinds = ", ".join(kind for kind in _COLOURS if any(mark.kind == kind for mark in chart.marks))
        return to_svg(canvas, name, f"{chart.title} against training FLOPs: {kinds}")


def _draw(axes: Axes, mark: Mark) -> None:
    colour = _COLOURS[mark.kind]
    if mark.interval is not None:
        below, above = mark.score - mark.interval[0], mark.interval[1] - mark.score
        axes.errorbar(mark.flops, mark.score, yerr=([max(0, below)], [max(0, above)]), color=colour, capsize=2.5)
    if mark.kind == "measured":
        axes.plot(mark.flops, mark.score, "o", color=colour, markersize=5.5)
    elif mark.kind == "published":
        axes.plot(mark.flops, mark.score, "D", markeredgecolor=colour, markerfacecolor="none", markersize=5.5)
    else:
        axes.plot(mark.flops, mark.score, "x", color=colour, markersize=5)
    if mark.letter:
        axes.annotate(
            mark.letter, (mark.flops, mark.score), (6, 3), textcoords="offset points", fontsize=11, color=colour
        )


def _scale(axes: Axes, chart: Chart) -> None:
    """A logarithmic x axis with whole powers of ten, and scores with a margin."""
    powers = [math.log10(mark.flops) for mark in chart.marks]
    first, last = math.floor(min(powers) - 0.15), math.ceil(max(powers) + 0.15)
    axes.set_xscale("log")
    axes.set_xlim(10.0**first, 10.0**last)
    step = math.ceil((last - first) / _MOST_TICKS)
    axes.xaxis.set_major_locator(FixedLocator([10.0**power for power in range(first, last + 1, step)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{round(math.log10(value))}"))
    ends = [end for mark in chart.marks for end in (mark.interval or (mark.score, mark.score))]
    margin = 0.12 * (max(ends) - min(ends)) or 0.02
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}"))
