"""Small matplotlib figures as inline SVG: text stays text, and there are no external references."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.typing import RcKeyType

_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aurora-report",
    "text.parse_math": False,  # a dollar sign in a label is not the start of a formula
    "font.family": "sans-serif",
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#3d434b",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#8a8f98",
    "ytick.color": "#8a8f98",
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


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of `width` x `height` inches with one pair of axes, in the report's style."""
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height))
        FigureCanvasSVG(drawn)
        yield drawn, drawn.add_subplot()


def to_svg(drawn: Figure, name: str, label: str) -> Markup:
    """Return the figure as an <svg> element for HTML; must be called inside `figure`.

    Args:
        drawn: the figure.
        name: prefix for its ids, unique on the page.
        label: a description for screen readers.
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
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(label)}">{body}')


def tidy(axes: Axes, x_label: str) -> None:
    """Set a few ticks with short numbers, and the label of the x axis."""
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.tick_params(length=3)


def percent_axis(axes: Axes) -> None:
    """Show shares as percentages on the y axis, starting at 0."""
    top = axes.get_ylim()[1]
    axes.set_ylim(0, max(top, 0.01))
    digits = 0 if axes.get_ylim()[1] > 0.05 else 1
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.{digits}f} %"))


def short_number(value: float) -> str:
    """Format 1500000 as "1.5M" and 2500 as "2.5k"."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}" if math.isfinite(value) else ""
