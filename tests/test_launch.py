"""Starting, stopping, continuing and refusing: what a person or a scheduler meets."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.cli import main
from pretrain.config import Config
from pretrain.data import load_tokenizer
from pretrain.launch import train
from pretrain.run.folder import RunError, RunFolder
from pretrain.training.trainer import Trainer, TrainingError
from tests.conftest import SMALL_VOCABULARY
from tests.warm import warm_workers

MakeConfig = Callable[..., Config]
SHORT = SMALL_VOCABULARY | {
    "train.total_tokens": 6 * 768,
    "schedule.warmup_tokens": 0,
    "checkpoint.save_every_steps": 2,
    "checkpoint.keep_last": 3,
}


def steps_of(config: Config) -> list[int]:
    return [record["step"] for record in RunFolder(config.run_folder).metrics.read()]


def checkpoints_of(config: Config) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(config.run_folder / "checkpoints")]


def test_a_run_leaves_its_folder_as_documented(tiny_config: MakeConfig) -> None:
    config = tiny_config({**SHORT, "samples.every_steps": 3, "samples.max_new_tokens": 4})
    assert train(config) == 0
    folder = config.run_folder
    names = {"config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "tokenizer.json", "checkpoints"}
    assert names <= {path.name for path in folder.iterdir()}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in records] == [768 * step for step in range(1, 7)]
    wanted = {"loss", "lr", "adamw_lr", "grad_norm", "tokens_per_second", "step_seconds", "data_seconds"}
    assert all(wanted <= record.keys() for record in records)
    assert all("mfu" not in record for record in records)  # the peak of this processor is not known
    assert records[-1]["validation_loss"] > 0
    assert records[-1]["validation_bits_per_byte"] > 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"identity", "data", "routing", "launches"} <= manifest.keys()
    assert [launch["from_step"] for launch in manifest["launches"]] == [0]
    samples = RunFolder(folder).samples.read()
    assert [record["step"] for record in samples] == [3, 6]


def test_mfu_is_reported_when_the_peak_is_given(tiny_config: MakeConfig) -> None:
    config = tiny_config({**SHORT, "train.peak_tflops": 0.001})  # the record has five digits behind the point
    train(config, stop_at=1)
    record = RunFolder(config.run_folder).metrics.read()[0]
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops(config) / 1e9, rel=1e-3)


def flops(config: Config) -> float:
    from pretrain.model.cost import flops_per_token

    return flops_per_token(config.model, config.sequence_length)


def test_a_finished_run_is_left_alone(tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(SHORT)
    assert train(config) == 0
    before = (config.run_folder / "metrics.jsonl").read_text()
    assert train(config) == 0
    assert "already complete" in capsys.readouterr().out
    assert (config.run_folder / "metrics.jsonl").read_text() == before


def test_a_run_that_died_after_its_last_save_is_finished_by_the_next_launch(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise reports show it as stopped, and a sweep that it belongs to is never complete."""

    def dies(self: RunFolder, step: int) -> None:
        raise RuntimeError("power cut")

    config = tiny_config({**SHORT, "train.total_tokens": 2 * 768})
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "mark_finished", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    assert checkpoints_of(config) == [2]
    assert not RunFolder(config.run_folder).finished
    assert train(config) == 0
    assert (RunFolder(config.run_folder).manifest() or {})["finished"]["step"] == 2


def test_stop_at_saves_and_exits_75_and_again_does_nothing(tiny_config: MakeConfig) -> None:
    config = tiny_config(SHORT)
    assert train(config, stop_at=3) == 75
    assert checkpoints_of(config) == [2, 3]
    assert train(config, stop_at=3) == 75
    assert steps_of(config) == [1, 2, 3]
    assert train(config, stop_at=6) == 0
    assert checkpoints_of(config) == [3, 4, 6]


