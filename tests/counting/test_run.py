"""What a run does besides its steps: saves, validation, samples, measurements, lines, processes, all counted."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.counting.counters import Operators, audited, forwards
from tests.counting.where import configured, metrics, publish_folder, train

QUIET = {"data.validation_fraction": 0.0}
SHORT = {"train.total_tokens": 6 * 768, "schedule.warmup_tokens": 0}


def saved_steps(root: Path, changes: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The steps whose checkpoints were given their name, in order, and those whose checkpoints are left."""
    config = configured(str(root), QUIET | SHORT | changes)
    with audited("os.rename") as renames:
        train(config)
    names = [str(arguments[1]) for _, arguments in renames]
    saved = [int(match[1]) for name in names if (match := re.search(r"/step-(\d{8})$", name))]
    return saved, sorted(int(path.name[5:]) for path in (config.run_folder / "checkpoints").glob("step-????????"))


@pytest.mark.parametrize(
    ("keep", "saved", "left"),
    [
        ({"checkpoint.save_every_steps": 2, "checkpoint.keep_last": 3}, [2, 4, 6], [2, 4, 6]),
        ({"checkpoint.save_every_steps": 2, "checkpoint.keep_last": 1}, [2, 4, 6], [6]),
        ({"checkpoint.save_every_steps": 4, "checkpoint.keep_last": 2}, [4, 6], [4, 6]),
        ({"checkpoint.save_every_steps": 100, "checkpoint.keep_last": 2}, [6], [6]),
        (
            {"checkpoint.save_every_steps": 1, "checkpoint.keep_last": 2, "checkpoint.keep_every_steps": 3},
            [1, 2, 3, 4, 5, 6],
            [3, 5, 6],
        ),
    ],
)
def test_as_many_checkpoints_are_written_and_kept_as_asked(
    keep: dict[str, Any], saved: list[int], left: list[int], tmp_path: Path
) -> None:
    assert saved_steps(tmp_path, keep) == (saved, left)


@pytest.mark.parametrize("fails", [False, True])
def test_the_old_folder_is_deleted_only_after_the_new_one_has_its_name(fails: bool, tmp_path: Path) -> None:
    """Fault of a famous trainer: the old checkpoint deleted before the new one is complete.

    At every change of the file system the new folder has its name, or the old one still exists somewhere.
    """
    final, partial = tmp_path / "final", tmp_path / "partial"
    for folder in (final, partial):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    lost = []

    def texts() -> list[str]:
        return [path.read_text() for path in tmp_path.glob("*/file")]

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        new = final.is_dir() and (final / "file").exists() and (final / "file").read_text() == "partial"
        if not new and "final" not in texts():
            lost.append((event, arguments))
        if fails and event == "os.rename" and Path(arguments[1]) == final:
            raise OSError("disk full")

    events = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
    with audited(*events, on_event=look) as seen:
        if fails:
            with pytest.raises(OSError, match="disk full"):
                publish_folder(partial, final)
        else:
            publish_folder(partial, final)
    assert any(event == "os.rename" and Path(arguments[1]) == final for event, arguments in seen)
    assert not lost
    assert ("final" in texts()) is fails
    assert fails or (texts() == ["partial"] and (final / "file").exists())


def validation_batches(tmp_path: Path, changes: dict[str, Any]) -> list[int]:
    """Rows of each forward pass that is not part of training."""
    config = configured(str(tmp_path), SHORT | changes)
    with forwards(nn.Embedding) as calls:
        train(config)
    assert all(call.shape[1] == 32 for call in calls)
    assert sum(call.training for call in calls) == 6 * 4
    return [call.shape[0] for call in calls if not call.training]


@pytest.mark.parametrize(
    ("changes", "once", "times"),
    [
        ({"validation.max_tokens": 20 * 32}, [6, 6, 6, 2], 1),
        ({"validation.max_tokens": 20 * 32, "validation.every_steps": 4}, [6, 6, 6, 2], 2),
        ({"validation.max_tokens": 20 * 32, "validation.every_steps": 3}, [6, 6, 6, 2], 2),
        ({"validation.max_tokens": 20 * 32, "validation.every_steps": 1}, [6, 6, 6, 2], 6),
        ({"validation.max_tokens": 20 * 32, "validation.batch_sequences": 20}, [20], 1),
        ({"validation.max_tokens": 8 * 32 + 31, "validation.batch_sequences": 5}, [5, 3], 1),
        ({"data.validation_fraction": 0.0}, [], 1),
    ],
    ids=str,
)
def test_validation_reads_as_much_as_asked_as_often(
    changes: dict[str, Any], once: list[int], times: int, tmp_path: Path
) -> None:
    assert validation_batches(tmp_path, changes) == once * times


