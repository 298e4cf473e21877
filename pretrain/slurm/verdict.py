"""Which nodes of a job are bad, judged by the reports of `pretrain.slurm.health`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pretrain.slurm.health import Kind, Report

SLOW_GPU = 0.7
"""A GPU below this share of the job's median is too slow: it is throttled or shared, and all others wait for it."""
SLOW_NETWORK = 0.25
"""A node below this share of the median rate has a network card or a cable that fell back to a lower speed."""
ENOUGH = 4
"""Values below which a median says nothing."""


@dataclass(frozen=True)
class Findings:
    """What the reports say.

    Attributes:
        bad: node -> what is wrong with it.
        problem: what no exclusion of nodes would mend; empty if there is nothing.
        hopeless: whether the same would happen again at a restart.
    """

    bad: Mapping[str, Sequence[str]] = field(default_factory=dict)
    problem: str = ""
    hopeless: bool = False


def read_reports(folder: Path) -> dict[str, Report]:
    """Return the reports by node."""
    found: dict[str, Report] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            report: Any = json.loads(path.read_text(encoding="utf-8"))
            found[str(report["node"])] = Report(**{key: report[key] for key in Report.__annotations__})  # type: ignore[typeddict-item]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # its node counts as silent
    return found


def examine(reports: Mapping[str, Report], nodes: Sequence[str], seconds: float, unwritable: str = "") -> Findings:
    """Decide which nodes are bad.

    Args:
        reports: by node.
        nodes: all nodes of the job, the first one first.
        seconds: how long they had to report.
        unwritable: why they could not leave their reports; empty if they could. Silence then says nothing about a node.
    """
    if unwritable and any(node not in reports for node in nodes):
        broken = {node: [*_texts(reports[node], "gpu"), *_texts(reports[node], "disk")] for node in reports}
        return Findings({node: texts for node, texts in broken.items() if texts and node in nodes}, unwritable)
    if not any(node in reports for node in nodes):
        return Findings(problem=f"no node has reported within {seconds:.0f} s")
    first, others = nodes[0], nodes[1:]
    unreached = {node: _texts(reports[node], "network") for node in others if node in reports}
    unreached = {node: texts for node, texts in unreached.items() if texts}
    nameless = [node for node in others if node in reports and _texts(reports[node], "name")]
    if nameless and len(nameless) == len(others):
        return Findings(
            problem=f"{_texts(reports[nameless[0]], 'name')[0]}. Set AURORA_RENDEZVOUS_HOST to a name or an address at "
            "which all nodes reach the first one",
            hopeless=True,
        )
    bad = {node: [f"did not report within {seconds:.0f} s"] for node in nodes if node not in reports}
    for node, report in reports.items():
        if node in nodes and (texts := [problem["text"] for problem in report["problems"]]):
            bad[node] = texts
    _add_slow(bad, reports)
    own = first in reports and _texts(reports[first], "network")
    if unreached and (own or len(unreached) == len(others)):
        # All of them, or the only one: the first node is what they have in common.
        for node in unreached:
            if len(bad[node]) == len(unreached[node]):
                del bad[node]
        text = next(iter(unreached.values()))[0]
        if not own and len(others) == 1:
            return Findings(bad, f"{others[0]}: {text}; whether it or {first} is to blame is not known")
        if not own:
            bad[first] = [f"no other node reaches it ({text})"]
    if len(nodes) > 1 and len(bad) == len(nodes):
        node = nodes[0]
        return Findings(
            problem=f"all {len(nodes)} nodes fail the check, so the cause is not a single node; {node}: "
            f"{'; '.join(bad[node])}",
            hopeless=True,
        )
    return Findings(bad)


def _texts(report: Report, kind: Kind) -> list[str]:
    return [problem["text"] for problem in report["problems"] if problem["kind"] == kind]


def _add_slow(bad: dict[str, list[str]], reports: Mapping[str, Report]) -> None:
    """Add the nodes that are much slower than most."""
    rates = {node: report["gpu_tflops"] for node, report in reports.items()}
    measured = [rate for node in rates for rate in rates[node] if rate]
    typical = median(measured) if len(measured) >= ENOUGH else 0.0
    for node, of_gpus in rates.items():
        for index, rate in enumerate(of_gpus):
            if 0 < rate < SLOW_GPU * typical:
                text = f"GPU {index}: {rate:.0f} TFLOP/s, where the median of the job is {typical:.0f}"
                bad.setdefault(node, []).append(text)
    links = {node: report["network_mbytes"] for node, report in reports.items()}
    received = [rate for rate in links.values() if rate]
    typical = median(received) if len(received) >= ENOUGH else 0.0
    for node, link in links.items():
        if link and link < SLOW_NETWORK * typical:
            text = f"sends {link:.0f} MB/s to the first node, where the median is {typical:.0f}"
            bad.setdefault(node, []).append(text)
