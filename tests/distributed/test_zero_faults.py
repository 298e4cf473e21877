"""What goes silently wrong with a matrix optimizer under DeepSpeed, and that it is caught here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from optimizers import Aurora
from optimizers.sharded import LayoutError, zero_layout
from optimizers.sharded.engines.deepspeed import ContractError, read_layout
from optimizers.sharded.layout import Layout, ShardFragment
from pretrain.checkpoint.format import CheckpointError
from pretrain.checkpoint.store import CheckpointReader
from pretrain.cli import main
from pretrain.config import Config, ConfigError
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import distance, newest, run, tensors
from tests.distributed.test_deepspeed import DENSE, zero

MakeConfig = Callable[..., Config]


def message(root: str, changes: dict[str, Any], patch: str) -> str:
    """What a run with something wrong says before it trains."""
    from pretrain.engine import base
    from pretrain.engine import deepspeed as deepspeed_engine

    if patch == "class":
        patched: Any = mock.patch.object(base, "Aurora", type("MuonLike", (Aurora,), {}))
    elif patch == "tag":
        patched = mock.patch.object(base, "LossModel", _tagged(base.LossModel))
    elif patch == "wrapper":
        table = dict.fromkeys(deepspeed_engine.WRAPPERS, "AnotherOptimizer")
        patched = mock.patch.object(deepspeed_engine, "WRAPPERS", table)
    else:
        # Every process believes that it is alone, as Accelerate does with the wrong arguments.
        patched = mock.patch.object(deepspeed_engine.Accelerator, "num_processes", 1)
    with patched:
        try:
            run(root, changes)
        except RuntimeError as error:
            return str(error)
    return "nothing"


def _tagged(build: Any) -> Any:
    def tagged(model: torch.nn.Module, train: Any) -> Any:
        next(model.parameters()).use_muon = True
        return build(model, train)

    return tagged


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ("class", "class name with 'muon'"),
        ("tag", "tagged use_muon"),
        ("wrapper", "DeepSpeed put a DeepSpeedZeroOptimizer around the optimizer, expected AnotherOptimizer"),
        ("alone", "2 processes were started, but Accelerate sees 1"),
    ],
)
def test_what_deepspeed_would_do_by_itself_is_refused(tmp_path: Path, patch: str, words: str) -> None:
    for said in run_ranks(2, message, str(tmp_path), zero(2), patch):
        assert words in said


@pytest.mark.parametrize(("patch", "words"), [("sgd", "largest singular value"), ("order", "do not arrive complete")])
def test_what_is_applied_is_seen_from_the_weights(tmp_path: Path, patch: str, words: str) -> None:
    for said in run_ranks(2, wrong_step, str(tmp_path), zero(3), patch):
        assert words in said


def test_a_step_that_rounding_hides_is_not_doubted(tmp_path: Path) -> None:
    assert run_ranks(2, run, str(tmp_path), zero(1, **{"optimizer.lr": 1e-9}), 1) == [75, 75]


def wrong_step(root: str, changes: dict[str, Any], patch: str) -> str:
    """What a run says whose matrices are stepped by the gradient, or arrive with their pieces in the wrong order."""
    from optimizers import directions
    from optimizers.sharded import exchange

    right, place = directions.from_options, exchange._in_part

    def gradient(u: torch.Tensor, options: Any, second: Any = None) -> Any:
        return right(u, options, second)._replace(d=u / u.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30) * 3)

    def misplaced(part: Any, values: torch.Tensor, area: Any) -> torch.Tensor:
        return place(part, values.flip(0), area)

    patched = (
        mock.patch.object(directions, "from_options", gradient)
        if patch == "sgd"
        else mock.patch.object(exchange, "_in_part", misplaced)
    )
    with patched:
        try:
            run(root, changes, 2)
        except (RuntimeError, LayoutError) as error:
            return str(error)
    return "nothing"


def test_the_step_during_set_up_of_stage_0_in_bf16_changes_nothing(tmp_path: Path) -> None:
    changes = zero(0, **{"train.precision": "bf16", "engine.accumulation_dtype": "bf16", "optimizer.weight_decay": 0.5})
    for calls, steps, equal in run_ranks(2, set_up_steps, str(tmp_path), changes):
        assert calls == 1  # DeepSpeed does call it
        assert steps == 3.0
        assert equal


def set_up_steps(root: str, changes: dict[str, Any]) -> tuple[int, float, bool]:
    """Calls of `step` during set-up, the step counter after three steps, and whether set-up left the weights alone."""
    from pretrain.engine import deepspeed as deepspeed_engine

    prepare, step, seen = deepspeed_engine.DeepSpeedEngine.prepare, Aurora.step, {"calls": 0}

    def watched(self: Aurora, closure: Any = None) -> Any:
        seen["calls"] += 1
        return step(self)

    def compare(self: Any, module: Any, optimizer: Aurora) -> None:
        before = [p.detach().bfloat16().float().clone() for g in optimizer.param_groups for p in g["params"]]
        with mock.patch.object(Aurora, "step", watched):
            prepare(self, module, optimizer)
        after = [p.detach() for g in optimizer.param_groups for p in g["params"]]
        seen["equal"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and not any(
            optimizer.state.values()
        )
        seen["optimizer"] = optimizer

    with mock.patch.object(deepspeed_engine.DeepSpeedEngine, "prepare", compare):
        run(root, changes, 3)
    steps = {float(state["step"]) for state in seen["optimizer"].state.values()}
    (counted,) = steps
    return seen["calls"], counted, seen["equal"]


@pytest.mark.parametrize(
    ("slot", "options"),
    [
        ("second_moment", {"optimizer.name": "normuon"}),
        pytest.param("log_row_scale", {"optimizer.row_balance": "carried"}, marks=pytest.mark.long),
    ],
)
def test_owner_only_state_is_saved_by_every_owner_and_moves(tmp_path: Path, slot: str, options: dict[str, Any]) -> None:
    """One number for each row is held by the owner of a matrix: 3 ranks save it, then 2 and then 1 resume with it."""
    changes = {**options, "train.total_tokens": 8 * 384}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run_ranks(1, run, str(whole), DENSE | changes)
    run_ranks(3, run, str(moved), zero(1, **changes), 3)
    saved = newest(moved)
    files = {
        fragment["file"]
        for slots in saved.index["parameters"].values()
        for fragment in slots.get(slot, {"fragments": []})["fragments"]
    }
    assert len(files) > 1  # not rank 0 alone
    name = "model.layers.1.mlp.up_proj.weight"
    assert saved.read(name, slot).shape == (64,)
    assert saved.read(name, slot).abs().min() > 0
    run_ranks(2, run, str(moved), zero(3, **changes), 6)
    run_ranks(1, run, str(moved), DENSE | changes)
    # Division by row norms enlarges the noise of summation: two dense runs differ by 5e-5 here.
    assert distance(moved, whole) < 2e-4
    ends = [tensors(root)[name, slot] for root in (moved, whole)]
    assert torch.allclose(*ends, rtol=1e-2, atol=1e-3 if slot == "log_row_scale" else 0)


def test_matrices_straddle_shards_and_ranks_are_empty() -> None:
    groups = [{"up": (17, 5), "down": (5, 17)}, {"gain": (3,)}]
    for stage in (1, 3):
        layout = zero_layout(groups, 4, stage)
        assert sum(any(f.name == "up" for f in own) for own in layout.fragments) > 1
        assert any(all(f.name != "gain" for f in own) for own in layout.fragments)


@pytest.mark.parametrize(
    ("fragments", "words"),
    [
        ([[("w", 0, 4)], [("w", 5, 1)]], "leave a gap before element 5"),
        ([[("w", 0, 4)], [("w", 3, 3)]], "overlap at element 3"),
        ([[("w", 0, 4)], []], "cover 4 of its 6 elements"),
        ([[("w", 0, 6)], [("v", 0, 1)]], "which is not a parameter"),
    ],
)
def test_a_layout_that_does_not_make_up_the_parameters_is_refused(fragments: Any, words: str) -> None:
    by_rank = tuple(tuple(ShardFragment(n, start, length, 0, 0) for n, start, length in own) for own in fragments)
    with pytest.raises(LayoutError, match=words):
        Layout({"w": (2, 3)}, by_rank, (6,))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, tiny_config: MakeConfig) -> None:
    from optimizers import param_groups
    from pretrain.checkpoint.state import load_state, load_weights
    from pretrain.model.build import build_model

    run_ranks(2, run, str(tmp_path / "a"), zero(1), 2)
    reader = CheckpointReader(newest(tmp_path / "a").folder)
    config = tiny_config({"model.intermediate_size": 96})
    model = build_model(config.model, 0)
    with pytest.raises(CheckpointError, match="parameters are not those of this model"):
        load_weights(reader, model)
    with pytest.raises(CheckpointError, match="has shape"):
        load_state(reader, model, Aurora(param_groups(model, config.optimizer.settings())))


class _Parameter:
    shape = (2, 3)


class DeepSpeedZeroOptimizer:
    """What a release would look like that renamed a field."""

    def __init__(self) -> None:
        self.single_partition_of_fp32_groups = [torch.zeros(6)]


class DeepSpeedZeroOptimizer_Stage3:  # noqa: N801
    """The same of stage 3."""

    def __init__(self) -> None:
        self.fp32_partitioned_groups_flat = [torch.zeros(6)]


@pytest.mark.parametrize(
    ("wrapper", "field"), [(DeepSpeedZeroOptimizer(), "_hp_mapping"), (DeepSpeedZeroOptimizer_Stage3(), "ds_shape")]
)
def test_a_field_that_deepspeed_renamed_is_said_by_name(wrapper: Any, field: str) -> None:
    with pytest.raises(ContractError, match=rf"{field}.*install deepspeed>=0.19.8,<0.20"):
        read_layout(wrapper, [{"w": _Parameter()}], 0, 1)  # type: ignore[dict-item]
    for partitions in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(wrapper, partitions):
            delattr(wrapper, partitions)
            with pytest.raises(ContractError, match=partitions):
                read_layout(wrapper, [{"w": _Parameter()}], 0, 1)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine.zero_stage": 2}, "engine.zero_stage: has no effect: engine.kind is plain"),
        (
            {"engine.kind": "deepspeed", "engine.zero_stage": 0, "train.precision": "bf16"},
            "engine.accumulation_dtype: expected bf16 with zero_stage 0",
        ),
        (
            {"engine.kind": "deepspeed", "engine.accumulation_dtype": "bf16"},
            "engine.accumulation_dtype: expected fp32 with train.precision fp32",
        ),
        ({"engine.kind": "deepspeed", "engine.offload": "cpu"}, "engine.offload: unknown key"),
        ({"engine.kind": "deepspeed", "train.precision": "fp16"}, "train.precision"),
        ({"engine.kind": "deepspeed", "engine.zero_stage": 0, "engine.wire_dtype": "bf16"}, "engine.wire_dtype"),
        (
            {"engine.kind": "deepspeed", "engine.zero_stage": 3, "samples.every_steps": 5},
            "samples.every_steps: expected null with engine.zero_stage 3",
        ),
        ({"engine.kind": "deepspeed", "train.compile": True}, "train.compile: expected false"),
        ({"engine.kind": "deepspeed", "engine.zero_stage": 4}, "engine.zero_stage"),
    ],
)
def test_combinations_that_deepspeed_does_not_support_are_refused_by_name(
    tiny_config: MakeConfig, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config(changes)
    assert words in str(error.value)


def test_a_refused_combination_is_bad_input_for_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.conftest import REPOSITORY

    changes = ["engine.kind=deepspeed", "train.compile=true", f"run.root={tmp_path}"]
    assert main(["check", str(REPOSITORY / "configs/quickstart.yaml"), *changes]) == 2
    assert "train.compile" in capsys.readouterr().err


def test_a_step_that_is_not_finite_leaves_everything_and_is_counted(tmp_path: Path) -> None:
    for skipped, equal in run_ranks(2, poisoned, str(tmp_path), zero(2)):
        assert skipped == 1
        assert equal


def poisoned(root: str, changes: dict[str, Any]) -> tuple[int, bool]:
    """A run whose third step has a NaN on one rank; the skipped steps, and whether weights and state stayed."""
    from pretrain.engine.deepspeed import DeepSpeedEngine

    backward, step, seen = DeepSpeedEngine.backward, DeepSpeedEngine.step, {"steps": 0, "equal": True}

    def poison(self: Any, loss: torch.Tensor) -> None:
        bad = seen["steps"] == 2 and os.environ["RANK"] == "1"
        backward(self, loss * torch.nan if bad else loss)

    def watch(self: Any, optimizer: Aurora) -> torch.Tensor:
        def copy() -> list[torch.Tensor]:
            states = [value for state in optimizer.state.values() for value in state.values()]
            return [t.detach().clone() for t in (*self.held.shards, *states)]

        kept = copy()
        norm = step(self, optimizer)
        seen["steps"] += 1
        if seen["steps"] == 3:
            seen["equal"] = all(torch.equal(a, b) for a, b in zip(kept, copy(), strict=True))
            seen["flag"] = bool(optimizer.last_step_finite)
        return norm

    with mock.patch.object(DeepSpeedEngine, "backward", poison), mock.patch.object(DeepSpeedEngine, "step", watch):
        run(root, changes, 5)
    counters = newest(Path(root)).index["counters"]
    return counters["skipped_steps"], bool(seen["equal"]) and not seen["flag"]