def test_samples_are_as_many_and_as_long_as_asked(tmp_path: Path) -> None:
    prompts = ["", "Call me", "The"]
    changes = {"samples.every_steps": 4, "samples.prompts": prompts, "samples.max_new_tokens": 5}
    config = configured(str(tmp_path), QUIET | SHORT | changes)
    with forwards(nn.Embedding) as calls:
        train(config)
    generated = [call.shape for call in calls if not call.training]
    assert all(rows == 1 for rows, _ in generated)
    lines = (config.run_folder / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(prompts)  # after steps 4 and 6
    assert len(generated) <= len(lines) * 5  # one pass reads the prompt and gives the first token, one for each other
    assert len(generated) >= len(lines) * 4, "at this age the model hardly ever ends a text by itself"
    assert max(length for _, length in generated) < 6  # the prompt is read once, then token by token


@pytest.mark.parametrize(("every", "measured"), [(None, []), (4, [3, 4, 6]), (1, [1, 2, 3, 4, 5, 6])])
def test_neurons_are_measured_as_often_as_asked(every: int | None, measured: list[int], tmp_path: Path) -> None:
    """A measurement is one QR factorisation of each of six matrices, and a pass over the sequences."""
    changes: dict[str, Any] = {"validation.max_tokens": 20 * 32, "telemetry.every_steps": every}
    if every:
        changes |= {"telemetry.reference_step": 3, "telemetry.activation_sequences": 10}
    config = configured(str(tmp_path), SHORT | changes)
    with Operators("linalg_qr") as operators, forwards(nn.Embedding) as calls:
        train(config)
    assert len(operators.calls) == 6 * len(measured)
    rows = [call.shape[0] for call in calls if not call.training]
    assert len(rows) == 4 + 2 * len(measured)  # the validation at the end; two batches of six hold ten sequences
    found = [line["step"] for line in metrics(config) if any(key.startswith("telemetry/") for key in line)]
    assert found == measured
    files = (config.run_folder / "telemetry").glob("step-*.safetensors")
    assert sorted(int(path.stem[5:]) for path in files) == measured


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (4, [1, 4, 6]), (10, [1, 6])])
def test_as_many_lines_are_printed_as_asked(
    every: int, steps: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(str(tmp_path), QUIET | SHORT | {"logging.every_steps": every})
    train(config)
    printed = [int(n) for n in re.findall(r"^step +(\d+)/6 ", capsys.readouterr().out, flags=re.MULTILINE)]
    assert printed == steps
    assert [line["step"] for line in metrics(config)] == [1, 2, 3, 4, 5, 6]


def children() -> int:
    """Processes that this one has started and that live."""
    own, found = str(os.getpid()), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        found += fields[1] == own and fields[0] != "Z"
    return found


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_as_many_reading_processes_live_as_asked(workers: int, tmp_path: Path) -> None:
    before, during = children(), []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: during.append(children()) if isinstance(module, nn.Embedding) else None
    )
    try:
        train(configured(str(tmp_path), QUIET | {"data.workers": workers}), "never", 2)
    finally:
        handle.remove()
    assert set(during) == {before + workers}
    assert children() == before


def processes_started(root: Path, changes: dict[str, Any]) -> int:
    with audited("subprocess.Popen", "os.fork", "os.posix_spawn") as started:
        train(configured(str(root), QUIET | SHORT | changes))
    return sum(event == "subprocess.Popen" for event, _ in started)


def test_a_save_starts_no_process(tmp_path: Path) -> None:
    """The commit is looked up once a process at most, not at every save."""
    once = processes_started(tmp_path / "once", {"checkpoint.save_every_steps": 100})
    often = processes_started(tmp_path / "often", {"checkpoint.save_every_steps": 1})
    assert often <= once
