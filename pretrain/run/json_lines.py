"""Files with one JSON object per line, such as metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

from pretrain.files import replace_text


def finite_or_none(value: Any) -> Any:
    """Return the value, or None for NaN and infinity, which JSON cannot represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines:
    """An append-only file of JSON objects, each with a ``step``. Several threads may append to it.

    Attributes:
        problem: why the last lines are not in the file yet, for example because the disk is full; None if they are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: OSError | None = None
        self._unwritten: list[str] = []
        self._lock = threading.Lock()

    def append(self, record: dict[str, Any]) -> None:
        """Append one line and flush it to the operating system. NaN and infinity become null.

        If the file cannot be written, the line stays in memory until the next call of `append` or `flush`.
        """
        line = json.dumps({key: finite_or_none(value) for key, value in record.items()}, allow_nan=False)
        with self._lock:
            self._unwritten.append(line + "\n")
        with contextlib.suppress(OSError):
            self.flush()

    def flush(self) -> None:
        """Append the lines that are kept in memory.

        Raises:
            OSError: they could not be written, and are still kept; the file is as it was.
        """
        with self._lock:
            if not self._unwritten:
                return
            size = None
            try:
                size = self.path.stat().st_size if self.path.exists() else 0
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(self._unwritten)
            except OSError as error:
                self.problem = error
                if size is not None:
                    with contextlib.suppress(OSError):
                        os.truncate(self.path, size)  # part of a line would spoil the next one
                raise
            self.problem = None
            self._unwritten.clear()

    def read(self) -> list[dict[str, Any]]:
        """Return all complete records, without a line that a crash cut off."""
        if not self.path.exists():
            return []
        return [record for record, _ in _records(self.path) if record is not None]

    def discard_after(self, step: int) -> int:
        """Move the records after `step`, and incomplete lines, to ``*.discarded.jsonl``; return how many.

        The file is replaced atomically after the moved records have been synced to disk.
        """
        self.flush()
        if not self.path.exists():
            return 0
        kept: list[str] = []
        moved: list[str] = []
        for record, line in _records(self.path):
            (kept if _step_of(record) <= step else moved).append(line)
        if moved:
            with self.path.with_suffix(".discarded.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(moved)
                file.flush()
                os.fsync(file.fileno())
        if moved or not _ends_with_a_line(self.path):  # what is appended next would be lost with the last record
            replace_text(self.path, "".join(kept))
        return len(moved)


def _ends_with_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) in (b"", b"\n")


def _step_of(record: dict[str, Any] | None) -> float:
    """The step of a record; infinite if it has none, or the line is incomplete or damaged."""
    step = None if record is None else record.get("step")
    return step if isinstance(step, int | float) and step == step else math.inf


def _records(path: Path) -> list[tuple[dict[str, Any] | None, str]]:
    found: list[tuple[dict[str, Any] | None, str]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        found.append((record if isinstance(record, dict) else None, line + "\n"))
    return found
