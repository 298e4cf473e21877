"""Scoring beside the training: what is started, that it is ended, and that the training does not notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.cli.command import parse
from pretrain.cli.log_scores import ScoreLog
from pretrain.config import Config, ConfigError, parse_config
from pretrain.launch import follower, train
from pretrain.run.folder import RunFolder
from tests.conftest import SMALL_VOCABULARY, TINY, merged

SHORT = SMALL_VOCABULARY | {
    "train.total_tokens": 4 * 768,
    "schedule.warmup_tokens": 0,
    "data.validation_fraction": 0.0,
    "checkpoint.save_every_steps": 2,
    "checkpoint.keep_last": 9,
}
# Notes its command line and its environment, and ends when the run is finished, or with the code that is asked for.
STAND_IN = """
import json, os, pathlib, sys, time
run, code = pathlib.Path(sys.argv[1]), int(sys.argv[2])
note = run / "eval" / "note.json"
note.write_text(json.dumps({"environment": dict(os.environ), "nice": os.nice(0), "pid": os.getpid()}))
while code < 0 and "finished" not in json.loads((run / "manifest.json").read_text()):
    time.sleep(0.02)
(run / "eval" / "ended").touch()
print("it ends")
sys.exit(max(0, code))
"""


class StandIn:
    """In place of `aurora eval`."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.code = -1

    def start(self, command: list[str], environment: dict[str, str], log: Any) -> subprocess.Popen[bytes]:
        self.commands.append(command)
        stand_in = [sys.executable, "-c", STAND_IN, command[4], str(self.code)]
        self.processes.append(subprocess.Popen(stand_in, env=environment, stdout=log, stderr=log))
        return self.processes[-1]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    found = StandIn()
    monkeypatch.setattr(follower, "_start", found.start)
    monkeypatch.setattr(follower, "POLL_SECONDS", 0.02)
    yield found
    assert all(process.poll() is not None for process in found.processes)


def config_in(root: Path, **changes: Any) -> Config:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return parse_config(merged(TINY, SHORT | {"run.root": str(root)} | dotted))


def tensors(config: Config) -> list[dict[str, list[float]]]:
    found = []
    for folder in list_checkpoints(config.run_folder / "checkpoints"):
        reader = CheckpointReader(folder)
        parameters = reader.index["parameters"]
        values = {
            f"{name} {slot}": reader.read(name, slot).tolist() for name in parameters for slot in parameters[name]
        }
        generators = {name: state.tolist() for name, state in (reader.generators(0) or {}).items()}
        found.append(values | generators)
    return found


