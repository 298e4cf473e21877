"""Training the speedrun architecture: checkpoints keep a bf16 weight to the bit, what it cannot do is refused, and the
shipped configs that have not been run take their first steps at a reduced width."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizers import Aurora, param_groups
from pretrain.checkpoint.state import load_state
from pretrain.checkpoint.store import CheckpointReader
from pretrain.cli import main
from pretrain.config import Config, load_config, parse_config
from pretrain.launch import train
from pretrain.model.build import build_model
from pretrain.model.cost import parameter_count
from pretrain.sweep import load_sweep, plan_jobs
from tests.conftest import REPOSITORY, SPEEDRUN, merged

MakeConfig = Callable[..., Config]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def bf16_run(tiny_config: MakeConfig) -> Config:
    """A run of the architecture with its embedding in bf16, stopped after 3 of 5 steps."""
    config = tiny_config(
        {
            "model": {**SPEEDRUN, "embedding_dtype": "bf16"},
            "train.total_tokens": 5 * 768,
            "schedule.warmup_tokens": 0,
            "validation.every_steps": 2,
        }
    )
    assert train(config, stop_at=3) == 75
    return config


def metrics(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]


def test_a_checkpoint_keeps_a_bf16_weight_and_its_fp32_state_to_the_bit(bf16_run: Config) -> None:
    reader = CheckpointReader(bf16_run.run_folder / "checkpoints" / "step-00000003")
    slots = reader.index["parameters"][EMBEDDING]
    assert {slot: record["dtype"] for slot, record in slots.items()} == {
        "weight": "bfloat16",
        "exp_avg": "float32",
        "exp_avg_sq": "float32",
        "step": "float32",
    }
    model = build_model(bf16_run.model, seed=99)
    optimizer = Aurora(param_groups(model, bf16_run.optimizer.settings()))
    load_state(reader, model, optimizer)
    weight = model.get_parameter(EMBEDDING)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.view(torch.int16), reader.read(EMBEDDING, "weight").view(torch.int16))
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    # The state tells more than the weight can hold: it did not go through bf16.
    average = optimizer.state[weight]["exp_avg"]
    assert not torch.equal(average, average.bfloat16().float())
    initial = build_model(bf16_run.model, bf16_run.run.seed).get_parameter(EMBEDDING)
    assert not torch.equal(weight, initial)


def test_it_is_validated_and_continues(bf16_run: Config) -> None:
    assert train(bf16_run) == 0
    lines = metrics(bf16_run)
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4, 5]
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(9.0109, abs=1e-3)  # ln 8192: the head begins at zero
    assert losses[-1] < losses[0]
    assert lines[-1]["validation_loss"] < lines[1]["validation_loss"]


def test_its_export_is_refused_with_one_message(
    bf16_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    out = tmp_path / "export"
    for arguments in (
        ["export", str(bf16_run.run_folder), str(out)],
        ["eval", str(bf16_run.run_folder), "--tasks", "hellaswag", "--out", str(out)],
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "model.architecture is 'speedrun'" in line
        assert "only 'llama'" in line
        assert not out.exists()


def test_a_config_with_samples_is_refused_with_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["check", "configs/speedrun-3175.yaml", "samples.every_steps=10"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: samples.every_steps: expected null")


# ---- The shipped configs


def test_the_speedrun_recipe_is_the_records() -> None:
    config = load_config(REPOSITORY / "configs" / "speedrun-3175.yaml")
    assert config.total_steps == 3200
    assert config.global_batch_sequences == 512
    assert 3175 % (config.validation.every_steps or 0) == 0
    assert config.validation.max_tokens == 20 * 524_288
    settings = config.optimizer.settings()
    wanted = {"lr": 0.0375, "momentum": 0.95, "nesterov": True, "weight_decay": 0, "lr_scale": "aspect"}
    wanted |= {"scope": "all", "iterations": 2, "beta": 0.5, "balance_rule": "tyler", "row_balance": "polar"}
    wanted |= {"contra": 0.2, "uw_floor": 0.35}
    assert {key: settings.matrix[key] for key in wanted} == wanted
    rates = {group["role"]: group["lr"] for group in param_groups(build_model(config.model, 0, "meta"), settings)}
    assert rates == {"hidden": 0.0375, "embedding": 0.3, "head": 1 / 320, "vector": 0.01}
    assert settings.adamw["betas"] == (0.8, 0.95)
    # The record's 1e-10 applies to gradients of the sum over a batch; scaled here for gradients of the mean.
    assert settings.adamw["eps"] * config.train.global_batch_tokens == pytest.approx(1e-10)


# In the speedrun model: 12 blocks of 4 (768^2 + 768) + 2 * 768 * 3072 + 3072 + 768 + 2 * 768, an embedding of
# 50,304 * 768, a head of 50,304 * 769, two more norms of 768. In the 340M: 16 blocks of 4 * 1152^2 + 3 * 1152 * 4608 +
# 2 * 1152, embedding and head of 50,304 * 1152, one more norm of 1152.
@pytest.mark.parametrize(
    ("name", "total", "embedding", "head"),
    [("speedrun-3175", 162_354_816, 38_633_472, 38_683_776), ("aurora-340m", 455_677_056, 57_950_208, 57_950_208)],
)
def test_the_configs_that_were_not_run_build_with_the_counted_parameters(
    name: str, total: int, embedding: int, head: int
) -> None:
    config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
    model = build_model(config.model, seed=1, device="meta")
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.get_input_embeddings().parameters()) == embedding
    assert sum(p.numel() for p in model.get_output_embeddings().parameters()) == head
    counts = parameter_count(config.model)
    assert (counts["total"], counts["embedding"], counts["head"]) == (total, embedding, head)


def reduced(config: Config, root: Path) -> Config:
    """The config at a width and length that a CPU trains in a second; all else as it stands."""
    changes = {
        "run.root": str(root),
        "model.vocab_size": 8192,
        "model.hidden_size": 64,
        "model.intermediate_size": 256,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
        "model.context_length": 64,
        "data.sources": [{"path": str(REPOSITORY / "assets/corpus/moby_dick.parquet")}],
        "data.lanes": 4,
        "tokenizer.path": str(REPOSITORY / "assets/tokenizer/tokenizer.json"),
        "schedule.warmup_tokens": 0,
        "train.global_batch_tokens": 1024,
        "train.total_tokens": 5 * 1024,
        "train.micro_batch_sequences": 8,
        "train.loss_chunk_tokens": 256,
        "train.precision": "fp32",
        "train.compile": False,
        "validation.max_tokens": 4096,
        "telemetry.reference_step": 5,
    }
    if config.samples.every_steps is not None:
        changes |= {"samples.every_steps": 5, "samples.max_new_tokens": 4}
    return parse_config(merged(config.resolved(), changes))


def take_five_steps(config: Config) -> None:
    assert train(config) == 0
    lines = metrics(config)
    losses = [line["loss"] for line in lines]
    assert len(losses) == 5
    assert not any(line.get("skipped") for line in lines)
    assert torch.tensor([*losses, lines[-1]["validation_loss"]]).isfinite().all()
    assert losses[-1] < losses[0] - 0.05, losses
    for key in ("leverage_dead", "starved", "activation_dead"):
        assert lines[-1][f"telemetry/{key}"] is not None


@pytest.mark.parametrize("name", ["speedrun-3175", "aurora-340m"])
def test_the_configs_that_were_not_run_take_five_steps_at_a_reduced_width(name: str, tmp_path: Path) -> None:
    take_five_steps(reduced(load_config(REPOSITORY / "configs" / f"{name}.yaml"), tmp_path))


@pytest.mark.long
def test_the_four_optimizers_of_the_340m_sweep_take_five_steps_at_a_reduced_width(tmp_path: Path) -> None:
    jobs = plan_jobs(load_sweep(REPOSITORY / "configs/experiments/aurora_340m.yaml"))
    first = [job.config for job in jobs if job.labels["seed"] == "1" and job.config]
    assert [config.optimizer.name for config in first] == ["muon", "aurora", "u_normuon", "adamw"]
    for config in first:
        take_five_steps(reduced(config, tmp_path))
