"""Plots of final values over an axis whose labels are numbers, such as the expansion of the MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pretrain.report.claims import positive_number
from pretrain.report.figures import NATS, Panel
from pretrain.report.schema import FinalRow, Summary
from pretrain.report.styles import DASHES, Style
from pretrain.report.svg import HoverLine, figure, percent_axis, short_number, to_svg
from pretrain.report.sweep import Sweep

_QUANTITIES: tuple[tuple[str, Callable[[FinalRow], Summary | None], str], ...] = (
    ("Validation loss", lambda row: row["validation_loss"], NATS),
    ("Validation loss, difference to the baseline", lambda row: row["difference"], NATS),
    ("Starved rows", lambda row: row["starved"], "share of rows"),
    ("Activation-dead neurons", lambda row: row["activation_dead"], "share of neurons"),
)
Line = list[tuple[float, Summary]]


@dataclass(frozen=True)
class Trend:
    """How the final values change along an axis.

    Attributes:
        axis: name of the axis.
        panels: one per quantity.
        legend: (text, style) pairs for the lines.
    """

    axis: str
    panels: list[Panel]
    legend: list[tuple[str, Style]]


def trends(sweep: Sweep, rows: list[FinalRow], styles: dict[str, Style]) -> list[Trend]:
    """Return a trend for each axis that has several labels, all of them numbers."""
    found = []
    for number, (axis, labels) in enumerate(sweep.axes.items()):
        numeric = len(labels) > 1 and all(positive_number(label) is not None for label in labels)
        if (
            axis != sweep.seed_axis
            and numeric
            and (trend := _trend(sweep, rows, axis, styles, f"trend{number}")).panels
        ):
            found.append(trend)
    return found


def _trend(sweep: Sweep, rows: list[FinalRow], axis: str, styles: dict[str, Style], name: str) -> Trend:
    others = [other for other, labels in sweep.axes.items() if other not in (axis, sweep.seed_axis) and len(labels) > 1]
    lines: dict[str, list[FinalRow]] = {}
    for row in rows:
        lines.setdefault(" · ".join(row["labels"][other] for other in others), []).append(row)
    legend: list[tuple[str, Style]] = []
    for text, members in lines.items():
        colour = styles[members[0]["series"]].colour
        before = sum(style.colour == colour for _, style in legend)
        legend.append((text, Style(colour, DASHES[before % len(DASHES)])))
    ticks = sorted(value for label in sweep.axes[axis] if (value := positive_number(label)) is not None)
    panels = []
    for index, (title, of, y_label) in enumerate(_QUANTITIES):
        drawn = [
            (text, _line(members, axis, of), style)
            for (text, members), (_, style) in zip(lines.items(), legend, strict=True)
        ]
        if any(line for _, line, _ in drawn):
            panels.append(numeric_panel(drawn, ticks, title, axis, y_label, f"{name}-{index}"))
    return Trend(axis, panels, legend)


def _line(rows: list[FinalRow], axis: str, of: Callable[[FinalRow], Summary | None]) -> Line:
    points = [(positive_number(row["labels"][axis]) or 0.0, of(row)) for row in rows]
    return sorted(((x, found) for x, found in points if found is not None), key=lambda point: point[0])


def numeric_panel(
    lines: Sequence[tuple[str, Line, Style]], ticks: Sequence[float], title: str, x_label: str, y_label: str, name: str
) -> Panel:
    """Draw the means as dots on a line over a logarithmic axis, with whiskers from the smallest to the largest seed.

    Args:
        lines: (name, points in ascending order of x, style).
        ticks: the values that are labelled, in ascending order.
        title: of the panel.
        x_label: of the x axis.
        y_label: of the y axis; shares are shown in per cent.
        name: prefix for ids, unique on the page.
    """
    with figure(3.8, 2.55) as (canvas, axes):
        hover = [_draw(axes, text, line, style) for text, line, style in lines if line]
        axes.set_xscale("log", base=2)
        axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.tick_params(length=3)
        if y_label.startswith("share"):
            percent_axis(axes)
        return Panel(title, to_svg(canvas, name, f"{title} over {x_label}", hover))


def _draw(axes: Axes, name: str, line: Line, style: Style) -> HoverLine:
    x = np.array([value for value, _ in line])
    means = np.array([found["mean"] for _, found in line])
    low = np.array([min(found["values"].values()) for _, found in line])
    high = np.array([max(found["values"].values()) for _, found in line])
    axes.errorbar(
        x,
        means,
        # A mean may lie outside of values that agree, by rounding.
        yerr=(np.maximum(means - low, 0), np.maximum(high - means, 0)),
        color=style.colour,
        linestyle=style.pattern,
        marker="o",
        markersize=4,
        capsize=2.5,
    )
    return HoverLine(name, style, x, means, low, high)
