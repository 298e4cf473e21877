"""The assignment of series to panels, and their colours and dashes.

The colours are the Okabe-Ito palette, which colour-blind readers can tell apart, without its yellow, which is hard to
see on white.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.report.sweep import Series, Sweep

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A7A7A")
"""In dark mode, page.css replaces the colour with index n by its variable --line-n."""
DASHES = ("", "5 2", "1.5 1.5", "7 2 1.5 2")
_MOST_IN_A_PANEL = 6


@dataclass(frozen=True)
class Style:
    """How a series is drawn.

    Attributes:
        colour: as #rrggbb.
        dash: lengths of dashes and gaps in points, as in SVG; empty for a solid line.
    """

    colour: str
    dash: str

    @property
    def css(self) -> str:
        """The colour as a CSS value that follows the page's light or dark mode."""
        return f"var(--line-{COLOURS.index(self.colour)})"

    @property
    def pattern(self) -> tuple[float, tuple[float, ...]] | str:
        """The dash in matplotlib's format."""
        return (0.0, tuple(float(part) for part in self.dash.split())) if self.dash else "solid"


@dataclass(frozen=True)
class Group:
    """The series that share a panel.

    Attributes:
        name: the labels that they have in common; empty if all series share one panel.
        series: the series.
    """

    name: str
    series: list[Series]


@dataclass(frozen=True)
class Arrangement:
    """How the series are drawn.

    Attributes:
        groups: one per panel of each plot.
        styles: name of a series -> style.
        legend: (text, style) pairs.
    """

    groups: list[Group]
    styles: dict[str, Style]
    legend: list[tuple[str, Style]]


def arrange(sweep: Sweep) -> Arrangement:
    """Assign each series to a panel and give it a style.

    Colour encodes the axis that the baseline names, or else the first axis that varies. Up to `_MOST_IN_A_PANEL`
    series share one panel, and dashes encode the other axes; more series get one panel for each combination of the
    other axes.
    """
    varying = [a for a, labels in sweep.axes.items() if a != sweep.seed_axis and len(labels) > 1]
    coloured = next((axis for axis in varying if axis in (sweep.baseline or {})), varying[0] if varying else None)
    rests = list(dict.fromkeys(_rest(series, varying, coloured) for series in sweep.series))
    spread = len(sweep.series) > _MOST_IN_A_PANEL and len(rests) > 1
    styles, members = {}, dict[tuple[tuple[str, str], ...], list[Series]]()
    for series in sweep.series:
        rest = _rest(series, varying, coloured)
        colour = sweep.axes[coloured].index(series.labels[coloured]) if coloured else 0
        dash = colour // len(COLOURS) if spread else colour // len(COLOURS) + rests.index(rest)
        styles[series.name] = Style(COLOURS[colour % len(COLOURS)], DASHES[dash % len(DASHES)])
        members.setdefault(rest if spread else (), []).append(series)
    groups = [Group(", ".join(f"{a} {label}" for a, label in rest), group) for rest, group in members.items()]
    legend = list(styles.items())
    if spread and coloured:
        legend = list({series.labels[coloured]: styles[series.name] for series in sweep.series}.items())
    return Arrangement(groups, styles, legend)


def _rest(series: Series, varying: list[str], coloured: str | None) -> tuple[tuple[str, str], ...]:
    return tuple((axis, series.labels[axis]) for axis in varying if axis != coloured)
