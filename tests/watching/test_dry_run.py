"""The dry run computes the largest batches before step 1, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.config import Config, ConfigError
from pretrain.model.loss import LossModel
from pretrain.training.dry_run import wants_dry_run
from tests.counting.counters import forwards
from tests.counting.where import configured, metrics, run_ranks, train

SHORT = {"train.total_tokens": 3 * 768, "schedule.warmup_tokens": 0}
KEYS = ("loss", "grad_norm", "lr", "batch_sha256", "validation_loss")


def results(root: Path, changes: dict[str, Any]) -> list[tuple[Any, ...]]:
    config = configured(str(root), SHORT | changes)
    train(config)
    return [tuple(line.get(key) for key in KEYS) for line in metrics(config)]


@pytest.mark.parametrize(
    "changes",
    [
        {"validation.batch_sequences": 9, "train.activation_checkpointing": "full"},
        pytest.param({"engine.kind": "deepspeed", "engine.zero_stage": 2}, marks=pytest.mark.long),
        pytest.param({"engine.kind": "deepspeed", "engine.zero_stage": 1}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_run_is_the_same_bit_for_bit_after_a_dry_run(changes: dict[str, Any], tmp_path: Path) -> None:
    without = results(tmp_path / "without", changes)
    with forwards(nn.Embedding) as calls:
        assert results(tmp_path / "with", changes | {"watch.dry_run": True}) == without
    first, second = calls[:2]
    assert (first.shape, first.training) == ((6, 32), True)
    if "validation.batch_sequences" in changes:
        assert (second.shape, second.training) == ((9, 32), False)


def losses(root: str, changes: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What the ranks of the next test do."""
    return results(Path(root), changes)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["plain", "deepspeed"])
def test_two_ranks_are_the_same_bit_for_bit_after_a_dry_run(kind: str, tmp_path: Path) -> None:
    found = [
        run_ranks(2, losses, str(tmp_path / str(wanted)), {"engine.kind": kind, "watch.dry_run": wanted})[0]
        for wanted in (False, True)
    ]
    assert found[0] == found[1]


def test_generators_and_gradients_stay_and_a_lack_of_memory_names_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that draws random numbers and finds no memory stands for a model with dropout on a small device."""
    forward, seen = LossModel.forward, []

    def greedy(self: LossModel, inputs: torch.Tensor, *arguments: Any) -> torch.Tensor:
        torch.rand(3)
        seen.append([p.grad for p in self.parameters()])
        if len(inputs) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
        return forward(self, inputs, *arguments)

    drawn: list[torch.Tensor] = []

    def draw(*_: Any) -> None:
        drawn.append(torch.get_rng_state())

    changes = SHORT | {"validation.batch_sequences": 9, "watch.dry_run": True}
    monkeypatch.setattr(LossModel, "forward", greedy)
    monkeypatch.setattr("pretrain.launch.dry_run", _around("pretrain.launch.dry_run", draw))
    with pytest.raises(ConfigError, match=r"validation\.batch_sequences: 9 sequences of 32 tokens .* 20\.00 GiB"):
        train(configured(str(tmp_path), changes))
    assert torch.equal(drawn[0], drawn[1])
    assert len(seen) == 2
    assert not any(gradient is not None for gradients in seen for gradient in gradients)
    monkeypatch.setattr(LossModel, "forward", forward)
    with monkeypatch.context() as patched:
        patched.setattr(LossModel, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
        with pytest.raises(ConfigError, match=r"train\.micro_batch_sequences: 6 sequences"):
            train(configured(str(tmp_path), changes))
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def _around(name: str, look: Any) -> Any:
    """The function with this name, with `look` called before and after it."""
    import pretrain.launch

    function = getattr(pretrain.launch, name.rpartition(".")[2])

    def called(*arguments: Any) -> Any:
        look()
        try:
            return function(*arguments)
        finally:
            look()

    return called


def test_on_a_cpu_and_where_weights_are_sharded_there_is_none(tiny_config: Callable[..., Config]) -> None:
    zero_3 = {"engine.kind": "deepspeed", "engine.zero_stage": 3}
    for changes, device, wanted in [
        ({}, "cpu", False),
        ({}, "cuda", True),
        ({"watch.dry_run": False}, "cuda", False),
        ({"watch.dry_run": True}, "cpu", True),
        (zero_3 | {"watch.dry_run": True}, "cuda", False),
        ({"engine.kind": "fsdp2", "watch.dry_run": True}, "cuda", False),
    ]:
        engine = SimpleNamespace(device=torch.device(device))
        trainer: Any = SimpleNamespace(config=tiny_config(changes), engine=engine)
        assert wants_dry_run(trainer) is wanted
