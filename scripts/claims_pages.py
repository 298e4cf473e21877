"""Write the results of sweeps to docs/claims: their numbers, and the tables of their pages.

    python scripts/claims_pages.py runs/experiments/sweeps/dead-neurons ...
    python scripts/claims_pages.py docs/claims/dead-neurons.json ...

The second form needs no runs: it judges the recorded values of a sweep again. Writes docs/claims/NAME.json, and
everything between the two markers in docs/claims/NAME.md. The text around the markers is written by hand and is not
changed. A new page starts with the sweep's title and question. `aurora report` draws the curves, as an HTML page that
is not committed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pretrain.files import replace_text
from pretrain.processes.errors import UserError
from pretrain.report.errors import ReportError
from pretrain.report.judgement import Outcome
from pretrain.report.recorded import read_recorded
from pretrain.report.schema import ReportResult, Summary
from pretrain.report.write import results

PAGES = Path(__file__).resolve().parent.parent / "docs" / "claims"
OUTCOMES: dict[Outcome, str] = {
    "holds": "**holds**",
    "does not hold": "**does not hold**",
    "undecided": "*undecided*",
    "not tested": "not tested",
}
BEGIN, END = "<!-- result: written by scripts/claims_pages.py -->", "<!-- end of result -->"


def number(value: float | None, digits: str = ".4f") -> str:
    """Format a number; a dash stands for None."""
    return "–" if value is None else format(value, digits)


def with_interval(found: Summary | None, digits: str = ".4f") -> str:
    """Format a summary as ``mean ± half-width``."""
    if found is None:
        return "–"
    half = "" if found["half_width"] is None else f" ± {number(found['half_width'], digits)}"
    return number(found["mean"], digits) + half


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def tables(found: ReportResult) -> list[str]:
    """Return the Markdown between the markers: what was run, the claims, the final values."""
    jobs = found["jobs"]
    done = sum(job["state"] == "done" for job in jobs)
    where = found["provenance"]
    claims = [
        [
            claim["claim"],
            claim["criterion"],
            number(claim["mean"]) + ("" if claim["half_width"] is None else f" ± {claim['half_width']:.4f}"),
            ", ".join(number(value) for value in claim["numbers"].values()),
            OUTCOMES[claim["verdict"]] + (f" ({claim['note']})" if claim["note"] else ""),
        ]
        for claim in found["claims"]
    ]
    final = [
        [
            row["series"],
            str(row["runs"]),
            with_interval(row["validation_loss"]),
            with_interval(row["difference"]),
            with_interval(row["starved"], ".1%"),
            with_interval(row["leverage_dead"], ".1%"),
            with_interval(row["activation_dead"], ".1%"),
        ]
        for row in found["final"]
    ]
    tuned = [
        [
            row["series"],
            ", ".join(f"{key} = {value}" for key, value in row["tuned"].items()),
            number(row["mean"]),
            "chosen" + (", at the edge of those tried" if row["at_edge"] else "") if row["chosen"] else "",
        ]
        for row in found["tuned"]
    ]
    source = Path(found["source"])
    lines = [
        f"`aurora sweep {source}`, then `aurora report {source}`: {done} of {len(jobs)} jobs complete; "
        f"{' to '.join(dict.fromkeys(where['dates']))}; {'; '.join(where['machines'])}; "
        f"commits {', '.join(commit[:10] for commit in where['commits'])}.",
        "",
    ]
    if claims:
        header = ["claim", "criterion", "mean ± 95 % interval", "by seed", "verdict"]
        rules = f"The criteria and thresholds come from the sweep file. {found['intervals_cover']}"
        lines += [rules.strip(), "", *table(header, claims), ""]
    header = ["", "runs", "validation loss", "difference, paired", "starved", "leverage-dead", "activation-dead"]
    lines += ["At the last step:", "", *table(header, final)]
    if tuned:
        lines += ["", *table(["", "tried", "validation loss, seed 1", ""], tuned)]
    return lines


def update(page: Path, found: ReportResult) -> None:
    """Write the tables between the markers of a page.

    Raises:
        ReportError: the page has no markers.
    """
    start = f"# {found['title']}\n\n{found['question']}\n\n{BEGIN}\n{END}\n"
    text = page.read_text(encoding="utf-8") if page.exists() else start
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ReportError(f"{page}: expected the markers {BEGIN} and {END}")
    replace_text(page, "\n".join([before + BEGIN, "", *tables(found), "", END + after]))


def main(arguments: list[str] | None = None) -> int:
    """Update the pages of the given sweeps; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP", help="folder of a sweep, or JSON file")
    parser.add_argument("--out", type=Path, default=PAGES, help="default: docs/claims")
    options = parser.parse_args(arguments)
    try:
        for folder in options.sweeps:
            found = read_recorded(folder) if folder.suffix == ".json" else results(folder)
            options.out.mkdir(parents=True, exist_ok=True)
            page = options.out / f"{found['name']}.md"
            update(page, found)
            replace_text(page.with_suffix(".json"), json.dumps(found, indent=1, allow_nan=False) + "\n")
            print(page)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
