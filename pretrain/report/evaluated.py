"""Plots of the evaluations of a run's checkpoints: scores and bits per byte over the steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from pretrain.report.figures import Panel, draw_band, hover_line
from pretrain.report.schema import BitsRow, Evaluations, ScoreRow
from pretrain.report.statistics import Band
from pretrain.report.styles import COLOURS, Style, arrange
from pretrain.report.svg import figure, percent_axis, tidy, to_svg
from pretrain.report.sweep import Sweep

_OTHER = Style(COLOURS[-1], "")  # of a run that takes no part in comparisons
Point = tuple[int, float, float, float]
"""Step, value, and ends of the 95 % interval, which are the value where there is none."""
Points = dict[str, list[Point]]
"""Run -> its points."""


def evaluation_panels(found: Evaluations, sweep: Sweep) -> list[Panel]:
    """Return a panel for each task and each text that a run was evaluated on at several steps."""
    scores: dict[tuple[str, str, str], Points] = {}
    for row in found["series"]:
        key = (row["series"], row["task"], row["metric"])
        point = (row["step"], row["score"], row["low"], row["high"])
        scores.setdefault(key, {}).setdefault(row["run"], []).append(point)
    bits: dict[tuple[str, str, str], Points] = {}
    for text in found["bits_per_byte"]:
        if text["step"] is not None:
            value = text["bits_per_byte"]
            low, high = (value if end is None else end for end in (text["low"], text["high"]))
            point = (text["step"], value, low, high)
            bits.setdefault((_folder(text), text["text"], ""), {}).setdefault(text["run"], []).append(point)
    folders = {key[0] for key in (*scores, *bits)}

    def title(key: tuple[str, str, str]) -> str:
        name = key[1] + (f", {key[2]}" if key[2] else ", bits per byte")
        return name if len(folders) == 1 else f"{name} ({key[0]})"

    styles = _styles(sweep)
    panels = []
    for number, (key, points) in enumerate((*scores.items(), *bits.items())):
        if any(len({point[0] for point in of_run}) > 1 for of_run in points.values()):
            kind: Literal["share", "number"] = "share" if key in scores and key[2] else "number"
            panels.append(_panel(points, styles, title(key), kind, f"evaluation{number}"))
    return panels


def current(rows: Iterable[BitsRow]) -> list[BitsRow]:
    """Return the figures without those of older checkpoints of the same series."""
    newest: dict[tuple[str, str, str], BitsRow] = {}
    for row in rows:
        key = (row["run"], _folder(row) if row["step"] is not None else row["file"], row["text"])
        earlier = newest.get(key)
        if earlier is None or (row["step"] or 0) > (earlier["step"] or 0):
            newest[key] = row
    return list(newest.values())


def split_groups(rows: Iterable[ScoreRow]) -> tuple[list[ScoreRow], list[ScoreRow]]:
    """Return the scores of groups and of tasks of their own, and those of the groups' tasks."""
    found = list(rows)
    return [row for row in found if row["group"] is None], [row for row in found if row["group"] is not None]


def _folder(row: BitsRow) -> str:
    """Return the folder of the series, without eval/ and the checkpoint's own: "." for eval/ itself."""
    return "/".join(row["file"].split("/")[1:-2]) or "."


def _styles(sweep: Sweep) -> dict[str, tuple[str, Style]]:
    """Return the name and the style of each run: those of its series."""
    arranged = arrange(sweep).styles
    return {
        sweep.run_name(job): (
            f"{series.name}, {sweep.seed_axis} {seed}" if seed else series.name,
            arranged[series.name],
        )
        for series in sweep.series
        for seed, job in series.jobs.items()
    }


def _panel(
    points: Points, styles: Mapping[str, tuple[str, Style]], title: str, kind: Literal["share", "number"], name: str
) -> Panel:
    with figure(3.8, 2.55) as (canvas, axes):
        hover = []
        for run, of_run in points.items():
            columns = np.array(sorted(of_run), dtype=np.float64).T
            band: Band = (columns[0], columns[1], columns[2], columns[3])
            label, style = styles.get(run, (run, _OTHER))
            draw_band(axes, band, style)
            hover.append(hover_line(label, style, band))
        tidy(axes, "steps", "share of items" if kind == "share" else "bits per byte")
        if kind == "share":
            percent_axis(axes, from_zero=False)
        return Panel(title, to_svg(canvas, name, f"{title} over steps", hover))
