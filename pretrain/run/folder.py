"""The run folder: its files and its lock."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrain.files import may_pass, now, partial_files, read_limited, replace_text
from pretrain.run.json_lines import JsonLines
from pretrain.run.lock import RunError, RunLock, is_locked

TOKENIZER_FILE = "tokenizer.json"
"""The run folder's copy of the tokenizer, so that an export needs no other files."""
CONFIG_FILE = "config.yaml"


class RunFolder:
    """Paths and bookkeeping of ``<root>/<name>``.

    Attributes:
        path: the folder.
        metrics: metrics.jsonl.
        samples: samples.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.samples = JsonLines(path / "samples.jsonl")
        self._lock: RunLock | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def telemetry(self) -> Path:
        """Folder of the neuron measurements."""
        return self.path / "telemetry"

    @property
    def data_lock(self) -> Path:
        """The lock of the remote sources that the run was started with."""
        return self.path / "data.lock.json"

    @property
    def validation(self) -> Path:
        """The validation split of remote sources."""
        return self.path / "validation.npz"

    @property
    def manifest_path(self) -> Path:
        """manifest.json."""
        return self.path / "manifest.json"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None if there is none yet.

        Raises:
            RunError: it cannot be read.
        """
        try:
            found = json.loads(read_limited(self.manifest_path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{self.manifest_path}: cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise RunError(f"{self.manifest_path}: expected a mapping, got {type(found).__name__}")
        return found

    def tokenizer_of(self, path: str) -> Path | None:
        """The copy of the tokenizer, if there is one and it was made of the tokenizer that `path` names."""
        copy, settings = self.path / TOKENIZER_FILE, self.path / CONFIG_FILE
        if not copy.is_file() or not settings.is_file():
            return None
        try:
            kept = yaml.safe_load(settings.read_bytes())["tokenizer"]["path"]
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            return None
        return copy if kept == path else None

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest."""
        replace_text(self.manifest_path, json.dumps(manifest, indent=1))

    @property
    def repairable(self) -> set[str]:
        """The files of data that ended a launch by their bad rows: their contents may change on resume."""
        path = self._repairable_path
        try:
            found = json.loads(read_limited(path))
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path}: cannot be read: {error}; delete it if no data was repaired") from None
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise RunError(f"{path}: expected a list of files; delete it if no data was repaired")
        return set(found)

    def allow_repair(self, file: str) -> None:
        """Record that a file of data ended this launch by its bad rows."""
        replace_text(self._repairable_path, json.dumps(sorted({*self.repairable, file}), indent=1))

    @property
    def _repairable_path(self) -> Path:
        return self.path / "repairable.json"

    def record_sources(self, step: int, sources: Sequence[Mapping[str, Any]]) -> None:
        """Record in the manifest how much of each source had been read at a step (`pretrain.run.provenance`)."""
        self.write_manifest({**(self.manifest() or {}), "provenance": {"step": step, "sources": list(sources)}})

    @property
    def stop_file(self) -> Path:
        """A file that asks the run to stop; it stops one launch, which deletes it when it has stopped."""
        return self.path / "STOP"

    def mark_stopped(self, step: int, reason: str) -> None:
        """Record in the manifest when and why the run was stopped on request; the next launch removes the record."""
        self.write_manifest({**(self.manifest() or {}), "stopped": {"step": step, "reason": reason, "time": now()}})

    def mark_finished(self, step: int) -> None:
        """Record in the manifest that the run was completed at `step`."""
        self.write_manifest({**(self.manifest() or {}), "finished": {"step": step, "time": now()}})

    @property
    def finished(self) -> bool:
        """Whether the run was trained to its end; False if the manifest cannot be read (training it reports why)."""
        try:
            return "finished" in (self.manifest() or {})
        except RunError:
            return False

    def lock(
        self,
        wait_seconds: float = 0.0,
        stopped: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Create the folder, keep every other process from training in it, and delete what killed ones were writing.

        See `RunLock.acquire` for the arguments.

        Raises:
            RunError: another process trains in it, or it cannot be written.
            OSError: it cannot be written now, for example because the disk is full.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path)
            self._lock.acquire(wait_seconds, stopped, say)
        except OSError as error:
            if may_pass(error):
                raise
            raise RunError(f"{self.path}: cannot be written: {error}") from None
        # Hidden files are those of the lock, and the claim of another launch may be on its way.
        for file in [*partial_files(self.path, "[!.]*"), *partial_files(self.telemetry)]:
            with contextlib.suppress(OSError):
                file.unlink()

    def check_checkpoints(self) -> None:
        """Make sure that checkpoints can be written, if there is a place for them already.

        Raises:
            RunError: it is not a folder, such as a link to a disk that is not mounted, or it can only be read.
        """
        if not os.path.lexists(self.checkpoints):
            return
        if not self.checkpoints.is_dir():
            raise RunError(f"{self.checkpoints}: expected a folder; is the disk of the checkpoints not mounted?")
        probe = self.checkpoints / ".writable"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            if may_pass(error):
                raise
            raise RunError(f"{self.checkpoints}: cannot be written: {error.strerror}") from None

    def check_lock(self) -> None:
        """Make sure, before writing, that no other launch has taken the folder over.

        Raises:
            RunError: one has.
        """
        if self._lock is not None:
            self._lock.check()

    def claimant(self) -> str | None:
        """Describe the later attempt of the same Slurm job that waits for this launch; None if there is none."""
        return self._lock.claimant() if self._lock is not None else None

    def is_locked(self) -> bool:
        """Return whether a process is training in the folder; locks of other machines may not be visible."""
        return is_locked(self.path)

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
