"""`aurora slurm`: what is refused before anything waits in a queue, and what is submitted."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.run.folder import RunFolder
from tests.conftest import REPOSITORY
from tests.processes.launching import write_config

# Notes what it is given, and where.
SBATCH = """#!/bin/bash
printf '%s\\0' "$@" >given
echo "$PWD $AURORA_VENV" >where
echo '4711;cluster'
"""
HOSTILE = "run.root=a b; $(touch hacked) `touch hacked` 'x' \"y\" * \\ $HOME"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a config of 24 sequences a step and a stand-in for sbatch."""
    write_config(tmp_path, {"run.root": "runs"})
    set_sbatch(tmp_path, SBATCH)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("AURORA_VENV", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_sbatch(folder: Path, text: str) -> None:
    tool = folder / "bin/sbatch"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(text)
    tool.chmod(0o755)


CPUS = ("--gpus-per-node", "0")


def given(folder: Path) -> list[str]:
    return (folder / "given").read_text().split("\0")[:-1]


def test_a_config_is_submitted_with_its_name_and_its_arguments_unchanged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("config.yaml", "--nodes", "4", *CPUS, "--time", "2:00:00", "--sbatch=--partition=p q", HOSTILE)
    assert main(["slurm", *arguments, "--stop-at", "3"]) == 0
    assert given(folder) == [
        *("--parsable", "--job-name=tiny", "--nodes=4", "--gpus-per-node=0", "--time=2:00:00", "--partition=p q"),
        *(str(REPOSITORY / "slurm/pretrain.sbatch"), "config.yaml", HOSTILE, "--stop-at", "3"),
    ]
    assert (folder / "where").read_text() == f"{folder} {sys.prefix}\n"
    assert not (folder / "hacked").exists()
    shown = capsys.readouterr().out
    assert "submitted job 4711" in shown
    assert "logs/slurm/4711" in shown
    assert "scancel --signal=TERM 4711" in shown


def test_a_dry_run_shows_the_same_command_and_submits_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "config.yaml", "--nodes", "2", *CPUS, HOSTILE, "--dry-run"]) == 0
    assert not (folder / "given").exists()
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("cluster   2 ranks on 2 nodes") for line in shown)
    assert shown[-1] == "not submitted: --dry-run"
    words = shlex.split(shown[-2].removeprefix("command"))
    assert words[:2] == [f"AURORA_VENV={sys.prefix}", "sbatch"]
    assert words[-2:] == ["config.yaml", HOSTILE]
    # As it stands, the line does what the verb does.
    os.system(shown[-2].removeprefix("command"))
    assert given(folder) == words[2:]
    assert not (folder / "hacked").exists()


def test_the_environment_is_named_only_where_the_script_would_not_find_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(folder / ".venv"))
    assert main(["slurm", "config.yaml", "--nodes", "1", *CPUS, "--dry-run"]) == 0
    assert "AURORA_VENV" not in capsys.readouterr().out
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["--nodes", "5"], "5 ranks"),
        (["data.sources=[{path: none.parquet}]"], "none.parquet"),
        (["data.sources=[{path: 'hf://datasets/a/b@main/**/*.parquet'}]"], "has no lock; write one"),
        (["model.intermediate_size=24000000", *("--gpus-per-node", "4")], "does not fit"),
        (["--device", "abacus", "--gpus-per-node", "4"], "--device"),
        (["--sbatch=-p x"], "--sbatch"),
        (["--sbatch=other.sh"], "--sbatch"),
        (["watch.webhook=file:config.yaml"], "watch.webhook: expected an http or https URL"),
    ],
)
def test_what_would_end_the_job_later_is_not_submitted(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["slurm", "config.yaml", "--nodes", "1", *CPUS, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (folder / "given").exists()


def test_runs_that_are_complete_or_in_training_or_another_are_not_submitted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["slurm", "config.yaml", "--nodes", "1", *CPUS, *arguments]) == 2
        assert not (folder / "given").exists()
        return capsys.readouterr().err

    assert "there is none here" in refusal("--extend")
    run = RunFolder(folder / "runs/tiny")
    run.path.mkdir(parents=True)
    run.lock()
    try:
        assert "another process is training" in refusal()
    finally:
        run.unlock()
    assert main(["train", "config.yaml", "--stop-at", "2"]) == 75
    assert "optimizer.lr: 0.02 in the run, 0.01 now" in refusal("optimizer.lr=0.01")
    assert main(["train", "config.yaml"]) == 0
    assert "complete" in refusal()
    assert "optimizer.lr: 0.02 in the run, 0.01 now" in refusal("optimizer.lr=0.01", "--extend")
    longer = "train.total_tokens=6144"
    assert main(["slurm", "config.yaml", "--nodes", "1", *CPUS, longer, "--extend"]) == 0
    assert given(folder)[-3:] == ["config.yaml", longer, "--extend"]
    assert "warning: train.total_tokens was 3,072, now 6,144" in capsys.readouterr().out


def test_a_mirror_whose_library_is_missing_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert main(["slurm", "config.yaml", "--nodes", "1", *CPUS, "checkpoint.mirror=s3://bucket/copies"]) == 2
    assert capsys.readouterr().err.startswith("error: checkpoint.mirror: s3://bucket/copies: ImportError: ")
    assert not (folder / "given").exists()


def test_what_slurm_says_is_passed_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sbatch(folder, "#!/bin/bash\necho 'sbatch: error: invalid partition specified: none' >&2\nexit 1\n")
    assert main(["slurm", "config.yaml", "--nodes", "1", *CPUS]) == 2
    assert capsys.readouterr().err == "error: sbatch: error: invalid partition specified: none\n"
    set_sbatch(folder, "#!/bin/bash\necho 'some banner'\n")
    assert main(["slurm", "config.yaml", "--nodes", "1", *CPUS]) == 2
    assert "some banner" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(folder))
    assert main(["slurm", "config.yaml", "--nodes", "1", *CPUS]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_the_runbook_shows_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (REPOSITORY / "docs/guide/runbook.md").read_text()
    blocks = r"```bash\n\s*aurora (slurm [^\n]* --dry-run)\n.*?```text\n(.*?)\n\s*```"
    command, shown = re.findall(blocks, page, re.DOTALL)[0]
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("AURORA_VENV", raising=False)
    monkeypatch.setattr(sys, "prefix", str(REPOSITORY / ".venv"))
    assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out.replace(f"{REPOSITORY}/", "")
    assert [line.strip() for line in shown.splitlines()] == printed.splitlines()
