"""Every mutation of the table applies, and in the long set each turns a test red."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations import run
from tests.mutations.table import MUTATIONS, Mutation


def test_names_are_unique() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_still_applies_and_its_tests_exist(mutation: Mutation) -> None:
    path = run.place(mutation, run.REPOSITORY)
    compile(path.read_text().replace(mutation.old, mutation.new), str(path), "exec")
    for test in mutation.tests:
        file, _, name = test.partition("[")[0].partition("::")
        assert f"def {name}(" in (run.REPOSITORY / file).read_text() or not name, test


def test_a_mutation_that_does_not_apply_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n")
    absent, once = (Mutation("m", "pretrain", old, "x = 2", (), "") for old in ("y = 1", "x = 1"))
    with pytest.raises(run.MutationError, match="occurs 0 times"):
        run.place(absent, tmp_path)
    with run.applied(once, tmp_path):
        assert (folder / "a.py").read_text() == "x = 2\n"
    assert (folder / "a.py").read_text() == "x = 1\n"
    (folder / "b.py").write_text("x = 1\n")
    with pytest.raises(run.MutationError, match="occurs 2 times"):
        run.place(once, tmp_path)


@pytest.mark.parametrize(
    ("test", "expected"),
    [("assert x() == 1", []), ("assert x() in (1, 2)", ["m"])],
    ids=["noticed", "survives"],
)
def test_a_mutation_that_nobody_notices_is_reported(test: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "product").mkdir()
    (tmp_path / "product/__init__.py").write_text("def x():\n    return 1\n")
    (tmp_path / "test_x.py").write_text(f"from product import x\n\ndef test_x():\n    {test}\n")
    mutation = Mutation("m", "product", "return 1", "return 2", ("test_x.py",), "")
    assert run.survivors([mutation], tmp_path) == expected


@pytest.mark.long
def test_every_mutation_turns_a_test_red() -> None:
    command = [sys.executable, "tests/mutations/run.py"]
    done = subprocess.run(command, cwd=run.REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
