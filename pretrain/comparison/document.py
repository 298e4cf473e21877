"""What the page consists of: parts with paragraphs and tables. HTML and Markdown are two renderings of one document."""

from __future__ import annotations

from dataclasses import dataclass, field

DASH = "–"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it shows.
        key: what the column is sorted by; None for a cell without a value, which comes last.
        small: a remark in small print.
        sources: numbers in the list of sources.
    """

    text: str
    key: float | str | None = None
    small: str = ""
    sources: tuple[int, ...] = ()


EMPTY = Cell(DASH)


@dataclass(frozen=True)
class Table:
    """A table; its first column names the row.

    Attributes:
        title: heading above it; empty for none.
        heads: names of the columns.
        rows: one cell per column.
        numeric: indices of the columns that hold numbers.
    """

    title: str
    heads: tuple[str, ...]
    rows: list[list[Cell]]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Mark:
    """A point of a chart.

    Attributes:
        letter: what the chart writes next to it; the legend explains it. Empty for none.
        flops: FLOPs of training.
        score: the score.
        interval: its 95 % interval; None without one.
        kind: "measured", "published", or "by data" for published runs that differ in their text.
    """

    letter: str
    flops: float
    score: float
    interval: tuple[float, float] | None
    kind: str


@dataclass(frozen=True)
class Chart:
    """Scores of a task against training FLOPs.

    Attributes:
        title: the task.
        marks: its points, at least one.
    """

    title: str
    marks: list[Mark]


@dataclass(frozen=True)
class Part:
    """A part of the page.

    Attributes:
        name: its anchor; letters and hyphens.
        title: its heading.
        paragraphs: what comes first.
        tables: its tables.
        charts: its charts, in the HTML page only.
        legend: (letter, text) pairs of the charts.
        notes: how to read it, in small print.
    """

    name: str
    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """An entry of the list of sources; its number is its place from 1."""

    text: str
    url: str | None
    read: str
    how: str


@dataclass(frozen=True)
class Document:
    """The page."""

    title: str
    question: str
    state: str
    notes: list[str]
    parts: list[Part]
    sources: list[Reference]
