"""Neuron telemetry: it measures what it says, and changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.config import Config
from pretrain.data import TokenStream
from pretrain.data.batch import TokenBatch
from pretrain.engine.plain import PlainEngine
from pretrain.engine.ranks import Ranks
from pretrain.launch import train
from pretrain.model.build import build_model
from pretrain.neurons import telemetry
from pretrain.neurons.telemetry import load_arrays, measurements
from pretrain.neurons.watched import Watched, watched_matrices
from pretrain.run.json_lines import JsonLines
from pretrain.training.validation import Validator
from tests.conftest import SMALL_VOCABULARY
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import metrics, run, tensors

MakeConfig = Callable[..., Config]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "aurora": {"optimizer.polar": "gram", "optimizer.polar_dtype": "fp32"},
    "muon": {"optimizer.name": "muon"},
    "normuon": {"optimizer.name": "normuon"},
    "u_normuon": {"optimizer.name": "u_normuon"},
    "riemannian_aurora": {"optimizer.name": "riemannian_aurora"},
    "adamw": {"optimizer": {"name": "adamw", "adamw": {"lr": 3e-3}}},
}
ON = {"telemetry.every_steps": 5, "telemetry.reference_step": 10, "telemetry.activation_sequences": 6}
SHORT = SMALL_VOCABULARY | {"train.total_tokens": 20 * 768, "schedule.warmup_tokens": 0, "validation.every_steps": 7}
MLP = ("gate_proj", "up_proj", "down_proj")


def records(config: Config) -> dict[int, dict[str, Any]]:
    """The measured steps of a run."""
    found = JsonLines(config.run_folder / "metrics.jsonl").read()
    return {record["step"]: record for record in found if "telemetry/seconds" in record}


def arrays(config: Config, step: int) -> dict[str, Tensor]:
    return load_arrays(dict(measurements(config.run_folder / "telemetry"))[step])


def gradient(engine: PlainEngine, watched: Watched) -> Tensor:
    grad = engine.module.get_parameter(watched.parameter).grad
    assert grad is not None
    return grad


def newest(config: Config) -> CheckpointReader:
    return CheckpointReader(list_checkpoints(config.run_folder / "checkpoints")[-1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_bit_identical_with_it_and_without(optimizer: str, tmp_path: Path) -> None:
    changes = OPTIMIZERS[optimizer] | SHORT | {"train.total_tokens": 8 * 768}
    run(str(tmp_path / "off"), changes)
    run(str(tmp_path / "on"), changes | ON | {"telemetry.every_steps": 1, "telemetry.reference_step": 4})
    off, on = tensors(tmp_path / "off"), tensors(tmp_path / "on")
    assert {key: value for key, value in on.items() if key[1] != "telemetry_average"}.keys() == off.keys()
    assert all(torch.equal(on[key], value) for key, value in off.items())
    exact = ("step", "loss", "grad_norm", "batch_sha256")
    assert metrics(tmp_path / "on", *exact) == metrics(tmp_path / "off", *exact)
    assert all("telemetry/leverage_dead" in line for line in JsonLines(tmp_path / "on/tiny/metrics.jsonl").read())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_leverage_is_that_of_the_averaged_clipped_gradients(optimizer: str, tiny_config: MakeConfig) -> None:
    """Against an average and an SVD in fp64, with gradients squeezed to condition 1e4."""
    config = tiny_config(OPTIMIZERS[optimizer] | SHORT | ON | {"train.grad_clip": 0.05, "telemetry.every_steps": 1})
    averages: dict[str, Tensor] = {}
    clip = PlainEngine.clip_gradients

    def squeeze(self: PlainEngine, max_norm: float | None) -> Tensor:
        for watched in watched_matrices(self.module):
            grad = watched.by_neuron(gradient(self, watched))
            u, sigma, v = torch.linalg.svd(grad.double(), full_matrices=False)
            grad.copy_(u * (sigma[0] * torch.logspace(0, -4, len(sigma), dtype=torch.float64)) @ v)
        norm = clip(self, max_norm)
        for watched in watched_matrices(self.module):
            g = watched.by_neuron(gradient(self, watched)).double()
            averages[watched.name] = 0.95 * averages.get(watched.name, torch.zeros_like(g)) + 0.05 * g
        return norm

    expected = {}
    for step in (1, 5, 10):
        with mock.patch.object(PlainEngine, "clip_gradients", squeeze):
            train(config, stop_at=step)
        expected[step] = {name: torch.linalg.svd(b, full_matrices=False) for name, b in averages.items()}
    for step, by_matrix in expected.items():
        found = arrays(config, step)
        for name, (u, _sigma, _) in by_matrix.items():
            scores = u.square().sum(dim=1)
            assert float((found[f"{name}.leverage"] - scores / scores.mean()).abs().max()) < 1e-4
        assert len(by_matrix) == 6
    assert min(float(sigma[0] / sigma[-1]) for _, sigma, _ in expected[1].values()) > 0.99e4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_planted_dead_neurons_are_found_exactly(optimizer: str, tiny_config: MakeConfig) -> None:
    """Gate and up rows whose gradients are zeroed, in 3 layers: their leverage and their direction are zero."""
    config = tiny_config(
        OPTIMIZERS[optimizer]
        | SHORT
        | ON
        | {"model.num_layers": 4, "train.total_tokens": 10 * 768, "telemetry.reference_step": 5}
    )
    planted = {0: [3, 40], 2: [0, 1, 2, 63], 3: [31]}
    with planted_dead(planted):
        train(config)
    found = arrays(config, 10)
    for layer in range(4):
        for name in ("gate_proj", "up_proj"):
            for kind in ("leverage", "direction"):
                dead = (found[f"layers.{layer}.{name}.{kind}"] < 0.01).nonzero().flatten().tolist()
                assert dead == planted.get(layer, []), (layer, name, kind)
    record = records(config)[10]
    assert record["telemetry/leverage_below_0.01"] == pytest.approx(7 / 256)
    assert record["telemetry/starved"] >= 7 / 256
    assert record["telemetry/layers.2.up_proj/leverage_below_0.01"] == pytest.approx(4 / 64)
    assert record["telemetry/dead_forever"] > 0.9  # all 14 planted ones, and what else was dead at step 5
    assert records(config)[5]["telemetry/dead_forever"] is None


@contextmanager
def planted_dead(planted: dict[int, list[int]]) -> Iterator[None]:
    """Zero these rows of the gradients of gate_proj and up_proj, before clipping."""
    clip = PlainEngine.clip_gradients

    def plant(self: PlainEngine, max_norm: float | None) -> Tensor:
        for watched in watched_matrices(self.module):
            rows = planted.get(int(watched.name.split(".")[1]), [])
            if watched.neurons == "rows":
                gradient(self, watched)[rows] = 0.0
        return clip(self, max_norm)

    with mock.patch.object(PlainEngine, "clip_gradients", plant):
        yield


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_direction_is_the_one_that_moved_the_weights(optimizer: str, tiny_config: MakeConfig) -> None:
    config = tiny_config(OPTIMIZERS[optimizer] | SHORT | ON | {"checkpoint.keep_last": 2})
    train(config, stop_at=9)
    train(config, stop_at=10)
    before, after = (CheckpointReader(path) for path in list_checkpoints(config.run_folder / "checkpoints"))
    for watched in watched_matrices(build_model(config.model, 0, device="meta")):
        weights = (reader.read(watched.parameter, "weight").double() for reader in (before, after))
        moved = watched.by_neuron(next(weights) - next(weights))
        norms = moved.square().sum(dim=1)
        found = arrays(config, 10)[f"{watched.name}.direction"].double()
        assert float((found - norms / norms.mean()).abs().max()) < 1e-3
        assert float(found.mean()) == pytest.approx(1, abs=1e-6)


def test_activations_are_those_of_the_fixed_validation_batch(tiny_config: MakeConfig) -> None:
    config = tiny_config(SHORT | ON)
    train(config, stop_at=5)
    model = build_model(config.model, 0)
    model.load_state_dict(newest(config).weights(), strict=False)
    model.tie_weights()
    stream = TokenStream(config.data, config.tokenizer, 32, split="validation", epochs=1)
    batch: TokenBatch = Validator(config, lambda: stream, Ranks()).batches()[0]
    seen: list[Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(input_ids=batch.tokens[:, :-1].long())
    valid = torch.arange(32) < batch.lengths[:, None]
    mean = seen[0][valid].abs().double().mean(dim=0)
    assert len(batch.lengths) == 6
    assert torch.allclose(arrays(config, 5)["layers.1.activation"].double(), mean / mean.mean(), atol=1e-5)


def test_stopping_twice_changes_no_measurement(tiny_config: MakeConfig, tmp_path: Path) -> None:
    whole, parts = (tiny_config(SHORT | ON | {"run.name": name}) for name in ("whole", "parts"))
    train(whole)
    for stop in (8, 13, None):
        train(parts, stop_at=stop)
    expected, found = records(whole), records(parts)
    assert list(found) == list(expected) == [5, 10, 15, 20]
    for step, record in expected.items():
        same = {k: v for k, v in record.items() if k.startswith("telemetry/") and k != "telemetry/seconds"}
        assert same == {key: found[step][key] for key in same}
        assert all(torch.equal(value, arrays(parts, step)[key]) for key, value in arrays(whole, step).items())


def test_measurements_of_a_future_that_is_trained_anew_are_set_aside(tiny_config: MakeConfig) -> None:
    config = tiny_config(SHORT | ON | {"checkpoint.save_every_steps": 7})
    train(config, stop_at=12)
    newest_folder = list_checkpoints(config.run_folder / "checkpoints")[-1]
    (newest_folder / "index.json").unlink()  # step 12 is lost: the run resumes from step 7
    train(config, stop_at=9)
    folder = config.run_folder / "telemetry"
    assert [step for step, _ in measurements(folder)] == [5]
    assert [step for step, _ in measurements(folder / "discarded")] == [10]


def test_a_void_step_leaves_the_average_and_starves_nobody(tiny_config: MakeConfig) -> None:
    config = tiny_config(SHORT | ON)
    clip = PlainEngine.clip_gradients
    count = [0]

    def break_step_10(self: PlainEngine, max_norm: float | None) -> Tensor:
        count[0] += 1
        if count[0] == 10:
            next(self.module.parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
        return clip(self, max_norm)

    with mock.patch.object(PlainEngine, "clip_gradients", break_step_10):
        train(config)
    record = records(config)[10]
    assert record["skipped"]
    assert record["telemetry/starved"] is None
    assert record["telemetry/leverage_dead"] is not None
    assert records(config)[20]["telemetry/starved"] is not None


def test_a_square_mlp_says_nothing(tiny_config: MakeConfig) -> None:
    config = tiny_config(SHORT | ON | {"model.intermediate_size": 32})
    train(config)
    record = records(config)[20]
    for key in ("leverage_dead", "down_proj/leverage_dead", "layers.0.gate_proj/leverage_cv", "dead_forever"):
        assert record[f"telemetry/{key}"] is None
    assert record["telemetry/activation_dead"] is not None


def test_survivors_are_followed_from_the_reference_step_on(tmp_path: Path) -> None:
    def measured(*values: float) -> dict[str, Tensor]:
        return {"layers.0.gate_proj.leverage": torch.tensor(values)}

    history = {4: (0.0, 0.0, 0.0, 1.0), 5: (0.0, 0.0, 1.0, 0.0), 6: (0.0, 1.0, 0.0, 0.0), 7: (0.0, 0.0, 1.0, 1.0)}
    survivors = telemetry._Survivors(5)
    shares = []
    for step, values in history.items():
        shares.append(survivors.follow(step, measured(*values), tmp_path))
        telemetry.save_arrays(tmp_path, step, measured(*values))
    assert shares == [None, None, 2 / 3, 1 / 3]
    assert telemetry._Survivors(5).follow(8, measured(1, 0, 0, 1), tmp_path) == 0
    assert telemetry._Survivors(3).follow(8, measured(0, 0, 0, 0), tmp_path) is None  # step 3 was not measured


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_measurements_have_the_mode_that_the_umask_leaves(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        path = telemetry.save_arrays(tmp_path, 1, {"a": torch.ones(2, 3).T, "b": None})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
    assert load_arrays(path)["a"].shape == (3, 2)


def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    changes = SHORT | ON
    for world_size in (1, 2):
        assert set(run_ranks(world_size, run, str(tmp_path / str(world_size)), changes)) == {0}
    one, two = (load_arrays(measurements(tmp_path / n / "tiny/telemetry")[0][1]) for n in ("1", "2"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(two[key], value, atol=1e-3), key
