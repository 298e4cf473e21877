"""Put the results of sweeps into docs/claims: the report, its numbers, and the tables of the page.

    python scripts/claims_pages.py runs/experiments/sweeps/dead-neurons ...

Writes docs/claims/NAME.html and NAME.json, and in docs/claims/NAME.md everything between the two markers; the text
around them is written by hand and stays. A page that is not there yet begins with the sweep's title and question.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain.processes.errors import UserError
from pretrain.report.errors import ReportError
from pretrain.report.schema import ReportResult, Summary
from pretrain.report.write import results, write_report

PAGES = Path(__file__).resolve().parent.parent / "docs" / "claims"
BEGIN, END = "<!-- result: written by scripts/claims_pages.py -->", "<!-- end of result -->"


def number(value: float | None, digits: str = ".4f") -> str:
    """A number, or a dash."""
    return "–" if value is None else format(value, digits)


def with_interval(found: Summary | None, digits: str = ".4f") -> str:
    """``mean ± half-width``."""
    if found is None:
        return "–"
    half = "" if found["half_width"] is None else f" ± {number(found['half_width'], digits)}"
    return number(found["mean"], digits) + half


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def tables(found: ReportResult) -> list[str]:
    """What the runs say, in Markdown."""
    jobs = found["jobs"]
    done = sum(job["state"] == "done" for job in jobs)
    where = found["provenance"]
    claims = [
        [
            claim["claim"],
            claim["criterion"],
            number(claim["mean"]) + ("" if claim["half_width"] is None else f" ± {claim['half_width']:.4f}"),
            ", ".join(number(value) for value in claim["numbers"].values()),
            f"**{claim['verdict']}**" + (f" ({claim['note']})" if claim["note"] else ""),
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
        lines += ["Criteria and thresholds are those of the sweep file.", "", *table(header, claims), ""]
    header = ["", "runs", "validation loss", "difference, paired", "starved", "leverage-dead", "activation-dead"]
    lines += ["At the last step:", "", *table(header, final)]
    if tuned:
        lines += ["", *table(["", "tried", "validation loss, seed 1", ""], tuned)]
    return lines


def update(page: Path, found: ReportResult) -> None:
    """Write the tables between the markers of a page."""
    start = f"# {found['title']}\n\n{found['question']}\n\n{BEGIN}\n{END}\n"
    text = page.read_text(encoding="utf-8") if page.exists() else start
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ReportError(f"{page}: expected the markers {BEGIN} and {END}")
    page.write_text("\n".join([before + BEGIN, "", *tables(found), "", END + after]), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Update the pages of the sweeps given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP_FOLDER")
    parser.add_argument("--out", type=Path, default=PAGES, help="default: docs/claims")
    options = parser.parse_args(arguments)
    try:
        for folder in options.sweeps:
            found = results(folder)
            options.out.mkdir(parents=True, exist_ok=True)
            print(write_report(folder, options.out / f"{found['name']}.html"))
            update(options.out / f"{found['name']}.md", found)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
