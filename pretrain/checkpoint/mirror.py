"""A copy of a run's checkpoints in an object store, or in any other place that fsspec knows.

The copy of a checkpoint has the files of the folder, with the index written last, so that what an interrupted upload
leaves behind is not a checkpoint. Credentials come from the environment, as the libraries of the stores document it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.checkpoint.format import INDEX, CheckpointError
from pretrain.checkpoint.store import CheckpointReader, is_checkpoint_name, list_checkpoints, step_of
from pretrain.files import publish_folder, sync
from pretrain.processes.redaction import redact


class Mirror:
    """The copies of one run's checkpoints.

    Args:
        url: the folder of the copies, such as ``s3://bucket/runs/NAME``.
        keep_last: copies to keep, if not as many checkpoints are left in the run's own folder.
        warn: prints a warning. An upload that fails is a warning, and the next one makes up for it.

    Raises:
        CheckpointError: the store's library is not installed, or this kind of store is not known.
    """

    def __init__(self, url: str, keep_last: int = 1, warn: Callable[[str], None] = lambda line: None) -> None:
        self.url, self._keep_last, self._warn = url.rstrip("/"), keep_last, warn
        self._system, self._root = _open(self.url)
        self._wanted = threading.Condition()
        self._uploading: threading.Thread | None = None
        self._again: Path | None = None

    def push(self, root: Path) -> None:
        """Begin to make the copies equal to the checkpoints under `root`; returns immediately.

        While one upload runs, the next one waits; of several that wait, the last includes the others.
        """
        with self._wanted:
            self._again = root
            if self._uploading is None:
                self._uploading = threading.Thread(target=self._upload, name="mirror", daemon=True)
                self._uploading.start()

    def settle(self) -> None:
        """Wait for the uploads."""
        thread = self._uploading
        if thread is not None:
            thread.join()

    def steps(self) -> list[str]:
        """The names of the complete copies, oldest first."""
        try:
            self._system.invalidate_cache()
            found = self._system.find(self._root)
        except FileNotFoundError:
            return []
        names = [path.rsplit("/", 2)[-2] for path in found if path.endswith(f"/{INDEX}")]
        return sorted(filter(is_checkpoint_name, names), key=lambda name: (len(name), name))

    def fetch_newest(self, root: Path) -> Path | None:
        """Download the newest intact copy; return its folder under `root`, or None if there is no copy.

        Raises:
            CheckpointError: there are copies, but none is intact, or the store cannot be read.
        """
        try:
            names = self.steps()
            problems = []
            for name in reversed(names):
                try:
                    return self._fetch(name, root)
                except CheckpointError as error:
                    problems.append(f"{self.url}/{name}: {error}")
        except Exception as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.url}: cannot be read: {_one_line(error)}") from None
        if problems:
            raise CheckpointError("\n".join([*problems, f"{self.url}: no intact checkpoint to resume from"]))
        return None

    def _fetch(self, name: str, root: Path) -> Path:
        partial = root / f"{name}.tmp"
        partial.mkdir(parents=True, exist_ok=True)
        for path in self._system.find(f"{self._root}/{name}"):
            target = partial / path.rsplit("/", 1)[-1]
            self._system.get_file(path, str(target))
            sync(target)
        CheckpointReader(partial).verify()
        publish_folder(partial, root / name)
        return root / name

    def _upload(self) -> None:
        while True:
            with self._wanted:
                root, self._again = self._again, None
                if root is None:
                    self._uploading = None
                    return
            try:
                self._make_equal(root)
            except Exception as error:  # of whatever library; training does not depend on it
                self._warn(f"{self.url}: checkpoint not copied: {_one_line(error)}")

    def _make_equal(self, root: Path) -> None:
        local, copies = list_checkpoints(root), self.steps()
        if not local:
            return  # the folder is gone, unmounted for example: the copies are all that is left
        for folder in reversed(local):
            if not self._is_copied(folder, copies):
                self._copy(folder)
        # Nothing is deleted before the newest copy is complete.
        newest = step_of(local[-1])
        names = {folder.name for folder in local}
        others = [Path(name) for name in copies if name not in names and step_of(Path(name)) < newest]
        passed = [name for name in copies if name not in names and step_of(Path(name)) > newest]  # of a run gone back
        for name in [*passed, *(path.name for path in others[: len(others) - self._spare(len(local))])]:
            self._delete(name)

    def _spare(self, local: int) -> int:
        """How many older copies to keep where the run's folder has lost the checkpoints themselves."""
        return max(0, self._keep_last - local)

    def _is_copied(self, folder: Path, copies: list[str]) -> bool:
        """Whether there is a copy of this very checkpoint, and not of an earlier one of the same step."""
        return folder.name in copies and self._system.cat_file(f"{self._root}/{folder.name}/{INDEX}") == (
            (folder / INDEX).read_bytes()
        )

    def _copy(self, folder: Path) -> None:
        target = f"{self._root}/{folder.name}"
        self._delete(folder.name)
        try:
            for path in sorted(folder.iterdir(), key=lambda path: path.name == INDEX):  # the index last
                self._system.put_file(str(path), f"{target}/{path.name}")
        except FileNotFoundError:
            if folder.exists():
                raise
            # The run has deleted it meanwhile; a newer one is complete and asked for.
            self._delete(folder.name)

    def _delete(self, name: str) -> None:
        """Delete a copy, or what an interrupted upload has left, the index first."""
        target = f"{self._root}/{name}"
        if self._system.exists(f"{target}/{INDEX}"):
            self._system.rm_file(f"{target}/{INDEX}")
        if self._system.exists(target):
            self._system.rm(target, recursive=True)


def check_library(url: str) -> None:
    """Make sure that the library of a store is installed, without connecting to anything.

    Raises:
        CheckpointError: it is not.
    """
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(url.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"checkpoint.mirror: {url}: {_one_line(error)}") from None


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options = {"auto_mkdir": True} if url.startswith("file:") else {"use_listings_cache": False}
    try:
        system, root = url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"checkpoint.mirror: {url}: {_one_line(error)}") from None
    return system, root.rstrip("/")


def _one_line(error: BaseException) -> str:
    """The beginning of an error without secrets, such as the signed query of a URL."""
    return redact(f"{type(error).__name__}: {error}".splitlines()[0])[:300]
