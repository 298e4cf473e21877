"""Plots of final values over an axis whose labels are numbers, such as the expansion of the MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pretrain.report.claims import positive_number
from pretrain.report.figures import Panel
from pretrain.report.schema import FinalRow, Summary
from pretrain.report.styles import DASHES, Style
from pretrain.report.svg import figure, percent_axis, short_number, to_svg
from pretrain.report.sweep import Sweep

_QUANTITIES: tuple[tuple[str, Callable[[FinalRow], Summary | None], bool], ...] = (
    ("Validation loss", lambda row: row["validation_loss"], False),
    ("Validation loss, difference to the baseline", lambda row: row["difference"], False),
    ("Starved rows", lambda row: row["starved"], True),
    ("Activation-dead neurons", lambda row: row["activation_dead"], True),
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
    for index, (title, of, is_share) in enumerate(_QUANTITIES):
        drawn = [(_line(members, axis, of), style) for members, (_, style) in zip(lines.values(), legend, strict=True)]
        if any(line for line, _ in drawn):
            panels.append(_panel(drawn, ticks, title, axis, is_share, f"{name}-{index}"))
    return Trend(axis, panels, legend)


def _line(rows: list[FinalRow], axis: str, of: Callable[[FinalRow], Summary | None]) -> Line:
    points = [(positive_number(row["labels"][axis]) or 0.0, of(row)) for row in rows]
    return sorted(((x, found) for x, found in points if found is not None), key=lambda point: point[0])


def _panel(
    lines: list[tuple[Line, Style]], ticks: list[float], title: str, axis: str, is_share: bool, name: str
) -> Panel:
    """Draw the means as dots on a line, with whiskers from the smallest to the largest seed."""
    with figure(3.8, 2.55) as (canvas, axes):
        for line, style in lines:
            if line:
                _draw(axes, line, style)
        axes.set_xscale("log", base=2)
        axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.set_xlabel(axis)
        axes.tick_params(length=3)
        if is_share:
            percent_axis(axes)
        return Panel(title, to_svg(canvas, name, f"{title} over {axis}"))


def _draw(axes: Axes, line: Line, style: Style) -> None:
    x = [value for value, _ in line]
    means = [found["mean"] for _, found in line]
    low = [found["mean"] - min(found["values"].values()) for _, found in line]
    high = [max(found["values"].values()) - found["mean"] for _, found in line]
    axes.errorbar(
        x, means, yerr=(low, high), color=style.colour, linestyle=style.pattern, marker="o", markersize=4, capsize=2.5
    )
