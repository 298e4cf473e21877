"""Writing files and folders that are complete or absent, whatever happens on the way."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(partial: Path, final: Path) -> None:
    """Give the complete folder `partial` its name; what had that name before is deleted only afterwards.

    The files in `partial` must be synced already.
    """
    sync(partial)
    replaced = final.with_name(final.name + ".old")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file in the place of an earlier one, in one rename; several processes may do so at once."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_aside(path: Path) -> None:
    """Move a file or folder into ``discarded/`` next to it, in the place of an earlier one of that name."""
    target = path.parent / "discarded" / path.name
    target.parent.mkdir(exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    path.replace(target)
