"""The one reader of run folders: states, records, and the facts that the manifest states."""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pretrain.config import Config, load_config
from pretrain.model.cost import parameter_count
from pretrain.run.folder import RunError, RunFolder
from pretrain.run.manifest import write_manifest
from pretrain.run.reader import job_file, read_exit_code, read_run
from tests.conftest import REPOSITORY
from tests.report.folders import records, write_run


def age(folder: Path, seconds: float = 3600) -> None:
    """Set the files back in time."""
    then = time.time() - seconds
    for name in ("metrics.jsonl", "manifest.json"):
        os.utime(folder / name, (then, then))


def test_states_of_a_run(tmp_path: Path) -> None:
    assert read_run(tmp_path / "nowhere").state == "pending"
    done = write_run(tmp_path / "done", records(3))
    assert read_run(done).state == "done"
    broken_off = write_run(tmp_path / "broken-off", records(3), finished=False)
    assert read_run(broken_off).state == "running"  # written to just now
    assert read_run(broken_off, exit_code=1).state == "failed"
    age(broken_off)
    assert read_run(broken_off).state == "stopped"
    assert read_run(broken_off, exit_code=75).state == "stopped"
    assert read_run(done, exit_code=1).state == "done"


def test_a_run_whose_lock_is_held_is_running(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "held", records(3), finished=False)
    age(folder)
    with (folder / ".lock").open("w") as lock:
        assert read_run(folder).state == "stopped"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run(folder).state == "running"
    RunFolder(folder).lock()  # reading left nothing locked


def test_a_cut_off_line_is_no_record_and_each_step_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [{"step": 2, "loss": 2.0}, {"step": 1, "loss": 9.0}, {"step": 1, "loss": 1.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [(record["step"], record["loss"]) for record in read_run(folder).records] == [(1, 1.0), (2, 2.0)]


def test_the_final_loss_is_that_of_a_run_that_is_done(tmp_path: Path) -> None:
    rows = [{"step": 1, "validation_loss": 3.0}, {"step": 2, "validation_loss": 2.0}, {"step": 3, "loss": 1.0}]
    assert read_run(write_run(tmp_path / "done", rows)).final_loss == 2.0
    assert read_run(write_run(tmp_path / "stopped", rows, finished=False)).final_loss is None
    assert read_run(write_run(tmp_path / "nan", [*rows, {"step": 4, "validation_loss": None}])).final_loss == math.inf


def test_the_exit_code_of_a_job(tmp_path: Path) -> None:
    file = job_file(tmp_path, "muon-1", ".exit")
    assert read_exit_code(tmp_path, "muon-1") is None
    file.parent.mkdir()
    for text, code in (("-9\n", -9), ("75", 75), ("", None), ("x", None)):
        file.write_text(text)
        assert read_exit_code(tmp_path, "muon-1") == code


CONFIGS = ("quickstart", "aurora-1.1b", "speedrun-3175")


def shipped(name: str) -> Config:
    path = next(REPOSITORY.glob(f"configs/**/{name}.yaml"))
    return load_config(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_manifest_states_parameters_and_steps(name: str, tmp_path: Path) -> None:
    config = shipped(name)
    write_manifest(RunFolder(tmp_path), config, {}, {})
    counts = parameter_count(config.model)
    (tmp_path / "config.yaml").write_text("{}")  # nothing is computed again
    run = read_run(tmp_path)
    assert run.parameters is not None
    assert run.parameters.total == counts["total"]
    assert run.parameters.inner == counts["blocks"] + counts["biases"] + counts["norms"]
    assert run.total_steps == config.total_steps


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_counted_as_the_trainer_does_for_runs_that_lack_them(name: str, tmp_path: Path) -> None:
    """The speedrun model was counted as a Llama: 190.5M for 162.4M."""
    config = shipped(name)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    run = read_run(tmp_path)
    assert run.parameters is not None
    assert run.parameters.total == parameter_count(config.model)["total"]
    assert run.total_steps == config.total_steps
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"hidden_size": 3}}))
    assert (read_run(tmp_path).parameters, read_run(tmp_path).total_steps) == (None, None)


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    for name in ("manifest.json", "config.yaml"):
        folder = write_run(tmp_path / name, records(2))
        (folder / name).write_text("[1]")
        with pytest.raises(RunError, match=f"{name}: expected a mapping, got list"):
            read_run(folder)


def test_reading_does_not_import_torch(tmp_path: Path) -> None:
    config = shipped("quickstart")
    write_manifest(RunFolder(tmp_path), config, {}, {})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "validation_loss": 2.0}) + "\n")
    code = (
        "import sys; from pathlib import Path; from pretrain.run.reader import read_run; run = read_run(Path('.'));"
        "print(run.state, run.last_step, run.total_steps, run.parameters, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(f"running 1 {config.total_steps} Parameters(total="), done.stderr
    assert done.stdout.split()[-1] == "False"


def test_a_manifest_without_end_is_refused(tmp_path: Path) -> None:
    for name, make in {"device": lambda path: path.symlink_to("/dev/zero"), "large": sparse}.items():
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "manifest.json")
        with pytest.raises(RunError, match=r"manifest\.json: cannot be read"):
            RunFolder(folder).manifest()


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
