"""What reaches Weights & Biases: an offline run's records, read back with wandb's own reader."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.counting.ranks import counted
from tests.counting.where import configured, metrics, run_ranks, train

SHORT = {"train.total_tokens": 4 * 768, "schedule.warmup_tokens": 0, "validation.max_tokens": 6 * 32}
NUMBERS = ("loss", "lr", "grad_norm", "tokens", "tokens_per_second", "train_seconds")


def offline_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def records(file: Path) -> list[Any]:
    """Every record of an offline run."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store, found = DataStore(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        found.append(record)
    return found


def history(file: Path) -> list[dict[str, Any]]:
    """The logged steps of an offline run."""
    lines = [record.history for record in records(file) if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in line.item} for line in lines
    ]


def test_every_step_is_logged_with_its_numbers_against_our_step(tmp_path: Path) -> None:
    """A stop and a resume continue the same run and the same axis."""
    config = configured(str(tmp_path), SHORT | {"wandb.mode": "offline", "wandb.project": "counted"})
    assert train(config, "auto", 2) == 75
    assert train(config, "auto") == 0
    first, second = offline_runs(config.run_folder)
    lines = history(first) + history(second)
    written = metrics(config)
    assert [line["step"] for line in lines] == [line["step"] for line in written] == [1, 2, 3, 4]
    for line, record in zip(lines, written, strict=True):
        for key in NUMBERS:
            assert line[key] == pytest.approx(record[key]), key
    assert lines[-1]["validation_loss"] == pytest.approx(written[-1]["validation_loss"])
    runs = [record.run for file in (first, second) for record in records(file) if record.HasField("run")]
    assert {(run.project, run.display_name) for run in runs} == {("counted", "tiny")}
    assert len({run.run_id for run in runs}) == 1
    axes = [record.metric for file in (first, second) for record in records(file) if record.HasField("metric")]
    assert {metric.step_metric for metric in axes if metric.glob_name == "*" or metric.name == "*"} == {"step"}


def test_a_disabled_tracker_neither_writes_nor_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import fails
    config = configured(str(tmp_path), SHORT)
    assert train(config, "auto", 1) == 75
    assert not (config.run_folder / "wandb").exists()


def test_only_rank_0_logs(tmp_path: Path) -> None:
    changes = SHORT | {"wandb.mode": "offline"}
    run_ranks(2, counted, str(tmp_path), changes, 2)
    [file] = offline_runs(configured(str(tmp_path), changes).run_folder)
    assert [line["step"] for line in history(file)] == [1, 2]
