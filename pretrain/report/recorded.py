"""Reading of report.json, with the claims judged again from their recorded values by the present rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, cast

from pretrain.report.errors import ReportError
from pretrain.report.judgement import judge
from pretrain.report.schema import SCHEMA_VERSION, ClaimResult, ReportResult
from pretrain.report.seeds import intervals_cover

_CRITERION = re.compile(r"(above|below) (\S+)")
_NOT_FINITE = " not finite at step "


def read_recorded(file: Path) -> ReportResult:
    """Read a report.json of this version or of version 1, which had no third verdict, and judge its claims again.

    Raises:
        ReportError: the file cannot be read, or is not a report.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["schema_version"]
        if version not in (1, SCHEMA_VERSION):
            raise ReportError(f"{file}: schema_version is {version!r}; expected 1 or {SCHEMA_VERSION}")
        content["claims"] = [_judged(claim) for claim in content["claims"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{file}: cannot be read as the numbers of a report: {error}") from None
    content["schema_version"] = SCHEMA_VERSION
    content.setdefault("varied_keys", [])
    content["intervals_cover"] = intervals_cover(content["varied_keys"])
    return cast(ReportResult, content)


def _judged(claim: dict[str, Any]) -> ClaimResult:
    """Judge a claim again; the reasons why seeds are missing are the parts of its note that begin with a seed."""
    match = _CRITERION.fullmatch(claim["criterion"])
    if match is None:
        raise ValueError(f"the criterion is {claim['criterion']!r}; expected above or below a number")
    missing = [part for part in claim["note"].split("; ") if part.startswith("seed ")]
    reservations = claim.get("reservations", [])
    found = judge(
        cast(Literal["above", "below"], match[1]),
        float(match[2]),
        claim["numbers"],
        missing=missing,
        broken=any(_NOT_FINITE in part for part in missing),
        reservations=reservations,
    )
    judged = {**claim, "verdict": found.outcome, "note": found.note, "reservations": reservations}
    return cast(ClaimResult, judged)
