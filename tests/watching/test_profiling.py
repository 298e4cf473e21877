"""Traces of chosen steps by torch's profiler, and the phases of a step that they show."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.cli.command import parse
from pretrain.launch.watch import Watch
from pretrain.watching.profiling import Profiler
from tests.counting.where import configured, metrics, train


def trace(path: Path) -> set[str]:
    with gzip.open(path, "rt") as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def test_a_profile_holds_the_phases_and_operators_of_the_chosen_steps(tmp_path: Path) -> None:
    config = configured(str(tmp_path), {"data.validation_fraction": 0.0, "train.total_tokens": 5 * 768})
    assert train(config, "never", 1) == 75
    assert train(config, stop_at=3, profile=(2, 2)) == 75
    [file] = (config.run_folder / "profile").iterdir()
    assert file.name == "steps-2-2-rank-00000.json.gz"
    assert {"data", "forward", "backward", "optimizer", "records", "aten::mm"} <= trace(file)
    # A run that stops within the steps, and one that began after the first of them, record what there is.
    assert train(config, stop_at=4, profile=(2, 9)) == 75
    assert (config.run_folder / "profile" / "steps-4-4-rank-00000.json.gz").exists()
    other = configured(str(tmp_path / "other"), {"data.validation_fraction": 0.0})
    train(other, "never", 4)
    keys = [(line["loss"], line["grad_norm"]) for line in metrics(config)]
    assert keys == [(line["loss"], line["grad_norm"]) for line in metrics(other)]


def test_a_profile_whose_folder_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "profile"
    folder.write_text("a file of the user")
    profiler = Profiler(1, 1, folder, 0, said.append)
    for phase in ("data", "forward"):
        profiler.enter(phase, 1)
    profiler.close()
    assert len(said) == 1
    assert said[0].startswith(f"warning: the profile could not be written to {folder}/steps-1-1-rank-00000.json.gz: ")


@pytest.mark.parametrize(("text", "steps"), [("7", (7, 7)), ("10-12", (10, 12))])
def test_the_steps_of_a_profile_are_parsed(text: str, steps: tuple[int, int]) -> None:
    assert parse(["train", "config.yaml", "--profile", text]).profile == steps


@pytest.mark.parametrize("text", ["0", "3-2", "-3", "a", "1-", "1-2-3", "1,2"])
def test_bad_steps_of_a_profile_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "config.yaml", f"--profile={text}"])
    assert ended.value.code == 2
    assert "expected a step or a range such as 10-12" in capsys.readouterr().err


def test_phases_of_a_step_are_entered_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    enter = Watch.enter

    def recorded(self: Watch, phase: str, step: int) -> None:
        seen.append((phase, step))
        enter(self, phase, step)

    monkeypatch.setattr(Watch, "enter", recorded)
    changes = {"train.micro_batch_sequences": 24, "validation.every_steps": 1, "validation.max_tokens": 64}
    train(configured(str(tmp_path), changes), "never", 1)
    names = [phase for phase, step in seen if step == 1]
    assert names[:5] == ["data", "forward", "backward", "optimizer", "records"]
    # The wait for the save at the end is part of it.
    assert [name for name in dict.fromkeys(names[5:]) if name != "records"] == ["validation", "save"]
