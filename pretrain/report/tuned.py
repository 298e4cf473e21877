"""Plots of the validation loss against the values that were tried for a tuned key, such as the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pretrain.report.claims import positive_number
from pretrain.report.figures import NATS, Panel
from pretrain.report.schema import Summary, TunedRow
from pretrain.report.styles import Style
from pretrain.report.trends import numeric_panel


def tuned_panels(rows: Sequence[TunedRow], styles: Mapping[str, Style]) -> list[Panel]:
    """Return a panel for each tuned key with several positive numbers.

    If several keys were tuned together, a point is the lowest loss over the values of the others.
    """
    panels = []
    for number, key in enumerate(dict.fromkeys(key for row in rows for key in row["tuned"])):
        points: dict[str, dict[float, float]] = {}
        for row in rows:
            value, loss = positive_number(str(row["tuned"].get(key))), row["mean"]
            if value is not None and loss is not None:
                of_series = points.setdefault(row["series"], {})
                of_series[value] = min(loss, of_series.get(value, loss))
        ticks = sorted({value for of_series in points.values() for value in of_series})
        if len(ticks) > 1:
            lines = [
                (series, [(value, _single(loss)) for value, loss in sorted(of_series.items())], styles[series])
                for series, of_series in points.items()
            ]
            title = f"Validation loss against {key}"
            panels.append(numeric_panel(lines, ticks, title, key, NATS, f"tuned{number}"))
    return panels


def _single(loss: float) -> Summary:
    return {"mean": loss, "half_width": None, "values": {"": loss}}
