"""``aurora eval RUN --every-checkpoint`` on a real run and made-up items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import items
from eval.results import read_result
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.cli import main
from pretrain.cli.evaluated_runs import evaluations
from pretrain.config import parse_config
from pretrain.launch import train
from tests.conftest import TINY, merged
from tests.eval.conftest import cache_with_items


def test_every_checkpoint_has_a_result_of_its_own_weights(
    tmp_path: Path, fetched: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AURORA_CACHE", str(cache_with_items(fetched, tmp_path / "cache")))
    monkeypatch.setattr(items, "_is_intact", lambda folder, package: True)
    short = {"train.total_tokens": 2 * 768, "schedule.warmup_tokens": 0, "data.validation_fraction": 0.0}
    config = parse_config(merged(TINY, short | {"run.root": str(tmp_path), "checkpoint.save_every_steps": 1}))
    assert train(config) == 0
    command = ["eval", str(config.run_folder), "--every-checkpoint", "--tasks", "winogrande"]
    assert main([*command, "--limit", "3", "--selection", "spread"]) == 0
    assert capsys.readouterr().out.count("result in") == 2

    folder = config.run_folder / "eval"
    checkpoints = list_checkpoints(config.run_folder / "checkpoints")
    results = [read_result(folder / checkpoint.name) for checkpoint in checkpoints]
    assert [result["model"]["provenance"] for result in results] == [
        {
            "run_name": "tiny",
            "step": step,
            "tokens": 768 * step,
            "checkpoint_sha256": CheckpointReader(checkpoint).index["digest"],
        }
        for step, checkpoint in enumerate(checkpoints, start=1)
    ]
    assert [item["doc_id"] for item in results[0]["tasks"]["winogrande"]["items"]] == [0, 7, 15]
    assert results[0]["model"]["name"] == str(checkpoints[0])
    weights = [result["model"]["weights_sha256"] for result in results]
    assert weights[0] != weights[1]

    before = [(folder / checkpoint.name / "results.json").stat().st_mtime_ns for checkpoint in checkpoints]
    assert main([*command, "--limit", "3", "--selection", "spread", "--follow"]) == 0
    assert "evaluating" not in capsys.readouterr().out
    assert main([*command, "--limit", "2", "--selection", "spread"]) == 2  # a smaller result would replace a larger one
    assert "choose another --out" in capsys.readouterr().err
    after = [(folder / checkpoint.name / "results.json").stat().st_mtime_ns for checkpoint in checkpoints]
    assert after == before
    assert main([*command, "--limit", "2", "--out", str(folder / "few")]) == 0
    found = evaluations({"tiny": config.run_folder})
    assert found is not None
    assert [(row["series"], row["step"]) for row in found["series"]] == [(".", 1), (".", 2), ("few", 1), ("few", 2)]
    assert json.loads((folder / "few" / checkpoints[1].name / "results.json").read_text())["limit"] == 2
