"""Lists of the items that somebody selected from a task, by name from the Hub or from a file of the user.

GoldenSwag (Chizhov et al. 2025, arXiv 2504.07825) is what remains of HellaSwag without items that are ungrammatical,
have several correct answers, or can be answered without their context: 1,525 of 10,042.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download

from eval.errors import EvalError, first_line
from eval.hub import early_silence, outcome_within, silence_about
from eval.item_identity import IDENTIFYING_COLUMNS, ItemIdentity
from pretrain.files import at_home
from pretrain.processes.errors import did_you_mean
from pretrain.processes.redaction import redact

_NAME = re.compile(r"[\w.-]+")
_DOWNLOAD_SECONDS = 60.0
"""How long the download of a list, of less than a megabyte, may take."""
_NUMBER = re.compile(r"[0-9]{1,18}")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubSubset:
    """A subset that is a data set on the Hub, with the columns of the data set that it was selected from."""

    task: str
    repository: str
    files: str
    """Pattern of its parquet files."""


HUB_SUBSETS = {"goldenswag": HubSubset("hellaswag", "PleIAs/GoldenSwag", "data/validation-*.parquet")}
"""By name."""


@dataclass(frozen=True)
class SubsetList:
    """A list of items."""

    name: str
    task: str
    """The task that they were selected from."""
    kind: str
    """What `values` are: doc_id, doc_hash, or columns (`IDENTIFYING_COLUMNS` of the task)."""
    values: frozenset[Any]
    origin: str
    revision: str | None = None

    def places(self, identities: Sequence[ItemIdentity]) -> set[int]:
        """Return the doc_ids of the items.

        Raises:
            EvalError: the split does not have all of them.
        """
        found: dict[Any, set[int]] = {}
        for place, one in enumerate(identities):
            value = {"doc_id": place, "doc_hash": one.doc_hash}.get(self.kind, one.columns)
            found.setdefault(value, set()).add(place)
        # A split may repeat an item, but different items must not have the same columns.
        if self.kind == "columns" and len(found) < len({one.doc_hash for one in identities}):
            columns = " and ".join(IDENTIFYING_COLUMNS[self.task])
            raise EvalError(f"{columns} are not unique in {self.task}; list the items by doc_hash")
        unknown = self.values - found.keys()
        if unknown:
            raise EvalError(
                f"the subset {self.name} is not of these items: {len(unknown):,} of its {len(self.values):,} are not"
                f" among the {len(identities):,} of {self.task}, for example {min(map(str, unknown))}"
            )
        return set().union(*(found[value] for value in self.values))


def subset_name(request: str) -> str:
    """Return the name that `read_subset` gives a subset."""
    label = request.partition("=")[0]
    return label.partition(":")[2] if ":" in label else label


def read_subset(request: str) -> SubsetList:
    """Read a subset.

    Args:
        request: NAME for one of `HUB_SUBSETS`, or [TASK:]NAME=FILE; the task is hellaswag if none is given. A `.txt`
            file has one doc_id or doc_hash in each line; a `.jsonl` or `.parquet` file has one of the columns doc_id
            and doc_hash, or the `IDENTIFYING_COLUMNS` of the task.

    Raises:
        EvalError: the subset does not exist or cannot be read.
    """
    label, separator, path = request.partition("=")
    task = label.partition(":")[0] if ":" in label else "hellaswag"
    name = subset_name(request)
    if not separator:
        if request not in HUB_SUBSETS:
            known = ", ".join(HUB_SUBSETS)
            raise EvalError(
                f"unknown subset {request!r}{did_you_mean(request, HUB_SUBSETS)} (known: {known}; NAME=FILE reads one)"
            )
        return _from_hub(request, HUB_SUBSETS[request])
    if not _NAME.fullmatch(name) or not _NAME.fullmatch(task):
        raise EvalError(f"a subset cannot be called {label!r}; expected [TASK:]NAME=FILE")
    return _from_file(name, task, at_home(path))


def _from_hub(name: str, subset: HubSubset) -> SubsetList:
    hub = redact(constants.ENDPOINT)
    silence = early_silence(keep=True) or silence_about(subset.repository)
    options: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": [subset.files]}
    outcome = outcome_within(
        _DOWNLOAD_SECONDS,
        lambda: Path(snapshot_download(subset.repository, local_files_only=bool(silence), **options)),
    )
    if isinstance(outcome, Exception):  # the client raises anything
        reason = f"it is not in the Hugging Face cache, and {silence}" if silence else first_line(outcome)
        raise EvalError(
            f"cannot fetch the subset {name} from {subset.repository} at {hub}: {reason}; a list in a"
            f" file works offline: --subset {name}=FILE"
        ) from outcome
    folder = outcome
    files = sorted(folder.glob(subset.files))
    if not files:
        raise EvalError(f"{subset.repository} at {hub} has no file {subset.files}")
    rows = (row for file in files for row in _parquet(file, subset.task))
    return _list_of(name, subset.task, rows, subset.repository, subset.repository, folder.name)


def _from_file(name: str, task: str, file: Path) -> SubsetList:
    if file.suffix == ".parquet":
        return _list_of(name, task, _parquet(file, task), "file", str(file))
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:  # also of a name with a null character
        raise EvalError(f"cannot read {file}: {error}") from error
    if file.suffix == ".jsonl":
        return _list_of(name, task, _json_rows(file, lines), "file", str(file))
    if file.suffix != ".txt":
        raise EvalError(f"{file}: expected a list of items that ends in .txt, .jsonl or .parquet")
    if not all(_NUMBER.fullmatch(line) or _HEX.fullmatch(line) for line in lines):
        raise EvalError(f"{file}: expected one doc_id (a number) or one doc_hash (64 hexadecimal digits) in each line")
    # Sixty-four decimal digits are a hash.
    rows = [{"doc_hash": line} if _HEX.fullmatch(line) else {"doc_id": int(line)} for line in lines]
    return _list_of(name, task, rows, "file", str(file))


def _json_rows(file: Path, lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvalError(f"{file}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise EvalError(f"{file}, line {number}: expected a mapping")
        yield row


def _parquet(file: Path, task: str) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Opened here: pyarrow would take a path that looks like a URL for one.
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read_bytes()))
        wanted = {"doc_id", "doc_hash", *IDENTIFYING_COLUMNS.get(task, ())}
        rows: list[dict[str, Any]] = table.read([c for c in table.schema_arrow.names if c in wanted]).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise EvalError(f"cannot read {file}: {error}") from error
    return rows


def _list_of(
    name: str, task: str, rows: Iterable[dict[str, Any]], origin: str, where: str, revision: str | None = None
) -> SubsetList:
    """A list from rows that all identify an item in the same way."""
    columns = IDENTIFYING_COLUMNS.get(task, ())
    found: dict[str, set[Any]] = {}
    for row in rows:
        if isinstance(row.get("doc_hash"), str):
            found.setdefault("doc_hash", set()).add(row["doc_hash"])
        elif type(row.get("doc_id")) is int:
            found.setdefault("doc_id", set()).add(row["doc_id"])
        elif columns and all(row.get(column) is not None for column in columns):
            found.setdefault("columns", set()).add(tuple(str(row[column]) for column in columns))
        else:
            wanted = ["doc_hash", "doc_id", *([" and ".join(columns)] if columns else [])]
            raise EvalError(f"{where}: an entry has none of {', '.join(wanted)}, which identify an item of {task}")
    if len(found) != 1:
        raise EvalError(f"{where}: " + ("no items" if not found else f"mixes {' and '.join(sorted(found))}"))
    ((kind, values),) = found.items()
    return SubsetList(name, task, kind, frozenset(values), origin, revision)
