"""Small matplotlib figures as inline SVG: text stays text, colours follow the page, no external references."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from matplotlib.typing import RcKeyType

from pretrain.report.statistics import Array
from pretrain.report.styles import COLOURS, Style

AXIS = "#8a8f98"
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aurora-report",
    "text.parse_math": False,  # a dollar sign in a label is not the start of a formula
    "font.family": "sans-serif",
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": AXIS,
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#3d434b",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "xtick.labelcolor": "#3d434b",
    "ytick.labelcolor": "#3d434b",
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
# With all of them None matplotlib writes no metadata, and so no date.
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_GEOMETRY = re.compile(r' (?:d|x|y|points|transform)="[^"]*"')
_OWN_STYLE = re.compile(r"<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)  # its rules would apply to the whole page
_LONG_NUMBER = re.compile(r"(\.\d\d)\d+")
_TAG = re.compile(r"<[^>]*>")
_STYLE_ATTRIBUTE = re.compile(r'(?<= style=")[^"]*')
_COLOUR = re.compile(r"#[0-9a-f]{6}")
# The variables of page.css; matplotlib writes colours in lower case.
_VARIABLES = {"#3d434b": "var(--label)", AXIS: "var(--axis)", "#e6e8eb": "var(--grid)"} | {
    colour.lower(): f"var(--line-{index})" for index, colour in enumerate(COLOURS)
}
_HOVER_POINTS = 60  # maximum number of points per line of which the page knows the values


@dataclass(frozen=True)
class HoverLine:
    """The points of a line whose values the page shows under the pointer.

    Attributes:
        name: of the series.
        style: how it is drawn.
        x: in ascending order.
        y: of the same length.
        low: lower ends of a band or of intervals; None without.
        high: upper ends.
    """

    name: str
    style: Style
    x: Array
    y: Array
    low: Array | None = None
    high: Array | None = None


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of `width` x `height` inches with one pair of axes, in the report's style."""
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height))
        FigureCanvasSVG(drawn)
        yield drawn, drawn.add_subplot()


def to_svg(drawn: Figure, name: str, label: str, hover: Sequence[HoverLine] = ()) -> Markup:
    """Return the figure as an <svg> element for HTML; must be called inside `figure`.

    Args:
        drawn: the figure.
        name: prefix for its ids, unique on the page.
        label: a description for screen readers.
        hover: the lines whose values page.js shows under the pointer.
    """
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata=_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = _OWN_STYLE.sub("", body, count=1)
    body = _GEOMETRY.sub(lambda match: _LONG_NUMBER.sub(r"\1", match[0]), body)
    body = body.replace("xlink:href", "href").replace(' id="', f' id="{name}-')
    body = body.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    body = re.sub(r"\s*\n\s*", "\n", body)
    body = _TAG.sub(lambda tag: _STYLE_ATTRIBUTE.sub(_with_variables, tag[0]), body)
    data = f' data-hover="{escape(json.dumps(_hover(drawn, hover)))}"' if hover else ""
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(label)}"{data}>{body}')


def _with_variables(style: re.Match[str]) -> str:
    """Replace the report's own colours in a style by variables, which differ in dark mode."""
    return _COLOUR.sub(lambda colour: _VARIABLES.get(colour[0], colour[0]), style[0])


def _hover(drawn: Figure, lines: Sequence[HoverLine]) -> dict[str, Any]:
    """Return what page.js needs to find the values under the pointer; the figure must have been drawn.

    box: left, top, right and bottom of the axes, as fractions of the figure. x, y: limits of the axes. logarithmic: of
    the x axis. share: whether y is a fraction. label: of the x axis. lines: name, colour, and points
    [x, y] or [x, y, low, high].
    """
    axes = drawn.axes[0]
    place = axes.get_position()
    formatter = axes.yaxis.get_major_formatter()
    return {
        "box": [round(float(part), 4) for part in (place.x0, 1 - place.y1, place.x1, 1 - place.y0)],
        "x": [float(end) for end in axes.get_xlim()],
        "logarithmic": axes.get_xscale() == "log",
        "share": isinstance(formatter, PercentFormatter),
        "label": axes.get_xlabel(),
        "lines": [{"name": line.name, "colour": line.style.css, "points": _points(line)} for line in lines],
    }


def _points(line: HoverLine) -> list[list[float]]:
    chosen = np.unique(np.linspace(0, len(line.x) - 1, min(len(line.x), _HOVER_POINTS)).round().astype(int))
    columns = [line.x, line.y]
    if line.low is not None and line.high is not None and not np.array_equal(line.low, line.high):
        columns += [line.low, line.high]
    return [[float(f"{column[index]:.6g}") for column in columns] for index in (chosen if len(line.x) else ())]


def tidy(axes: Axes, x_label: str, y_label: str = "") -> None:
    """Set a few ticks with short numbers, and the labels of the axes."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.tick_params(length=3)


def percent_axis(axes: Axes, *, from_zero: bool = True) -> None:
    """Show shares as percentages on the y axis, starting at 0 unless they are scores."""
    if from_zero:
        axes.set_ylim(0, max(axes.get_ylim()[1], 0.01))
    low, high = axes.get_ylim()
    digits = 0 if high - low > 0.05 else 1
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=digits, symbol=" %"))


def short_number(value: float) -> str:
    """Format 1500000 as "1.5M" and 2500 as "2.5k"."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}" if math.isfinite(value) else ""
