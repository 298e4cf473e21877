"""Every command and every piece of a config on our pages works, or says why it is not run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.cli.command import parse
from pretrain.config import parse_config
from pretrain.config.loader import read_yaml
from pretrain.sweep import is_sweep_file, load_sweep
from tests.conftest import REPOSITORY
from tests.distributed.ranks import run_ranks
from tests.docs.blocks import Block, blocks, pages

TIMEOUT_SECONDS = 1200
PAGES = {str(page.relative_to(REPOSITORY)): blocks(page) for page in pages()}
SKIPPED = [block for found in PAGES.values() for block in found if "skip" in block.directives]
QUOTED = [block for found in PAGES.values() for block in found if "lines" in block.directives]


def _runs(found: list[Block], long: bool) -> bool:
    """Whether some block of a page is run, in the fast set or only in the long one."""
    kept = [block for block in found if block.is_run]
    return any("long" in block.directives for block in kept) if long else bool(kept)


FAST = [name for name, found in PAGES.items() if _runs(found, long=False)]
LONG = [name for name, found in PAGES.items() if _runs(found, long=True)]


def _overlay(base: Any, changes: Any) -> Any:
    """`base` with the keys of `changes`; sections are merged."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {key: _overlay(base.get(key), value) for key, value in changes.items()}


def _run(block: Block, folder: Path) -> None:
    where = f"{block.page}:{block.line}"
    if block.language == "yaml":
        file = folder / block.directives.get("file", "part.yaml")
        file.write_text(block.text)
        if is_sweep_file(file):
            load_sweep(file)
        else:
            parse_config(_overlay(read_yaml(REPOSITORY / "configs/quickstart.yaml"), read_yaml(file)))
        return
    for words in block.verbs() or []:
        (code,) = run_ranks(1, _aurora, folder, words, timeout_seconds=TIMEOUT_SECONDS)
        assert code == 0 or (code == 75 and "--stop-at" in words), f"{where}: aurora {shlex.join(words)}: {code}"
    if block.verbs():
        return
    program = ["bash", "-c", block.script()] if block.language == "bash" else [sys.executable, "-c", block.text]
    # The checkout and its environment come first; the working directory holds nothing of it.
    paths = {"PYTHONPATH": str(REPOSITORY), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        program, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 0, f"{where}\n{block.text}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def _aurora(folder: Path, words: list[str]) -> int:
    """The command in a folder of its own, in a process that has its imports."""
    os.chdir(folder)
    # For the processes that it starts.
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    return main(words)


VERBS_OF_SCRIPTS = {
    "slurm/pretrain.sbatch": ["train"],
    "slurm/eval.sbatch": ["eval"],
    "slurm/sweep.sbatch": ["sweep", "run"],
}


@pytest.mark.parametrize("name", FAST)
def test_the_blocks_of_a_page_work(name: str, tmp_path: Path) -> None:
    for block in PAGES[name]:
        if block.is_run and "long" not in block.directives:
            _run(block, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_all_blocks_of_a_page_work(name: str, tmp_path: Path) -> None:
    for block in PAGES[name]:
        if block.is_run:
            _run(block, tmp_path)


@pytest.mark.parametrize("block", SKIPPED, ids=lambda block: f"{block.page.name}:{block.line}")
def test_what_is_not_run_parses_and_names_files_that_exist(block: Block) -> None:
    assert block.language == "bash"
    named = re.findall(r"(?<![\w/.])(?:\./)?((?:assets|configs|docs|scripts|slurm)/[\w./-]+)", block.text)
    for path in named:
        assert (REPOSITORY / path).exists(), path
    assert block.commands()
    for command in block.commands():
        words = shlex.split(command)
        if "sbatch" in words:
            # What comes after the script goes to its verb.
            script = next(word for word in words if word in VERBS_OF_SCRIPTS)
            words = ["aurora", *VERBS_OF_SCRIPTS[script], *words[words.index(script) + 1 :]]
        if words[:2] == ["python", "-m"] and words.count("-m") == 2:
            words = ["aurora", *words[words.index("pretrain") + 1 :]]
        if words[0] == "aurora":
            parse(words[1:])  # an unknown option ends the process


@pytest.mark.parametrize("block", QUOTED, ids=lambda block: f"{block.page.name}:{block.line}")
def test_what_is_quoted_is_in_the_file(block: Block) -> None:
    text = (REPOSITORY / block.directives["lines"]).read_text(encoding="utf-8")
    lines = {line.partition("  #")[0].strip() for line in text.splitlines()}
    assert [line for line in block.text.splitlines() if line.strip() not in lines] == []


def test_pages_have_blocks_of_every_kind() -> None:
    """The tests above are not empty."""
    kept = [block for found in PAGES.values() for block in found if block.is_run]
    assert {block.language for block in kept} == {"bash", "python", "yaml"}
    assert {"README.md", "docs/guide/training.md", "docs/guide/data.md"} <= set(FAST)
    assert len(SKIPPED) < len(kept)
    readme = {word for block in PAGES["README.md"] for word in block.text.split()}
    assert {"sbatch", "train", "eval", "Aurora"} <= readme


def test_the_readme_fits_on_two_screens() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 100


@pytest.mark.parametrize(
    "text",
    [
        "<!-- test: skip -->\n```bash\nfalse\n```",
        "<!-- test: never because -->\n```bash\nfalse\n```",
        "<!-- test: long -->\nSome text.\n```bash\nfalse\n```",
    ],
)
def test_a_wrong_comment_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"page\.md:"):
        blocks(Path("page.md"), text)


def test_a_script_stops_at_the_first_error_and_accepts_a_requested_stop() -> None:
    text = "```bash\nfalse   # comment\ntrue\n```\n\n<!-- test: overrides a.b=1 -->\n```bash\n"
    text += "aurora train configs/quickstart.yaml --stop-at 2 \\\n  x.y=2\n```\n```text\nno\n```\n"
    first, second = blocks(Path("page.md"), text)
    assert first.commands() == ["false", "true"]
    assert subprocess.run(["bash", "-c", first.script()]).returncode == 1
    assert "a.b=1 --stop-at 2 x.y=2 || [ $? = 75 ]" in second.script()
    assert "model.hidden_size=32" in second.script()
    assert first.verbs() is None
    assert second.verbs() is not None
