"""The page that `bench_eval.py` writes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

_PAGE = """\
# Evaluation

<!-- Written by `python scripts/bench_eval.py --page`; do not edit. -->

`aurora eval` against the `lm_eval` command on {date}: {cores} cores of {cpu}, {threads} threads; {versions}. The model
is {model} ({parameters:.1f}M parameters, SHA-256 {digest}), evaluated zero-shot on {items}.
Both are commands of the same interpreter, one for each task, that alternate over {rounds} round(s); lm_eval's batch
size is {batch}, ours is chosen automatically.

## Time (float32)

Seconds, the median of the rounds; without start: less the time of the same command for 2 items.

| task | `aurora eval` | `lm_eval` | ratio | `aurora eval` without start | `lm_eval` without start | ratio |
|---|---|---|---|---|---|---|
{times}

## Scores (float32)

| task | items | metric | `aurora eval` | `lm_eval` | largest difference of a log-likelihood, per token |
|---|---|---|---|---|---|
{scores}

{flips}

{apart}

From a float64 softmax of the plain model's logits ({sample} items a task), log-likelihoods differ by at most
{exact_ours:.1e} a token (`aurora eval`) and {exact_theirs:.1e} a token (`lm_eval`).

## bfloat16

Logits have 8 significant bits here, so that the order of sums alone, which depends on the batch, moves them. By
default, lm_eval also rounds the softmax to bfloat16.

| `lm_eval`'s softmax | task | flips | largest difference per token | flipped items (metric, margin in nats) |
|---|---|---|---|---|
{narrow}
"""


def write_page(report: dict[str, Any], folder: Path) -> None:
    """Write eval.md and eval.json."""
    (folder / "eval.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "eval.md").write_text(page(report), encoding="utf-8")


def page(report: dict[str, Any]) -> str:
    """Return the text of the page."""
    machine = report["machine"]
    flips = [
        f"- {task}, item {flip['doc_id']}, {flip['metric']}: margin {flip['margin']:.1e} nats, {flip['tokens']} tokens"
        for task, figures in report["float32"].items()
        for flip in figures["flips"]
    ]
    return _PAGE.format(
        date=report["date"],
        cores=machine["cores"],
        cpu=machine["machine"],
        threads=machine["threads"],
        versions=machine["versions"],
        model=report["model"]["name"],
        parameters=report["model"]["parameters"] / 1e6,
        digest=report["model"]["sha256"][:12],
        items=", ".join(
            f"the first {limit:,} items of {task}" if limit else f"all items of {task}"
            for task, limit in report["limits"].items()
        ),
        rounds=max(len(seconds["lm_eval"]) for seconds in report["seconds"].values()),
        batch=report["lm_eval_batch_size"],
        times="\n".join(_times(report)),
        scores="\n".join(_scores(report)),
        flips="Items whose outcome differs:\n\n" + "\n".join(flips) if flips else "No item's outcome differs.",
        apart=_apart(report),
        sample=report["sample"],
        exact_ours=report["from_float64"]["aurora eval"],
        exact_theirs=report["from_float64"]["lm_eval"],
        narrow="\n".join(_narrow(report)),
    )


def _apart(report: dict[str, Any]) -> str:
    lines = [
        f"- {task}, item {choice['doc_id']}, choice {choice['choice']}: `aurora eval` {choice['aurora eval']:.1e} a "
        f"token from the model in float64, `lm_eval` {choice['lm_eval']:.1e}"
        for task, figures in report["float32"].items()
        for choice in figures["apart"]
    ]
    if not lines:
        return "All log-likelihoods are within 2e-5 a token of each other."
    return "Log-likelihoods more than 2e-5 a token apart, and who is off:\n\n" + "\n".join(lines)


def _times(report: dict[str, Any]) -> list[str]:
    rows = []
    for task, seconds in report["seconds"].items():
        median = {name: statistics.median(values) for name, values in seconds.items()}
        whole = [f"{median[side]:.1f}" for side in ("aurora eval", "lm_eval")]
        net = [f"{median[side] - median[f'{side}, start']:.1f}" for side in ("aurora eval", "lm_eval")]
        ratios = [f"{report[name][task]:.2f}" for name in ("speed", "speed_without_start")]
        rows.append(f"| {task} | {' | '.join(whole)} | {ratios[0]} | {' | '.join(net)} | {ratios[1]} |")
    return rows


def _scores(report: dict[str, Any]) -> list[str]:
    rows = []
    for task, figures in report["float32"].items():
        metrics = report["metrics"][task]
        for metric in ("acc", "acc_norm"):
            if metric in metrics:
                sides = zip(metrics[metric], metrics[f"{metric}_stderr"], strict=True)
                ours, theirs = (f"{mean:.4f} ± {error:.4f}" for mean, error in sides)
                difference = f"{figures['largest_difference_per_token']:.1e}"
                rows.append(f"| {task} | {figures['items']:,} | {metric} | {ours} | {theirs} | {difference} |")
    return rows


def _narrow(report: dict[str, Any]) -> list[str]:
    rows = []
    for softmax, tasks in report["bfloat16"].items():
        for task, figures in tasks.items():
            flips = figures["flips"]
            listed = ", ".join(f"{flip['doc_id']} ({flip['metric']}, {flip['margin']:.2g})" for flip in flips)
            kind = "bfloat16 (default)" if softmax == "None" else softmax
            difference = f"{figures['largest_difference_per_token']:.1e}"
            rows.append(f"| {kind} | {task} | {len(flips)} | {difference} | {listed or 'none'} |")
    return rows
