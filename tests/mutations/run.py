"""Make the product wrong in one place at a time and demand that a test notices.

    python tests/mutations/run.py                  all mutations: several minutes
    python tests/mutations/run.py --only NAME ...  some of them
    python tests/mutations/run.py --list           their names and what they do

Works in a temporary copy of the repository's files. First the tests of all chosen mutations must pass without any. Then
each mutation is applied by exact replacement and its tests run; at least one must fail. Exit code 0: every mutation
was noticed; 1: at least one survived; 2: one does not apply, or its tests cannot be run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from tests.mutations.table import MUTATIONS, Mutation  # noqa: E402

TIMEOUT_SECONDS = 900
"""For the tests of one mutation; those of all have so much for each."""
RED, GREEN = 1, 0  # exit codes of pytest


class MutationError(Exception):
    """A mutation that does not apply, or tests that do not run; the message says which."""


def copy_repository(source: Path, target: Path) -> None:
    """Copy every file that git knows or would add, as it is in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def place(mutation: Mutation, root: Path) -> Path:
    """The one file that the mutation changes.

    Raises:
        MutationError: there is none, or more than one, or the text occurs in it twice.
    """
    found = [path for path in sorted((root / mutation.folder).rglob("*.py")) if mutation.old in path.read_text()]
    times = sum(path.read_text().count(mutation.old) for path in found)
    if times != 1:
        where = ", ".join(str(path.relative_to(root)) for path in found) or mutation.folder
        raise MutationError(f"{mutation.name}: its text occurs {times} times in {where}, expected once")
    if mutation.new == mutation.old:
        raise MutationError(f"{mutation.name}: changes nothing")
    return found[0]


@contextmanager
def applied(mutation: Mutation, root: Path) -> Iterator[None]:
    """Apply the mutation, and take it back."""
    path = place(mutation, root)
    before = path.read_text()
    after = before.replace(mutation.old, mutation.new)
    compile(after, str(path), "exec")
    try:
        path.write_text(after)
        yield
    finally:
        path.write_text(before)


def pytest(root: Path, tests: Sequence[str], timeout: float = TIMEOUT_SECONDS) -> tuple[int, str]:
    """Exit code and output of some tests in the copy, up to the first that fails.

    Raises:
        MutationError: they did not end in time, which says nothing.
    """
    # Without compiled files a mutation and its removal within a second cannot be mistaken for each other.
    own = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    own |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=os.environ | own,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MutationError(f"{', '.join(tests)}: did not end within {timeout:.0f} seconds") from None
    return done.returncode, done.stdout + done.stderr


def survivors(mutations: Sequence[Mutation], root: Path) -> list[str]:
    """The mutations that no test noticed, after the same tests have passed without any.

    Raises:
        MutationError: one does not apply, or its tests fail without it or cannot be run.
    """
    for mutation in mutations:
        place(mutation, root)
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    code, output = pytest(root, tests, TIMEOUT_SECONDS * len(mutations))
    if code != GREEN:
        raise MutationError(f"the tests do not pass without a mutation:\n{output[-4000:]}")
    survived = []
    for mutation in mutations:
        started = time.monotonic()
        with applied(mutation, root):
            code, output = pytest(root, mutation.tests)
        if code not in (RED, GREEN):
            raise MutationError(f"{mutation.name}: its tests cannot be run:\n{output[-4000:]}")
        noticed = "noticed" if code == RED else "SURVIVED"
        print(f"{mutation.name}: {noticed} ({time.monotonic() - started:.0f} s): {mutation.why}", flush=True)
        if code == GREEN:
            survived.append(mutation.name)
    return survived


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="these mutations instead of all")
    parser.add_argument("--list", action="store_true", help="list the mutations")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{mutation.name}: {mutation.why}" for mutation in MUTATIONS))
        return 0
    unknown = set(options.only) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in MUTATIONS if not options.only or mutation.name in options.only]
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        copy_repository(REPOSITORY, Path(scratch))
        try:
            survived = survivors(chosen, Path(scratch))
        except MutationError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(f"{len(chosen) - len(survived)} of {len(chosen)} noticed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