def test_a_killed_run_repeats_the_steps_since_its_checkpoint_once(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(SHORT)
    measure = Trainer.measure

    def dies(self: Trainer, *arguments: Any) -> Any:
        if self.state.step == 4:
            raise RuntimeError("power cut")
        return measure(self, *arguments)

    monkeypatch.setattr(Trainer, "measure", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        train(config)
    monkeypatch.undo()
    assert (steps_of(config), checkpoints_of(config)) == ([1, 2, 3], [2])
    assert train(config) == 0
    assert steps_of(config) == [1, 2, 3, 4, 5, 6]
    discarded = (config.run_folder / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded] == [3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    number: signal.Signals, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config({**SHORT, "checkpoint.save_every_steps": 100})
    rates = Trainer.set_learning_rates

    def interrupted(self: Trainer) -> dict[str, float]:
        if self.state.step == 2:
            os.kill(os.getpid(), number)
        return rates(self)

    monkeypatch.setattr(Trainer, "set_learning_rates", interrupted)
    before = signal.getsignal(number)
    assert train(config) == 75
    assert checkpoints_of(config) == [3]
    assert signal.getsignal(number) is before


def test_other_result_keys_are_refused_and_named(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(SHORT)
    train(config, stop_at=2)
    before = {path: path.read_bytes() for path in config.run_folder.rglob("*") if path.is_file()}
    file = tmp_path / "config.yaml"
    file.write_text(tiny_config({**SHORT, "optimizer.lr": 0.03, "model.rope_theta": 5e4}).to_yaml())
    assert main(["train", str(file)]) == 2
    error = capsys.readouterr().err
    assert "optimizer.lr: 0.02 in the run, 0.03 now" in error
    assert "model.rope_theta" in error
    assert "run.name" in error
    after = {path: path.read_bytes() for path in config.run_folder.rglob("*") if path.is_file()}
    assert after == before


def test_other_result_keys_are_refused_before_the_first_checkpoint_too(tiny_config: MakeConfig) -> None:
    train(tiny_config(SHORT), stop_at=1)
    shutil.rmtree(tiny_config(SHORT).run_folder / "checkpoints")
    with pytest.raises(RunError, match=r"run\.seed"):
        train(tiny_config({**SHORT, "run.seed": 4}))


def test_changed_data_is_refused(tiny_config: MakeConfig, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"Chapter {i}. " + "Call me Ishmael. " * 40}) for i in range(200)]
    text.write_text("\n".join(lines))
    changes = {**SHORT, "data.sources": [{"path": str(text), "split_units": 4}]}
    train(tiny_config(changes), stop_at=1)
    text.write_text("\n".join([*lines, json.dumps({"text": "more"})]))
    with pytest.raises(RunError, match=r"data\.sources\.0 contents: '1 file, 141,089 bytes"):
        train(tiny_config(changes))


def test_execution_keys_may_change(tiny_config: MakeConfig) -> None:
    train(tiny_config(SHORT), stop_at=2)
    changed = {"train.micro_batch_sequences": 12, "data.workers": 1, "checkpoint.keep_last": 1}
    with warm_workers():
        assert train(tiny_config({**SHORT, **changed})) == 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(SHORT)
    train(config, stop_at=4)
    victim = config.run_folder / "checkpoints/step-00000004/state-00000.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert train(config) == 0
    out = capsys.readouterr().out
    assert f"{victim}: damaged" in out
    assert "falling back to step-00000002" in out
    assert steps_of(config) == [1, 2, 3, 4, 5, 6]
    CheckpointReader(list_checkpoints(config.run_folder / "checkpoints")[-1]).verify()


def test_when_every_checkpoint_is_damaged_nothing_is_trained_or_overwritten(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(SHORT)
    train(config, stop_at=2)
    victim = config.run_folder / "checkpoints/step-00000002/state-00000.safetensors"
    victim.write_bytes(b"")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert main(["train", str(file)]) == 2
    error = capsys.readouterr().err
    assert str(victim) in error
    assert "no intact checkpoint" in error
    assert steps_of(config) == [1, 2]


def test_resume_never_refuses_an_existing_run(tiny_config: MakeConfig) -> None:
    config = tiny_config(SHORT)
    assert train(config, "never", stop_at=1) == 75
    with pytest.raises(RunError, match=r"already holds a run"):
        train(config, "never")
    assert steps_of(config) == [1]


def test_resume_from_an_older_checkpoint_sets_the_newer_aside(tiny_config: MakeConfig) -> None:
    config = tiny_config(SHORT)
    train(config)
    older = config.run_folder / "checkpoints/step-00000004"
    assert train(config, str(older)) == 0
    assert steps_of(config) == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in (config.run_folder / "checkpoints/discarded").iterdir()] == ["step-00000006"]


@pytest.mark.parametrize("resume", ["nowhere", "."])
def test_resume_from_what_is_no_checkpoint_is_refused(resume: str, tiny_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"not a checkpoint"):
        train(tiny_config(SHORT), resume)


def test_two_processes_cannot_train_in_one_folder(tiny_config: MakeConfig) -> None:
    config = tiny_config(SHORT)
    other = RunFolder(config.run_folder)
    other.lock()
    with pytest.raises(RunError, match="another process"):
        train(config)
    other.unlock()
    assert train(config, stop_at=1) == 75


def test_a_batch_that_cannot_be_shared_out_is_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"24 sequences .* 5 ranks"):
        tiny_config().accumulation(5)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size: expected at least 8192, the largest .* got 8000"):
        train(tiny_config({"model.vocab_size": 8000}))
    assert not tiny_config().run_folder.exists()


def test_a_non_finite_gradient_skips_the_step_and_is_counted(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault of a famous trainer: multiplying the update with 0 keeps the NaN."""
    config = tiny_config(SHORT)
    loss_sum = Trainer.loss_sum

    def poisoned(self: Trainer, *arguments: Any) -> torch.Tensor:
        loss = loss_sum(self, *arguments)
        return loss * float("nan") if self.state.step == 2 else loss

    monkeypatch.setattr(Trainer, "loss_sum", poisoned)
    assert train(config) == 0
    records = RunFolder(config.run_folder).metrics.read()
    assert [record.get("skipped", False) for record in records] == [False, False, True, False, False, False]
    assert records[2]["loss"] is None
    assert all(record["loss"] is not None for record in records if record["step"] != 3)
    counters = CheckpointReader(list_checkpoints(config.run_folder / "checkpoints")[-1]).index["counters"]
    assert (counters["skipped_steps"], counters["skipped_in_a_row"]) == (1, 0)


def test_gradients_that_stay_non_finite_end_the_run(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config({**SHORT, "train.max_skipped_steps": 3})
    loss_sum = Trainer.loss_sum
    monkeypatch.setattr(Trainer, "loss_sum", lambda self, *a: loss_sum(self, *a) * float("inf"))
    with pytest.raises(TrainingError, match="3 steps in a row"):
        train(config)


def test_a_failing_save_loses_nothing_saved(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(SHORT)
    train(config, stop_at=2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("pretrain.checkpoint.writer.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(config)
    monkeypatch.undo()
    assert checkpoints_of(config) == [2]
    assert train(config) == 0


def test_validation_and_samples_change_nothing_in_the_run(tiny_config: MakeConfig, tmp_path: Path) -> None:
    plain = tiny_config({**SHORT, "run.root": str(tmp_path / "plain")})
    watched = tiny_config(
        {**SHORT, "run.root": str(tmp_path / "watched"), "validation.every_steps": 1, "samples.every_steps": 2}
    )
    train(plain)
    train(watched)
    first, second = (
        CheckpointReader(list_checkpoints(config.run_folder / "checkpoints")[-1]) for config in (plain, watched)
    )
    for name, weight in first.weights().items():
        assert torch.equal(second.read(name, "weight"), weight)
    assert torch.equal(first.generators(0)["torch"], second.generators(0)["torch"])  # type: ignore[index]


def test_bits_per_byte_is_the_loss_of_the_whole_text_over_its_bytes(tiny_config: MakeConfig) -> None:
    """The stream's packing must not hide or repeat text: recomputed from the documents themselves."""
    import math

    config = tiny_config({**SHORT, "train.total_tokens": 768})
    train(config)
    record = RunFolder(config.run_folder).metrics.read()[-1]
    tokenizer = load_tokenizer(config.tokenizer)
    text = validation_documents(config)
    tokens = sum(len(tokenizer.encode(t).ids) + 1 for t in text)  # and the end-of-text token of each
    nats = record["validation_loss"] * tokens
    expected = nats / math.log(2) / sum(len(t.encode()) for t in text)
    assert record["validation_bits_per_byte"] == pytest.approx(expected, rel=1e-9)


def validation_documents(config: Config) -> list[str]:
    import hashlib

    import pyarrow.parquet as pq

    texts = pq.read_table(config.data.sources[0].path)["text"].to_pylist()
    share = 2**64 * config.data.validation_fraction
    return [t for t in texts if int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), "big") < share]


def test_wandb_works_offline(tiny_config: MakeConfig) -> None:
    config = tiny_config({**SHORT, "wandb.mode": "offline"})
    assert train(config, stop_at=2) == 75
    assert list((config.run_folder / "wandb").glob("offline-run-*"))


def test_wandb_goes_on_offline_when_the_server_cannot_be_reached(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "0123456789" * 4
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setattr("pretrain.run.wandb.TIMEOUT_SECONDS", 3)
    config = tiny_config({**SHORT, "wandb.mode": "online"})
    assert train(config, stop_at=1) == 75
    assert "wandb cannot be reached" in capsys.readouterr().out
    assert list((config.run_folder / "wandb").glob("offline-run-*"))
    for file in config.run_folder.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_embedding_and_vectors_follow_the_schedule_at_rates_of_their_own(tiny_config: MakeConfig) -> None:
    config = tiny_config({"optimizer.adamw.embedding_lr": 0.05, "optimizer.adamw.vector_lr": 0.0})
    for stop in (2, 5):
        assert train(config, "auto", stop) == 75
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert line["embedding_lr"] == pytest.approx(line["lr"] * 0.05 / 0.02)
        assert line["vector_lr"] == 0
        assert "adamw_lr" not in line
