"""Provenance of the training text: what each source is, and how much of it a run has read.

A checkpoint holds these records under ``provenance.sources``, the manifest of a run those of its last checkpoint, and
the model card of an export shows them. They are put together from what every checkpoint holds anyway: config,
fingerprint of the data, and state of the stream. So checkpoints of older versions have them too, except for what was
not recorded then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from pretrain.config.data import DataConfig
from pretrain.data.budget import SourceBudget

TOGETHER = "all sources together"


class SourceRecord(TypedDict):
    """One source of the config, or all of them if their text was not counted separately. JSON-serialisable."""

    name: str
    path: str | None
    """As in the config, without secrets; None for all sources together."""
    revision: str | None
    """The commit of a source on the Hub; None if its store has no commits. A local file has a digest in the manifest.
    """
    licences: list[str]
    """Empty if none is stated."""
    prepared_from: str | None
    """Of a prepared folder: the source of text that it was made from, with its revision; `revision` is of that source
    then. None for text."""
    parts: list[str]
    """The values of a column `source`, such as titles; empty if there is none."""
    files: int
    bytes: int
    """Of the files."""
    documents: int | None
    """Documents trained on, repetitions included; None: not counted."""
    tokens: int | None
    """Targets trained on, separators included; None: not counted."""
    completed_epochs: int | None
    """Times that the source has been read to its end; None: not counted."""
    epochs: float | None
    """`tokens` over the tokens of the training split, which are an estimate unless the source is prepared; None: not
    known."""


def source_records(
    config: DataConfig,
    data: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    budgets: Sequence[SourceBudget] = (),
) -> list[SourceRecord]:
    """Describe every source of a run, in the order of the config.

    A state of an older version that was saved without a mixture has counts of all sources together only: they have none
    of their own then, and a last record describes all of them.

    Args:
        config: the sources.
        data: `pretrain.data.fingerprint` of them.
        state: of the stream, as a checkpoint of any version holds it; None: nothing has been read.
        budgets: the tokens that each source holds, by which `epochs` is computed; empty if they are not known.
    """
    records = [_describe(name, source) for name, source in zip(config.names, data["sources"], strict=True)]
    available = [budget.available.value for budget in budgets]
    counts = _counts(state)
    if len(counts) == len(records):
        for record, count, tokens in zip(records, counts, available or [0.0] * len(records), strict=True):
            _count(record, count, tokens)
    elif len(counts) == 1:
        records.append(_together(records))
        _count(records[-1], counts[0], sum(available))
    elif state is None:
        for record, tokens in zip(records, available or [0.0] * len(records), strict=True):
            _count(record, _NOTHING, tokens)
    return records


_NOTHING = {"documents": 0, "tokens": 0, "epoch": 0}


def _describe(name: str, source: Mapping[str, Any]) -> SourceRecord:
    locked, origin = source.get("locked") or {}, source.get("origin") or {}
    return SourceRecord(
        name=name,
        path=source["path"],
        revision=locked.get("revision") or origin.get("revision"),
        prepared_from=origin.get("pinned") or origin.get("path"),
        licences=list(source["licences"]),
        parts=list(source["sources"]),
        files=locked["files"] if locked else len(source["files"]),
        bytes=source["bytes"],
        documents=None,
        tokens=None,
        completed_epochs=None,
        epochs=None,
    )


def _together(records: Sequence[SourceRecord]) -> SourceRecord:
    return SourceRecord(
        name=TOGETHER,
        path=None,
        revision=None,
        prepared_from=None,
        licences=sorted({licence for record in records for licence in record["licences"]}),
        parts=[],
        files=sum(record["files"] for record in records),
        bytes=sum(record["bytes"] for record in records),
        documents=None,
        tokens=None,
        completed_epochs=None,
        epochs=None,
    )


def _counts(state: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """What the stream has counted, for each source or for all together; nothing if the state has no counts."""
    if not state:
        return []
    if "sources" in state:
        of_rings = list(state["sources"])
        if len(of_rings) == 1 and "of_sources" in of_rings[0]:
            return [{**counts, "epoch": of_rings[0]["epoch"]} for counts in of_rings[0]["of_sources"]]
        return of_rings
    return [state] if "epoch" in state else []  # version 1, which counted epochs only


def _count(record: SourceRecord, count: Mapping[str, Any], available: float) -> None:
    record["documents"], record["tokens"] = count.get("documents"), count.get("tokens")
    record["completed_epochs"] = count.get("epoch")
    if record["tokens"] is not None and available:
        record["epochs"] = round(record["tokens"] / available, 4)


def as_table(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the records as rows for people: lists as text, and in words what is not stated or was not counted."""
    together = any(record["name"] == TOGETHER for record in records)
    return [_as_row(record, together and record["name"] != TOGETHER) for record in records]


def _as_row(record: Mapping[str, Any], counted_together: bool) -> dict[str, Any]:
    unknown = "counted together" if counted_together else "not recorded"
    epochs = record["epochs"]
    if epochs is None and record["completed_epochs"] is not None:
        epochs = f"{record['completed_epochs']} completed"
    row = {
        "name": record["name"],
        "path": " from ".join(filter(None, [record["path"], record.get("prepared_from")])),
        "revision": record["revision"] or "",
        "licence": ", ".join(record["licences"]) or "not stated",
        "parts": ", ".join(record["parts"]),
        "files": record["files"],
        "bytes": record["bytes"],
        "documents": record["documents"],
        "tokens": record["tokens"],
        "epochs": epochs,
    }
    return {key: unknown if value is None else value for key, value in row.items()}


def datasets_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the data sets of the Hub among the sources, as ``organisation/name``, each once."""
    prefix = "hf://datasets/"
    named = [record.get("prepared_from") or record["path"] or "" for record in records]
    paths = [path for path in named if path.startswith(prefix)]
    return list(dict.fromkeys("/".join(path[len(prefix) :].split("@")[0].split("/")[:2]) for path in paths))
