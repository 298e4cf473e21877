"""Options of an export, its files, and its model card."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard as HubCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pretrain.checkpoint.store import list_checkpoints
from pretrain.cli import main
from pretrain.cli.export import file_size, licence
from pretrain.config import Config, parse_config
from pretrain.export.card import CardScore
from pretrain.export.folder import ExportError
from pretrain.launch import train
from tests.conftest import SMALL_VOCABULARY, TINY, merged
from tests.eval.results import a_group, a_result, write
from tests.test_export import card, llama, read_json, save


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_are_readable_as_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        out = save(llama(), tmp_path / "out", max_shard_size="500KB")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert len(modes) > 8
    assert set(modes.values()) == {0o666 & ~mask}, modes


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_weights_are_stored_in_the_dtype_that_is_asked_for(tmp_path: Path, name: str) -> None:
    dtype, model = getattr(torch, name), llama()
    out = save(model, tmp_path / "out", dtype=dtype)
    config = read_json(out / "config.json")
    assert config["dtype"] == config["torch_dtype"] == name
    with safe_open(out / "model.safetensors", "pt") as file:
        for key, values in model.state_dict().items():
            assert torch.equal(file.get_tensor(key), values.to(dtype)), key
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype is dtype
    assert f"| dtype | {name} |" in (out / "README.md").read_text()


def test_a_weight_beyond_the_range_of_the_dtype_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.model.norm.weight.data[3] = 7e4
    with pytest.raises(ExportError, match=r"model.norm.weight: values beyond 65504, the largest float16"):
        save(model, tmp_path / "out", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    save(model, tmp_path / "out", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("700", 700), ("2TB", 2 * 10**12), ("1KB", 1000)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert file_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GB", "5 GiB", "1e9", "nan", "0.0001", "9" * 99])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size"):
        file_size(text)


@pytest.mark.parametrize("text", ["", "a b", "mit\n# x", "a: b", "-x", "l" * 99])
def test_licences_that_are_no_identifier_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected an identifier"):
        licence(text)


def test_the_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    nasty = "hella|swag\n- x: <b>"
    facts: dict[str, Any] = {
        "licence": "apache-2.0",
        "datasets": ["allenai/dolma3"],
        "hyperparameters": {"optimizer.lr": 0.02},
        "scores": [
            CardScore("winogrande", "acc", 0.5125, (0.4845, 0.5404), 0, "validation", "1,267 of 1,267 (validation)"),
            CardScore(nasty, "acc_norm", 0.25, None, 10, "test", "1 of 1 (test, from the Hub)"),
        ],
    }
    out = save(llama(), tmp_path / "out", card=card(**facts))
    data = HubCard.load(out / "README.md").data
    assert (data.license, data.datasets, data.library_name) == ("apache-2.0", ["allenai/dolma3"], "transformers")
    assert [
        (found.dataset_name, found.dataset_split, found.metric_type, found.metric_value) for found in data.eval_results
    ] == [("winogrande", "validation", "acc", 0.5125), (nasty, "test", "acc_norm", 0.25)]
    body = (out / "README.md").read_text().split("---\n", 2)[2]
    assert "<b>" not in body
    for line in (
        "| licence | apache-2.0 |",
        "| winogrande | 0 | acc | 0.5125 | 0.4845 to 0.5404 | 1,267 of 1,267 (validation) |",
        "| 10 | acc\\_norm | 0.2500 | not known | 1 of 1 (test, from the Hub) |",
        "| optimizer.lr | 0.02 |",
    ):
        assert line in body
    plain = (save(llama(), tmp_path / "plain") / "README.md").read_text()
    assert "license:" not in plain
    assert "| licence | not stated; those of the training data are below |" in plain
    assert "## Evaluation" not in plain


def test_the_lines_that_load_the_model_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = save(llama(), tmp_path / "out")
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(out)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("<|endoftext|>Once upon a time")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("trained")
    short = {"train.total_tokens": 2 * 768, "schedule.warmup_tokens": 0, "data.validation_fraction": 0.0}
    changes = SMALL_VOCABULARY | short | {"run.root": str(root), "checkpoint.save_every_steps": 1}
    config = parse_config(merged(TINY, changes))
    assert train(config) == 0
    return config


def test_the_card_of_a_checkpoint_has_its_own_scores_and_settings(trained: Config, tmp_path: Path) -> None:
    """Those of another step, of weights that were trained again, and files that cannot be read are left out."""
    _, second = list_checkpoints(trained.run_folder / "checkpoints")
    out = tmp_path / "out"
    assert (
        main(["export", str(second), str(out), "--dtype", "bfloat16", "--shard-size", "100KB", "--licence", "MIT"]) == 0
    )
    digest = read_json(out / "aurora.json")["checkpoint_sha256"]

    def result(step: int, outcomes: list[int], sha256: str, folder: str) -> None:
        found = a_result({"winogrande": outcomes})
        found["model"]["provenance"] = {
            "run_name": "tiny", "step": step, "tokens": 1, "checkpoint_sha256": sha256
        }  # fmt: skip
        write(trained.run_folder / "eval" / folder, found)

    result(1, [1] * 9, digest, "step-00000001")
    result(2, [1, 0, 0, 0], digest, "step-00000002")
    result(2, [1, 1], digest, "fewer")
    result(2, [1] * 9, "0" * 64, "of-other-weights")
    write(trained.run_folder / "eval" / "damaged", "{")
    with pytest.warns(UserWarning, match="not in the model card"):
        assert main(["export", str(trained.run_folder), str(out), "--licence", "MIT"]) == 0
    data = HubCard.load(out / "README.md").data
    assert data.license == "mit"
    assert [found.metric_value for found in data.eval_results] == [0.25]
    text = (out / "README.md").read_text()
    for line in (
        "| winogrande | 0 | acc | 0.2500 | 0.0063 to 0.8059 | 4 of 4 (",
        "| optimizer.lr | 0.02 |",
        "packaged in made-up-1",
    ):
        assert line in text
    assert "| train.global\\_batch\\_tokens | 768 |" in text


def test_a_group_of_tasks_is_one_line_of_the_card(trained: Config, tmp_path: Path) -> None:
    result = a_result({"mmlu_a": [1, 1, 0], "mmlu_b": [0], "winogrande": [1]})
    result["model"]["provenance"] = {"run_name": "tiny", "step": 2, "tokens": 1}
    for task in ("mmlu_a", "mmlu_b"):
        result["tasks"][task] |= {"num_fewshot": 5, "metric": "acc"}
    result["groups"] = {"mmlu": a_group(result, ["mmlu_a", "mmlu_b"])}
    shutil.rmtree(trained.run_folder / "eval", ignore_errors=True)
    write(trained.run_folder / "eval" / "mmlu", result)
    assert main(["export", str(trained.run_folder), str(tmp_path / "out")]) == 0
    shutil.rmtree(trained.run_folder / "eval")
    text = (tmp_path / "out" / "README.md").read_text().split("## Evaluation")[1].split("##")[0]
    assert "not training seeds" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert rows == [
        ["mmlu", "5", "acc", "0.5000", "0.0676 to 0.9324", "4 of 4 (2 tasks, validation, packaged in made-up-1)"],
        ["winogrande", "0", "acc", "1.0000", "0.0250 to 1.0000", "1 of 1 (validation, packaged in made-up-1)"],
    ]


def test_the_options_reach_the_files(trained: Config, tmp_path: Path) -> None:
    shutil.rmtree(trained.run_folder / "eval", ignore_errors=True)
    out = tmp_path / "out"
    options = ["--dtype", "bfloat16", "--shard-size", "100KB"]
    assert main(["export", str(trained.run_folder), str(out), *options]) == 0
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    assert AutoModelForCausalLM.from_pretrained(out).dtype is torch.bfloat16
    for options in (["--dtype", "int8"], ["--shard-size", "small"], ["--licence", "two words"]):
        with pytest.raises(SystemExit) as caught:
            main(["export", str(trained.run_folder), str(out), *options])
        assert caught.value.code == 2
