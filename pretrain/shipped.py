"""Files that come with the package: the configs, the batch script for Slurm, the vendored text and tokenizer.

In a checkout they lie at its root, in `configs/`, `slurm/` and `assets/`. A wheel has the same folders inside the
package, in `shipped_files/` (see `package-dir` in pyproject.toml).

    python -m pretrain.shipped slurm/pretrain.sbatch     prints where the file is
"""

from __future__ import annotations

import argparse
import functools
import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.processes.errors import UserError
from pretrain.processes.exit_codes import BAD_INPUT
from pretrain.processes.failures import is_first_to_say

FOLDERS = ("assets", "configs", "slurm")
_INSTALLED = Path(__file__).parent / "shipped_files"
_CHECKOUT = Path(__file__).parents[1]


def shipped(name: str) -> Path:
    """Return the absolute path of a file or folder that comes with the package.

    Args:
        name: a relative path with `/`, such as ``configs/quickstart.yaml`` or ``slurm/pretrain.sbatch``.

    Raises:
        UserError: nothing of that name comes with the package.
    """
    path = _root() / name
    if not _is_shipped_name(name) or not path.exists():
        raise UserError(f"{name}: no such file in the package; it has {', '.join(FOLDERS)} in {_root()}")
    return path


def locate(path: str, folder: str | os.PathLike[str] = "") -> str:
    """Return the path or glob to read for a path that a person gave, relative to `folder` (the working directory).

    A path that matches something is returned with `folder` in front. One that matches nothing but names shipped files,
    such as ``assets/corpus/*.parquet``, becomes their absolute path, which is printed once. Any other path is returned
    like the first, for the caller to report; a URL as it is.
    """
    if "://" in path:
        return path
    given = os.path.join(folder, path)
    if not _is_shipped_name(path) or _matches(given):
        return given
    ours = str(_root() / path)
    if not _matches(ours):
        return given
    _note(given, ours)
    return ours


def _root() -> Path:
    # An installed package never searches its parent folder: site-packages may hold another project's `configs`.
    return _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def _is_shipped_name(path: str) -> bool:
    parts = Path(path).parts
    return bool(parts) and parts[0] in FOLDERS and ".." not in parts


def _matches(path: str) -> bool:
    return Path(path).exists() or bool(glob.glob(path, recursive=True))


@functools.cache
def _note(path: str, ours: str) -> None:
    """Print which file is used, once per host and launch."""
    note = f"note: {path} does not exist here; using {ours}"
    if is_first_to_say(note):
        print(note, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the path of a shipped file; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.shipped", description="Print where a shipped file is.")
    parser.add_argument("name", metavar="NAME", help="for example slurm/pretrain.sbatch")
    try:
        print(shipped(parser.parse_args(arguments).name))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
