"""Spikes and bad numbers in a run of one process: what is skipped, undone, counted, logged and kept."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.config import Config, ConfigError
from pretrain.data import DataError
from pretrain.data.prefetch import Prefetcher
from pretrain.launch import train
from pretrain.run.folder import RunFolder
from pretrain.training.trainer import Trainer, TrainingError

MakeConfig = Callable[..., Config]
STEPS = 16
BASE: dict[str, Any] = {
    "train.total_tokens": STEPS * 192,
    "train.global_batch_tokens": 192,
    "schedule.warmup_tokens": 0,
    "data.validation_fraction": 0.0,
    "checkpoint.save_every_steps": 4,
    "checkpoint.keep_last": 100,
    "guards.spike_window": 8,
}


def lines(config: Config) -> list[dict[str, Any]]:
    return RunFolder(config.run_folder).metrics.read()


def discarded(config: Config) -> list[dict[str, Any]]:
    path = config.run_folder / "metrics.discarded.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weights(config: Config, step: int) -> dict[tuple[str, str], torch.Tensor]:
    reader = CheckpointReader(list_checkpoints(config.run_folder / "checkpoints")[0].parent / f"step-{step:08d}")
    slots = reader.index["parameters"]
    return {(name, slot): reader.read(name, slot) for name in slots for slot in slots[name]}


def counters(config: Config, step: int) -> dict[str, Any]:
    folder = config.run_folder / "checkpoints" / f"step-{step:08d}"
    return CheckpointReader(folder).index["counters"]


def same(first: dict[Any, torch.Tensor], second: dict[Any, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Multiplies the loss of batches, known by the number in which they are trained on; returns the hashes of all."""

    def planted(factors: dict[int, float], gradients: bool = True) -> list[str]:
        forward_backward, seen = Trainer.forward_backward, []  # type: ignore[var-annotated]

        def poisoned(self: Trainer, share: Any) -> torch.Tensor:
            seen.append(share.sha256())
            factor = factors.get(len(seen), 1.0)
            loss = forward_backward(self, share) * factor
            if gradients and factor != 1.0:
                for p in self.engine.module.parameters():
                    p.grad.mul_(factor)  # type: ignore[union-attr]
            return loss

        monkeypatch.setattr(Trainer, "forward_backward", poisoned)
        return seen

    return planted


def test_a_spike_is_marked_and_trained_on_by_default(tiny_config: MakeConfig, plant: Any) -> None:
    config = tiny_config(BASE)
    plant({11: 1000.0})
    train(config)
    assert [line["step"] for line in lines(config) if "loss_spike" in line] == [11]
    assert not any("skipped" in line for line in lines(config))
    assert counters(config, STEPS)["loss_spikes"] == 1


@pytest.mark.parametrize(("factor", "gradients"), [(1000.0, False), (math.nan, True), (math.inf, False)])
def test_a_bad_loss_skips_one_step_and_leaves_everything_else(
    factor: float, gradients: bool, tiny_config: MakeConfig, plant: Any
) -> None:
    """Also where only the loss is bad, and the gradients are not."""
    config = tiny_config(BASE | {"guards.on_loss_spike": "skip", "checkpoint.save_every_steps": 5})
    plant({11: factor}, gradients)
    for stop in (10, 11, 12):
        train(config, stop_at=stop)
    bad = [line for line in lines(config) if "skipped" in line]
    assert [line["step"] for line in bad] == [11]
    assert bad[0]["skipped_because"] == ("loss spike" if factor == 1000.0 else "loss not finite")
    assert same(weights(config, 10), weights(config, 11))
    assert not same(weights(config, 11), weights(config, 12))
    assert counters(config, 12)["skipped_steps"] == 1
    assert counters(config, 11)["skipped_in_a_row"] == 1
    assert all(math.isfinite(loss) for loss in counters(config, 12)["loss_history"])


@pytest.mark.parametrize("spike_at", [11, 12, STEPS])
def test_a_spike_is_rolled_back_and_its_batches_left_out(spike_at: int, tiny_config: MakeConfig, plant: Any) -> None:
    """After a spike at step 10 the run is at step 8 again, with the weights of step 8, and reads batch 11."""
    config = tiny_config(BASE | {"guards.on_loss_spike": "roll_back"})
    seen = plant({spike_at: 1000.0})
    assert train(config) == 0
    back = (spike_at - 1) // 4 * 4
    undone = spike_at - back
    assert [line["step"] for line in lines(config)] == list(range(1, STEPS + 1))
    used = [line["batch_sha256"] for line in lines(config)]
    order = list(dict.fromkeys(seen))  # the step after the spike was launched, and its batch comes again
    assert used == order[:back] + order[spike_at : STEPS + undone]
    assert [line["step"] for line in discarded(config)] == list(range(back + 1, spike_at + 1))
    assert discarded(config)[-1]["loss_spike"]
    assert counters(config, STEPS)["rollbacks"] == 1
    assert all(math.isfinite(line["loss"]) and line["loss"] < 100 for line in lines(config))


