"""Best-fit packing, document masks and restarted positions together, from the config to resumed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import parse_config, parse_stored_config
from pretrain.launch import train
from pretrain.run.folder import RunError
from tests.conftest import SPEEDRUN, TINY, merged
from tests.data.corpus import make_texts, write_jsonl
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import metrics, newest, run, tensors

BEST_FIT = {
    "data.packing": "best_fit",
    "data.document_mask": True,
    "data.reset_positions": True,
    "data.lanes": 3,
    "data.validation_fraction": 0.1,
    "train.total_tokens": 5 * 768,
    "schedule": {"kind": "constant"},
}

ZERO = {"engine.kind": "deepspeed", "engine.zero_stage": 2, "train.precision": "bf16", "data.workers": 1}


def changed(folder: Path, **changes: Any) -> dict[str, Any]:
    """Short documents, so that a sequence of 32 tokens holds several."""
    path = folder / "text.jsonl"
    if not path.exists():
        write_jsonl(path, make_texts(1, 900, longest=24))
    return {**BEST_FIT, "data.sources": [{"path": str(path), "split_units": 3}], **changes}


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        pytest.param(1, {}, id="1 process"),
        pytest.param(2, {}, id="2 processes"),
        pytest.param(2, ZERO, id="ZeRO", marks=pytest.mark.long),
        pytest.param(1, {"model": SPEEDRUN, "train.precision": "bf16"}, id="speedrun", marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_resumes_to_the_bit(world_size: int, more: dict[str, Any], tmp_path: Path) -> None:
    changes = changed(tmp_path, **more)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert set(run_ranks(world_size, run, str(whole), changes)) == {0}
    for stop, code in ((2, 75), (None, 0)):
        assert set(run_ranks(world_size, run, str(parts), changes, stop)) == {code}
    keys = ("step", "loss", "grad_norm", "batch_sha256")
    assert metrics(parts, *keys) == metrics(whole, *keys)
    assert len(metrics(whole, "step")) == 5
    expected, found = tensors(whole), tensors(parts)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert newest(parts).index["data_state"] == newest(whole).index["data_state"]


def test_the_batches_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    for stop, ranks, code in ((2, 2, 75), (4, 1, 75), (None, 3, 0)):
        changes = changed(tmp_path, **{"train.micro_batch_sequences": 4})
        assert set(run_ranks(ranks, run, str(tmp_path / "mixed"), changes, stop)) == {code}
    assert set(run_ranks(1, run, str(tmp_path / "one"), changes)) == {0}
    assert metrics(tmp_path / "mixed", "batch_sha256") == metrics(tmp_path / "one", "batch_sha256")
    [[first, *_], *_] = metrics(tmp_path / "mixed", "loss")
    [[expected, *_], *_] = metrics(tmp_path / "one", "loss")
    assert first == pytest.approx(expected, rel=1e-6)


def test_what_was_padded_and_cut_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path), changed(tmp_path)) == 0
    [source] = newest(tmp_path).index["data_state"]["sources"]
    positions = source["sequences"] * 32
    assert 0 < source["cut_documents"] < source["documents"]
    assert 0 < source["tokens"] < positions == 5 * 768
    shown = capsys.readouterr().out
    assert "attention segments: one call for each document" in shown
    [line] = [line for line in shown.splitlines() if "best-fit packing has padded" in line]
    assert f"padded {1 - source['tokens'] / positions:.2%} of 120 sequences" in line
    assert f"cut {source['cut_documents']} of {source['documents']} documents" in line


def test_a_run_cannot_change_its_packing(tmp_path: Path) -> None:
    """The position of a lane means something else."""
    changes = changed(tmp_path)
    for before, after in (("concatenate", "best_fit"), ("best_fit", "concatenate")):
        root = str(tmp_path / before)
        assert run(root, {**changes, "data.packing": before}, 1) == 75
        with pytest.raises(RunError, match=r"data\.packing: .* in the run, .* now"):
            train(parse_config(merged(TINY, {"run.root": root, **changes, "data.packing": after})))


def test_dense_masks_give_the_same_training(tmp_path: Path) -> None:
    found = {}
    for kind in ("auto", "dense"):
        assert run(str(tmp_path / kind), changed(tmp_path, **{"train.document_attention": kind})) == 0
        found[kind] = [loss for [loss] in metrics(tmp_path / kind, "loss")]
    assert found["auto"] == pytest.approx(found["dense"], rel=1e-4)


def test_a_run_of_an_older_version_had_dense_masks(tmp_path: Path) -> None:
    """Its config does not say so; on resume, a change of the rounding is announced, and nothing without masks."""
    for changes, expected in (
        ({}, None),
        ({"data.document_mask": True}, "dense"),
        ({"data.reset_positions": True}, "dense"),
    ):
        stored = parse_config(merged(TINY, changes)).resolved()
        assert stored["train"].pop("document_attention", None) == ("auto" if changes else None)
        assert parse_stored_config(stored).keys_of("numerics").get("train.document_attention") == expected
