"""Compare models by bits per byte on the same held-out text, paired by document.

The difference of two ratios with one denominator is itself a ratio of sums: (bits of one - bits of the other) / bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from scipy.stats import t as student

from eval.compare_schema import BitsComparison
from eval.paired import ERROR, holm
from eval.ratios import FEWEST_DOCUMENTS, ratio_interval, ratio_of_sums
from eval.schema import EvalResult
from eval.validity_schema import BitsPerByte


def compare_bits(labels: Sequence[str], results: Sequence[EvalResult]) -> list[BitsComparison]:
    """Compare each result with the first one, on the texts that all of them have.

    Args:
        labels: what each model is called.
        results: without the problems that `bits_problems` yields.
    """
    texts = _shared(results)
    rows = [
        _row(text, labels[0], results[0]["bits_per_byte"][text], label, result["bits_per_byte"][text])
        for label, result in zip(labels[1:], results[1:], strict=True)
        for text in texts
    ]
    for row, corrected in zip(rows, holm([row["difference_p"] for row in rows]), strict=True):
        row["difference_p_corrected"] = corrected
        if corrected <= ERROR:
            row["outcome"] = "different"
            row["better"] = row["model"] if row["difference"] < 0 else row["baseline"]
    return rows


def bits_problems(labels: Sequence[str], results: Sequence[EvalResult]) -> Iterator[str]:
    """Yield why texts of the same name cannot be compared."""
    for text in _shared(results):
        first = results[0]["bits_per_byte"][text]
        for label, result in zip(labels[1:], results[1:], strict=True):
            other = result["bits_per_byte"][text]
            if _documents(first) != _documents(other):
                yield (
                    f"{text}: {labels[0]} and {label} were measured on different texts: {first['documents']:,} and"
                    f" {other['documents']:,} documents; measure both on the same file with the same --limit"
                )


def bits_notes(labels: Sequence[str], results: Sequence[EvalResult]) -> Iterator[str]:
    """Yield what a reader should know about bits per byte that can be compared."""
    for text in _shared(results):
        found = [result["bits_per_byte"][text] for result in results]
        windows = [f"{one['context']:,}/{one['stride']:,}" for one in found]
        if len(set(windows)) > 1:
            of_each = ", ".join(f"{label} {window}" for label, window in zip(labels, windows, strict=True))
            yield f"{text}: context and stride in tokens differ: {of_each}; more context means fewer bits"
        for label, one in zip(labels, found, strict=True):
            if one["documents_changed_by_tokenizer"]:
                changed = one["documents_changed_by_tokenizer"]
                yield f"{text}: the tokenizer of {label} changes the text of {changed:,} documents"


def _shared(results: Sequence[EvalResult]) -> list[str]:
    return [
        text
        for text in results[0].get("bits_per_byte", {})
        if all(text in result.get("bits_per_byte", {}) for result in results)
    ]


def _documents(text: BitsPerByte) -> list[tuple[str, int]]:
    return [(one["doc_hash"], one["bytes"]) for one in text["per_document"]]


def _row(text: str, baseline: str, one: BitsPerByte, model: str, two: BitsPerByte) -> BitsComparison:
    pairs = zip(one["per_document"], two["per_document"], strict=True)
    changes = [other["bits"] - first["bits"] for first, other in pairs]
    sizes = [document["bytes"] for document in one["per_document"]]
    return {
        "text": text,
        "model": model,
        "baseline": baseline,
        "score": two["bits_per_byte"],
        "baseline_score": one["bits_per_byte"],
        "difference": math.fsum(changes) / sum(sizes),
        "interval": ratio_interval(changes, sizes) if len(changes) >= FEWEST_DOCUMENTS else None,
        "num_documents": len(changes),
        "won": sum(change < 0 for change in changes),
        "lost": sum(change > 0 for change in changes),
        "difference_p": _no_difference(changes, sizes),
        "difference_p_corrected": 1.0,
        "outcome": "undecided",
    }


def _no_difference(changes: Sequence[float], sizes: Sequence[int]) -> float:
    """P value of a ratio of 0: its t statistic by linearisation."""
    count = len(changes)
    if count < 2 or not any(changes):
        return 1.0
    ratio, error = ratio_of_sums(changes, sizes)
    return float(2 * student.sf(abs(ratio) / error, count - 1)) if error else 0.0