def test_a_rolled_back_run_is_the_run_that_never_read_those_batches(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; and a run stopped and resumed on the way ends with the same bits."""
    ends = []
    forward_backward = Trainer.forward_backward
    spiked: list[str] = []
    killed: list[int] = []

    def poisoned(self: Trainer, share: Any) -> torch.Tensor:
        loss, sha = forward_backward(self, share), share.sha256()
        if self.state.step == 9 and not spiked:
            spiked.append(sha)
        if self.state.rollbacks and (self.state.step, name) == (9, "killed") and not killed:
            killed.append(self.state.step)
            raise RuntimeError("power cut")
        return loss * (1000.0 if sha in spiked else 1.0)

    monkeypatch.setattr(Trainer, "forward_backward", poisoned)
    for name, stops in {"through": (), "stopped": (8, 11, 13), "killed": ()}.items():
        config = tiny_config(BASE | {"guards.on_loss_spike": "roll_back", "run.root": str(tmp_path / name)})
        if name == "killed":
            with pytest.raises(RuntimeError, match="power cut"):
                train(config)
        for stop in (*stops, None):
            train(config, stop_at=stop)
        ends.append(weights(config, STEPS))
        assert spiked[0] not in [line["batch_sha256"] for line in lines(config)]
        assert counters(config, STEPS)["rollbacks"] == 1
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_the_run_ends_when_it_was_rolled_back_too_often(tiny_config: MakeConfig, plant: Any) -> None:
    config = tiny_config(BASE | {"guards.on_loss_spike": "roll_back", "guards.max_rollbacks": 2})
    plant({11: 1000.0, 15: 1000.0, 19: 1000.0})
    with pytest.raises(TrainingError, match=r"rolled back 2 times already \(guards.max_rollbacks\)"):
        train(config)


def test_without_a_checkpoint_a_spike_is_trained_on(
    tiny_config: MakeConfig, plant: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(BASE | {"guards.on_loss_spike": "roll_back", "checkpoint.save_every_steps": 100})
    plant({11: 1000.0})
    assert train(config, stop_at=13) == 75
    assert "no checkpoint to roll back to" in capsys.readouterr().out
    assert [line["step"] for line in lines(config)] == list(range(1, 14))


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are saved; the first save fails for want of room."""
    found: list[int] = []

    def first_fails(root: Path, snapshot: Any, *arguments: Any) -> Path:
        found.append(snapshot.step)
        if len(found) == 1:
            raise OSError(28, "No space left on device", str(root))
        return save_checkpoint(root, snapshot, *arguments)

    monkeypatch.setattr("pretrain.checkpoint.saver.save_checkpoint", first_fails)
    return found


ROLLING_BACK = BASE | {"guards.on_loss_spike": "roll_back", "checkpoint.save_every_steps": 10}


def test_where_no_save_has_succeeded_a_spike_is_trained_on(
    tiny_config: MakeConfig, plant: Any, saves: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Once a save has succeeded, later spikes are rolled back to it."""
    config = tiny_config(ROLLING_BACK | {"train.total_tokens": 24 * 192})
    plant({11: 1000.0, 13: 1000.0, 24: 1000.0})
    assert train(config) == 0
    assert saves == [10, 20, 24]
    assert capsys.readouterr().out.count("no checkpoint to roll back to") == 2
    assert [line["step"] for line in lines(config)] == list(range(1, 25))
    assert counters(config, 24)["rollbacks"] == 1


def test_bad_data_after_a_spike_that_there_is_no_way_back_from_ends_a_run_with_its_steps_saved(
    tiny_config: MakeConfig, plant: Any, saves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(self: Any) -> Any:
        if len(seen) == 11:
            raise DataError("row 7: bad")
        return next_batch(self)

    next_batch = Prefetcher.next_batch
    monkeypatch.setattr(Prefetcher, "next_batch", no_more)
    config = tiny_config(ROLLING_BACK)
    seen = plant({11: 1000.0})
    with pytest.raises(DataError, match="row 7"):
        train(config)
    assert saves == [10, 11]
    assert [path.name for path in list_checkpoints(config.run_folder / "checkpoints")] == ["step-00000011"]


def test_bad_batches_are_kept_with_the_places_of_their_documents(tiny_config: MakeConfig, plant: Any) -> None:
    config = tiny_config(BASE | {"train.max_skipped_steps": 3, "guards.keep_bad_batches": 2})
    seen = plant({4: math.nan, 5: math.nan, 6: math.nan})
    with pytest.raises(TrainingError, match="3 steps in a row"):
        train(config)
    assert len(seen) == 6, "the last step in the row ends the run before another is launched"
    files = sorted((config.run_folder / "bad_batches").iterdir())
    assert [path.name for path in files] == [f"step-{step:08d}-rank-00000.safetensors" for step in (5, 6)]
    mode = config.run_folder.joinpath("metrics.jsonl").stat().st_mode
    assert [path.stat().st_mode for path in files] == [mode, mode], "others may read them as far as the umask says"
    with safe_open(files[-1], framework="pt") as file:  # type: ignore[no-untyped-call]
        tokens, lengths = file.get_tensor("tokens"), file.get_tensor("lengths")
        record, places = (json.loads(file.metadata()[key]) for key in ("record", "places"))
    assert tokens.shape == (6, 33)
    assert lengths.tolist() == [32] * 6
    assert record["step"] == 6
    assert record["loss"] is None
    assert record["batch_sha256"] == seen[-1]
    assert places
    for place in places:
        assert place["to"]["file"].endswith("moby_dick.parquet")
        start, end = ((p["row_group"], p["row"], p["token"]) for p in (place["from"], place["to"]))
        assert start < end


def test_a_batch_that_cannot_be_kept_does_not_end_the_run(
    tiny_config: MakeConfig, plant: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(BASE)
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "bad_batches").write_text("in the way")
    plant({4: math.nan})
    assert train(config, stop_at=6) == 75
    assert "could not be kept for inspection" in capsys.readouterr().out


def test_the_host_reads_a_step_after_it_has_launched_the_next(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except before a save, a validation, a stop and the end."""
    from pretrain.training.records import LateRecords

    events: list[tuple[str, int]] = []
    launch, take = Trainer.launch, LateRecords.take

    def launched(self: Trainer, *arguments: Any) -> Any:
        step = launch(self, *arguments)
        events.append(("launch", step.step))
        return step

    def taken(self: LateRecords, **options: Any) -> Any:
        found = take(self, **options)
        events.extend(("read", step.step) for step, _ in found)
        return found

    monkeypatch.setattr(Trainer, "launch", launched)
    monkeypatch.setattr(LateRecords, "take", taken)
    changes = {"data.validation_fraction": 0.01, "validation.every_steps": 6, "validation.max_tokens": 192}
    config = tiny_config(BASE | changes)
    train(config, stop_at=11)
    at = {event: index for index, event in enumerate(events)}
    late = {step for what, step in events if what == "read" and at.get(("launch", step + 1), 99) < at["read", step]}
    assert late == {1, 2, 3, 5, 7, 9, 10}  # not 4 and 8 (saves), 6 (validation), 11 (stop)
    assert [line["step"] for line in lines(config)] == list(range(1, 12))
    assert [line["step"] for line in lines(config) if "validation_loss" in line] == [6]


def test_a_record_is_that_of_its_own_step_however_late_it_is_read(tiny_config: MakeConfig, tmp_path: Path) -> None:
    untimed = []
    for name, every in {"late": 100, "at the time": 1}.items():
        config = tiny_config(BASE | {"checkpoint.save_every_steps": every, "run.root": str(tmp_path / name)})
        train(config, stop_at=8)
        own = lines(config)
        assert [line["train_seconds"] for line in own] == sorted(line["train_seconds"] for line in own)
        untimed.append(
            [{k: v for k, v in line.items() if "second" not in k} for line in own]
            + [{k: v for k, v in counters(config, 8).items() if "second" not in k}]
        )
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize(("every", "collections"), [(2, 3), (None, 0)])
def test_garbage_is_collected_when_asked_and_not_between(
    every: int | None, collections: int, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, asked = [], []
    forward_backward, collect = Trainer.forward_backward, gc.collect

    def look(self: Trainer, share: Any) -> torch.Tensor:
        states.append(gc.isenabled())
        return forward_backward(self, share)

    def counted(*arguments: Any) -> int:
        asked.append(gc.isenabled())
        return collect(*arguments)

    monkeypatch.setattr(Trainer, "forward_backward", look)
    monkeypatch.setattr(gc, "collect", counted)
    train(tiny_config(BASE | {"guards.gc_every_steps": every}), stop_at=6)
    assert set(states) == {every is None}
    assert asked.count(False) == collections
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guards.on_loss_spike": "ignore", "guards.spike_window": 9}, "guards.spike_window: has no effect"),
        ({"guards.max_rollbacks": 2}, "guards.max_rollbacks: has no effect"),
        ({"guards.spike_window": 7}, "guards.spike_window"),
        ({"guards.on_loss_spike": "rollback"}, "guards.on_loss_spike"),
        ({"guards.keep_bad_batches": -1}, "guards.keep_bad_batches"),
        (
            {"engine.kind": "deepspeed", "engine.zero_stage": 3, "guards.compare_weights_every_steps": 5},
            "guards.compare_weights_every_steps: has no effect: with engine.zero_stage 3",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, Any], words: str, tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config(changes)
    assert words in str(error.value)
