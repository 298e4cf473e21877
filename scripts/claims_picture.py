"""Draw the README's picture: dead neurons and validation loss over steps, from the sweep of experiment (a).

python scripts/claims_picture.py runs/experiments/sweeps/dead-neurons docs/claims/dead-neurons.svg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pretrain.processes.errors import UserError
from pretrain.report.errors import ReportError
from pretrain.report.statistics import band
from pretrain.report.styles import arrange
from pretrain.report.sweep import load

NAMES = {"muon": "Muon", "aurora": "Aurora", "u_normuon": "U-NorMuon", "adamw": "AdamW"}
PANELS = (
    ("telemetry/leverage_dead", "Dead MLP neurons (leverage under 0.1 of the mean)", 100.0, "%"),
    ("validation_loss", "Validation loss", 1.0, "nats per token"),
)


def draw(folder: Path, out: Path) -> None:
    """Draw both panels: the mean over the seeds, in a band from the smallest to the largest value."""
    sweep = load(folder)
    styles = arrange(sweep).styles
    style = {"svg.fonttype": "none", "svg.hashsalt": "aurora", "font.size": 10, "figure.constrained_layout.use": True}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.6, 3.2), facecolor="white")
        FigureCanvasSVG(figure)
        for axes, (key, title, factor, unit) in zip(figure.subplots(1, 2), PANELS, strict=True):
            for series in sweep.series:
                found = band([run.curve(key) for run in series.done.values()], points=200)
                if found is None:
                    raise ReportError(f"{folder}: {series.name} has no complete run with {key}")
                x, mean, low, high = found
                colour, name = styles[series.name].colour, series.labels["optimizer"]
                axes.fill_between(x, factor * low, factor * high, color=colour, alpha=0.2, linewidth=0)
                axes.plot(x, factor * mean, color=colour, label=NAMES.get(name, name))
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("steps")
            axes.set_ylabel(unit)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    """Draw the picture; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP_FOLDER")
    parser.add_argument("out", type=Path, metavar="FILE.svg")
    options = parser.parse_args(arguments)
    try:
        draw(options.sweep, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
