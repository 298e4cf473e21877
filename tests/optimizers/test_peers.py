"""What the test suites of other optimizers (torch.optim, pytorch-optimizer, dion) ask of one, a test per behaviour.

tests/optimizers/test_as_torch.py has the wrappers of torch, test_state.py the state.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook

from optimizers import Aurora, OptionError
from tests.optimizers.test_as_torch import gradients, mlp, quietly, train

FORMS = ("model", "parameters")


def make(model: nn.Module, form: str = "model", **options: Any) -> Aurora:
    return quietly(lambda: Aurora(model if form == "model" else model.parameters(), **options))


def plateau(optimizer: Any) -> Any:
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    step = schedule.step
    schedule.step = lambda: step(1.0)  # type: ignore[method-assign]
    return schedule


def sequence(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.25, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 4)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "multiplicative": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
    "sequential": sequence,
    "plateau": plateau,
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "swa": lambda optimizer: swa_utils.SWALR(optimizer, [0.1 * g["lr"] for g in optimizer.param_groups], 3),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_gives_the_rates_that_it_gives_torchs_adamw(name: str, form: str) -> None:
    model = mlp()
    optimizer = make(model, form, lr=0.02)
    rates = [group["lr"] for group in optimizer.param_groups]
    other = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates])
    ours, theirs = (SCHEDULES[name](each) for each in (optimizer, other))
    found = []
    for seed in range(6):
        train(model, optimizer, seed)
        other.step()
        ours.step()
        theirs.step()
        found.append([group["lr"] for group in optimizer.param_groups])
        assert found[-1] == [group["lr"] for group in other.param_groups]
    assert found[0] != found[-1]
    assert [group["base_lr"] for group in optimizer.param_groups] == rates


def test_a_schedule_is_resumed_with_the_optimizer() -> None:
    model = mlp()
    optimizer = make(model)
    schedule = sequence(optimizer)
    for seed in range(3):
        train(model, optimizer, seed)
        schedule.step()
    twin_model = copy.deepcopy(model)
    twin = make(twin_model)
    twin_schedule = sequence(twin)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin_schedule.load_state_dict(copy.deepcopy(schedule.state_dict()))
    for seed in range(3, 6):
        for each, own, plan in ((model, optimizer, schedule), (twin_model, twin, twin_schedule)):
            train(each, own, seed)
            plan.step()
    assert all(map(torch.equal, model.parameters(), twin_model.parameters()))
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in twin.param_groups]


@pytest.mark.parametrize("form", FORMS)
def test_the_closure_runs_once_with_gradients_and_its_value_is_returned(form: str) -> None:
    model = mlp()
    optimizer = make(model, form)
    before = [p.detach().clone() for p in model.parameters()]
    calls: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        assert all(map(torch.equal, before, model.parameters()))
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6))[:, 0].square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        returned = optimizer.step(closure)  # type: ignore[call-overload]
        assert not torch.is_grad_enabled()
    assert [id(loss) for loss in calls] == [id(returned)]
    assert optimizer.step() is None
    assert not torch.equal(before[0], next(model.parameters()))


def test_hooks_are_called_around_the_step_and_may_change_its_arguments() -> None:
    model = mlp()
    optimizer = make(model)
    called: list[str] = []

    def before(own: Any, args: Any, kwargs: Any) -> Any:
        called.append("before")
        return (own, lambda: 3.0), kwargs

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(lambda *_: called.append("after")),
        register_optimizer_step_post_hook(lambda *_: called.append("everywhere")),
    ]
    gradients(model, 1)
    assert optimizer.step() == 3.0  # type: ignore[func-returns-value]
    assert called == ["before", "after", "everywhere"]
    for handle in handles:
        handle.remove()
    assert optimizer.step() is None  # type: ignore[func-returns-value]
    assert len(called) == 3


def test_hooks_of_the_state_dict() -> None:
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 1)
    optimizer.register_state_dict_pre_hook(lambda own: own.param_groups[0].update(tag=1))
    optimizer.register_state_dict_post_hook(lambda own, state: {**state, "extra": 1})
    saved = optimizer.state_dict()
    assert (saved["extra"], saved["param_groups"][0]["tag"]) == (1, 1)
    twin = make(mlp())
    seen: list[str] = []
    twin.register_load_state_dict_pre_hook(lambda own, state: seen.append("before"))
    twin.register_load_state_dict_post_hook(lambda own: seen.append(f"after step {len(own.state)}"))
    for _ in range(2):
        twin.load_state_dict(saved)
    assert seen == ["before", f"after step {len(optimizer.state)}"] * 2
    with pytest.raises(ValueError, match="another optimizer"):
        twin.load_state_dict({"state": {}, "param_groups": [{"params": [], "kind": "adamw"}]})
    assert len(seen) == 5  # "before" only: the hooks are still there after a failure
    twin.load_state_dict(saved)
    assert len(seen) == 7


def test_a_hook_that_translates_a_state_dict_is_heard_before_it_is_checked() -> None:
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 1, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if "momentum" in state:
            state["momentum_buffer"] = state.pop("momentum")

    def renamed(own: Any, given: Any) -> Any:
        states = {
            index: {key.removesuffix("_buffer"): value for key, value in state.items()}
            for index, state in given["state"].items()
        }
        return {**given, "state": states}

    twin_model = copy.deepcopy(model)
    twin = make(twin_model)
    twin.register_load_state_dict_pre_hook(renamed)
    twin.load_state_dict(saved)
    assert all(map(torch.equal, train(model, optimizer, 3), train(twin_model, twin, 3)))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = mlp()
    optimizer = make(model)
    gradients(model, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else not p.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("form", FORMS)
def test_a_state_goes_through_a_file_that_only_holds_tensors(form: str, tmp_path: Path) -> None:
    model = mlp()
    optimizer = make(model, form, weight_decay=0.1)
    train(model, optimizer, 1, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    twin_model = copy.deepcopy(model)
    twin = make(twin_model, form)
    twin.load_state_dict(loaded)
    assert all(map(torch.equal, train(model, optimizer, 3), train(twin_model, twin, 3)))
    for group, other in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


@pytest.mark.parametrize("form", FORMS)
def test_the_flat_state_dicts_of_torchtitan(form: str) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = mlp()
    optimizer = make(model, form, weight_decay=0.1)
    train(model, optimizer, 1, 2)
    optimizer.zero_grad()
    flat = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    assert "state.0.weight.momentum" in flat
    twin_model = copy.deepcopy(model)
    twin = make(twin_model, form)
    set_optimizer_state_dict(twin_model, twin, flat, options=options)
    assert twin.param_groups[0]["weight_decay"] == 0.1
    assert all(map(torch.equal, train(model, optimizer, 3), train(twin_model, twin, 3)))


def test_groups_may_come_change_and_go_between_steps() -> None:
    model, extra = mlp(), nn.Linear(5, 7)
    optimizer = make(model)
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": [extra.weight], "kind": "matrix", "lr": 0.5, "momentum": 0.0})
    optimizer.add_param_group({"params": [extra.bias], "kind": "adamw"})
    before = extra.weight.detach().clone()
    train(model, optimizer, 2)
    assert torch.equal(before, extra.weight)  # without a gradient
    for p in extra.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(before, extra.weight)
    assert int(optimizer.state[extra.weight]["step"]) == 1
    optimizer.param_groups[0]["weight_decay"] = 0.5  # options are read at each step
    optimizer.param_groups[0]["lr"] = 0.1
    weight, w = model[0].weight, model[0].weight.detach().clone()
    twin_model = copy.deepcopy(model)
    twin = make(twin_model, lr=0.1, momentum=optimizer.param_groups[0]["momentum"])
    twin.state[twin_model[0].weight] = copy.deepcopy(optimizer.state[weight])
    train(model, optimizer, 3)
    train(twin_model, twin, 3)
    assert torch.allclose(weight, twin_model[0].weight - 0.05 * w, atol=1e-6)
    del optimizer.param_groups[-2:]
    before = extra.weight.detach().clone()
    optimizer.step()
    assert torch.equal(before, extra.weight)


def test_a_parameter_is_in_one_group_only() -> None:
    model = mlp()
    optimizer = make(model)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model[0].weight], "kind": "matrix"})
    assert len(optimizer.param_groups) == len(make(mlp()).param_groups)
    with pytest.warns(UserWarning, match="duplicate"):
        Aurora([{"params": [model[0].weight, model[0].weight], "kind": "matrix"}])
    with pytest.raises(TypeError, match="ordered collections"):
        Aurora([{"params": {model[0].weight}, "kind": "matrix"}])
    with pytest.raises(ValueError, match="leaf"):
        Aurora([{"params": [model[0].weight * 2], "kind": "matrix"}])
    with pytest.raises(TypeError, match="Tensors"):
        Aurora([{"params": [3.0], "kind": "matrix"}])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_precisions(dtype: torch.dtype) -> None:
    model, twin = mlp().to(dtype), mlp()
    optimizer, other = make(model), make(twin)
    for seed in (1, 2):
        gradients(twin, seed)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = q.grad.to(dtype)  # type: ignore[union-attr]
        optimizer.step()
        other.step()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.float(), q, atol=1e-5 if dtype is torch.float64 else 0.02)


def test_a_model_may_change_its_precision_after_the_optimizer_is_made() -> None:
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 1)
    model.to(torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert model[0].weight.dtype == torch.bfloat16
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("direction", ["aurora", "muon", "u_normuon"])
def test_the_layout_of_weights_and_gradients_does_not_matter(direction: str) -> None:
    plain = nn.Parameter(torch.randn(12, 5))
    turned, cut = nn.Parameter(plain.detach().T.contiguous().T), nn.Parameter(torch.zeros(12, 10)[:, ::2])
    cut.data.copy_(plain.detach())
    params = [plain, turned, cut]
    optimizers = [Aurora([{"params": [p], "kind": "matrix"}], direction=direction) for p in params]
    for seed in range(3):
        grad = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))
        plain.grad, turned.grad, cut.grad = grad, grad.T.contiguous().T, grad.expand(1, 12, 5)[0]
        for optimizer in optimizers:
            optimizer.step()
    assert (turned.stride(), cut.stride()) == ((1, 12), (10, 2))
    for p in params[1:]:
        assert torch.allclose(p, plain, atol=1e-5)


def test_scalars_and_tensors_of_any_rank_are_stepped_by_adamw() -> None:
    shapes: list[tuple[int, ...]] = [(), (1,), (3,), (1, 3), (3, 1), (2, 3, 4), (0,)]
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    twins = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = Aurora([{"params": params, "kind": "adamw", "lr": 0.1, "betas": (0.9, 0.95)}])
    other = torch.optim.AdamW(twins, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    assert all(map(torch.equal, params, twins))


def test_a_layer_that_is_frozen_later_stays_and_goes_on_when_thawed() -> None:
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 1)
    frozen = model[0]
    frozen.requires_grad_(False)
    optimizer.zero_grad()
    before = frozen.weight.detach().clone()
    model(torch.ones(2, 6))[:, 0].sum().backward()
    optimizer.step()
    assert torch.equal(before, frozen.weight)
    frozen.requires_grad_(True)
    train(model, optimizer, 2)
    assert not torch.equal(before, frozen.weight)
    assert int(optimizer.state[frozen.weight]["step"]) == 2


def test_an_optimizer_for_each_parameter_steps_during_the_backward_pass() -> None:
    model, twin = mlp(), mlp()
    own = {
        p: Aurora([{"params": [p], "kind": "matrix" if p.ndim == 2 else "adamw"}], lr=0.01) for p in model.parameters()
    }

    def step(p: Tensor) -> None:
        own[p].step()  # type: ignore[index]
        own[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    kinds = [[p for p in twin.parameters() if (p.ndim == 2) is two] for two in (True, False)]
    whole = Aurora([{"params": kinds[0], "kind": "matrix"}, {"params": kinds[1], "kind": "adamw"}], lr=0.01)
    x = torch.randn(4, 6)
    for _ in range(2):
        model(x)[:, 0].square().sum().backward()
        whole.zero_grad()
        twin(x)[:, 0].square().sum().backward()
        whole.step()
    assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_accumulated_gradients_step_as_the_whole_batch() -> None:
    model, twin = mlp(), mlp()
    optimizer, other = make(model), make(twin)
    x = torch.randn(8, 6)
    for part in x.split(2):
        (model(part)[:, 0].square().sum() / 8).backward()
    optimizer.step()
    (twin(x)[:, 0].square().sum() / 8).backward()
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_averages_of_the_weights_follow() -> None:
    model = mlp()
    optimizer = make(model)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    seen = []
    for seed in (1, 2):
        train(model, optimizer, seed)
        average.update_parameters(model)
        seen.append(model[0].weight.detach().clone())
    assert torch.allclose(average.module[0].weight, (seen[0] + seen[1]) / 2)


@pytest.mark.parametrize("form", FORMS)
def test_pytorch_optimizers_wrappers(form: str) -> None:
    peers = pytest.importorskip("pytorch_optimizer")
    model, twin = mlp(), mlp()
    optimizer, fast = make(model, form, lr=0.05), make(twin, form, lr=0.05)
    start = model[0].weight.detach().clone()
    ahead = peers.Lookahead(optimizer, k=2, alpha=0.5)
    train(model, ahead, 1, 2)
    train(twin, fast, 1, 2)
    assert torch.allclose(model[0].weight, (start + twin[0].weight) / 2, atol=1e-6)
    if form == "parameters":
        sam = quietly(lambda: peers.SAM(mlp().parameters(), Aurora, lr=0.05, rho=0.1))
        assert isinstance(sam.base_optimizer, Aurora)


def test_sam_of_pytorch_optimizer_steps_with_the_gradient_at_the_perturbed_weights() -> None:
    peers = pytest.importorskip("pytorch_optimizer")
    model, twin = mlp(), mlp()
    x = torch.randn(4, 6)
    sam = quietly(lambda: peers.SAM(model.parameters(), Aurora, lr=0.05, rho=1e-6))
    plain = make(twin, "parameters", lr=0.05)

    def closure() -> Tensor:
        sam.zero_grad()
        loss = model(x)[:, 0].square().sum()
        loss.backward()
        return loss

    closure()
    sam.step(closure)
    twin(x)[:, 0].square().sum().backward()
    plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_bad_values_are_refused_as_peers_do() -> None:
    w = nn.Parameter(torch.zeros(4, 3))
    bad: list[dict[str, Any]] = [
        {"lr": -1e-3},
        {"weight_decay": -1e-3},
        {"momentum": -0.1},
        {"momentum": 1.0},
        {"lr": torch.tensor([1.0, 2.0])},
        {"foreach": True},
        {"amsgrad": True},
        {"differentiable": True},
    ]
    for options in bad:
        with pytest.raises(OptionError, match=next(iter(options))):
            Aurora([{"params": [w], "kind": "matrix"}], **options)
    for options in ({"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9,)}):
        with pytest.raises(OptionError, match=next(iter(options))):
            Aurora([{"params": [w], "kind": "adamw"}], **options)


def test_it_prints_its_groups() -> None:
    text = repr(make(mlp()))
    assert text.startswith("Aurora (")
    for part in ("Parameter Group 0", "direction: aurora", "lr: 0.02"):
        assert part in text


def test_a_step_without_gradients_after_the_first_is_silent_and_does_nothing() -> None:
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, saved[index][key]) for key, value in state.items())