def test_training_is_the_same_to_the_bit_and_waits_for_the_scores(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("PMI_RANK", "3")
    without, with_scores = config_in(tmp_path / "without"), config_in(tmp_path / "with", evaluation__every_steps=2)
    assert train(without) == 0
    assert stand_in.commands == []
    assert train(with_scores) == 0
    assert str(tensors(without)) == str(tensors(with_scores))  # a generator's state holds a NaN
    assert len(tensors(with_scores)) == 2
    folder = with_scores.run_folder / "eval"
    assert (folder / "ended").exists()  # after the run was finished, and before `train` returned
    assert (folder / "follow.log").read_text() == "it ends\n"
    note = json.loads((folder / "note.json").read_text())
    assert note["environment"].keys().isdisjoint({"SLURM_PROCID", "PMI_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR"})
    assert note["environment"]["AURORA_PARENT"] == str(os.getpid())
    assert f"evaluation of checkpoints: {folder / 'follow.log'}" in capsys.readouterr().out


def test_the_command_is_one_that_aurora_eval_understands(tmp_path: Path) -> None:
    run = tmp_path / "my $(run)"
    section = {"every_steps": 4, "tasks": ["piqa", "arc_easy"], "limit": 7, "device": "cuda:1"}
    settings = config_in(tmp_path, evaluation=section).evaluation
    options = parse(follower.command_of(run, settings, log_scores=True)[3:])
    assert (options.models, options.every_checkpoint, options.follow) == ([str(run)], True, True)
    assert options.every_steps == 4
    assert (options.tasks, options.limit, options.selection) == (["piqa", "arc_easy"], 7, "spread")
    assert (options.device, options.log, options.out) == ("cuda:1", "wandb", None)
    settings = config_in(tmp_path, evaluation={"every_steps": 4, "limit": None}).evaluation
    options = parse(follower.command_of(run, settings, log_scores=False)[3:])
    assert (options.limit, options.log, options.device) == (None, None, "cpu")


def test_a_run_that_stops_or_fails_ends_it(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path, evaluation__every_steps=2)
    assert train(config, stop_at=2) == 75
    assert stand_in.processes[0].returncode == -15

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr("pretrain.launch.building.save_run", fail)
    with pytest.raises(OSError, match="disk"):
        train(config)
    assert stand_in.processes[1].returncode == -15
    assert not (config.run_folder / "eval" / "ended").exists()


def test_a_failure_is_a_warning(tmp_path: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.code = 2
    assert train(config_in(tmp_path, evaluation__every_steps=2)) == 0
    assert "warning: the evaluation of checkpoints ended with exit code 2: see" in capsys.readouterr().out


def test_a_stop_while_it_is_waited_for_ends_it_and_says_how_to_continue(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path, evaluation__every_steps=2)
    (config.run_folder).mkdir(parents=True)
    (config.run_folder / "manifest.json").write_text("{}")
    said: list[str] = []
    process = follower.Follower(config.run_folder, config.evaluation, False, said.append, said.append)
    began = time.monotonic()
    process.finish(lambda: time.monotonic() - began > 0.2)
    assert stand_in.processes[0].poll() is not None
    assert said[1:] == [f"not all checkpoints are scored; to continue: aurora {' '.join(stand_in.commands[0][3:])}"]


@pytest.mark.parametrize("name", ["finish", "end"])
def test_a_failure_is_reported_while_the_run_trains_and_once(tmp_path: Path, stand_in: StandIn, name: str) -> None:
    config = config_in(tmp_path, evaluation__every_steps=2)
    (config.run_folder).mkdir(parents=True)
    stand_in.code = 3
    said: list[str] = []
    warned = threading.Event()

    def warn(line: str) -> None:
        said.append(line)
        warned.set()

    process = follower.Follower(config.run_folder, config.evaluation, False, said.append, warn)
    assert warned.wait(60)
    process.finish(lambda: False) if name == "finish" else process.end()
    [line] = said
    assert "ended with exit code 3: see" in line
    assert line.endswith(f"aurora {' '.join(stand_in.commands[0][3:])}")


@pytest.mark.parametrize(
    ("configured", "variable", "logs"),
    [
        ("offline", None, True),
        ("offline", "", True),
        ("offline", "disabled", False),
        ("online", "offline", True),
        ("online", "dryrun", False),
        ("disabled", None, False),
        ("disabled", "online", False),
    ],
)
def test_scores_are_logged_only_if_the_evaluation_would_accept_it(
    tmp_path: Path,
    stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    configured: str,
    variable: str | None,
    logs: bool,
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    config = config_in(tmp_path, evaluation__every_steps=2, wandb__mode=configured)
    run = config.run_folder
    run.mkdir(parents=True)
    (run / "manifest.json").write_text(json.dumps({"id": "0123"}))
    (run / "config.yaml").write_text(config.to_yaml())
    display: Any = SimpleNamespace(say=lambda line: None, warn=lambda line: None)
    engine: Any = SimpleNamespace(rank=0)
    setup: Any = SimpleNamespace(config=config, display=display, engine=engine, folder=RunFolder(run))
    with follower.following(setup):
        pass
    [command] = stand_in.commands
    assert ("--log" in command) == logs
    if logs:
        assert ScoreLog(run).mode in ("online", "offline")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every_steps": 3}, "evaluation.every_steps: expected a multiple of checkpoint.save_every_steps (2), got 3"),
        ({"tasks": ["piqa"]}, "evaluation.tasks: has no effect: evaluation.every_steps is null"),
        ({"every_steps": 2, "tasks": []}, "evaluation.tasks"),
        ({"every_steps": 2, "tasks": ["--out"]}, "evaluation.tasks.0"),
        ({"every_steps": 2, "tasks": ["a,b"]}, "evaluation.tasks.0"),
        ({"every_steps": 2, "device": "cuda; true"}, "evaluation.device"),
        ({"every_steps": 2, "limit": 0}, "evaluation.limit"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_in(tmp_path, evaluation=changes)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_config_without_the_section_is_written_as_before(tmp_path: Path) -> None:
    assert "evaluation" not in config_in(tmp_path).resolved()
    resolved = config_in(tmp_path, evaluation={"every_steps": 2}).resolved()
    assert resolved["evaluation"]["limit"] == 1000
    assert parse_config(resolved).evaluation.every_steps == 2
