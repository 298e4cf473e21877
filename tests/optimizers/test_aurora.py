import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from optimizers import Aurora, reference
from optimizers import blocks as blocks_module
from optimizers.blocks import blocks, buckets
from optimizers.directions import aurora
from optimizers.options import DEFAULTS, DirectionName
from tests.optimizers.helpers import error, with_condition

# What a group without these options does.
OFF = {"contra": 0.0, "uw_floor": 0.0, "cautious": False, "tolerance": None}


def weight(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((torch.randn(m, n, generator=generator) * 0.1).to(dtype))


def gradients(w: Tensor, steps: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(w.shape, generator=generator).to(w.dtype) for _ in range(steps)]


def run(optimizer: Aurora, w: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        w.grad = grad.clone()
        optimizer.step()
    return w.detach().clone()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("m", "n"), [(12, 5), (5, 12), (6, 6)])
@pytest.mark.parametrize("direction", get_args(DirectionName))
def test_steps_equal_the_reference(direction: str, m: int, n: int, nesterov: bool) -> None:
    w = weight(m, n)
    grads = gradients(w, 4)
    given = {"lr": 0.03, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1, "polar": "svd"}
    optimizer = Aurora([w], direction=direction, **given)
    wanted, b, v = w.detach(), torch.zeros(m, n), None
    for g in grads:
        wanted, b, v = reference.step(wanted, g, b, OFF | optimizer.param_groups[0], v)
    assert error(run(optimizer, w, grads), wanted) < 1e-5
    assert error(optimizer.state[w]["momentum"], b) < 1e-6


def test_bare_matrices_are_one_group_with_the_documented_keys() -> None:
    optimizer = Aurora([weight(4, 2), weight(3, 3)], lr=0.05)
    (group,) = optimizer.param_groups
    assert set(group) == {"params", "kind", "base_lr", *DEFAULTS["matrix"]}
    assert group["lr"] == 0.05
    assert group["kind"] == "matrix"
    assert set(Aurora([{"params": [weight(1, 1)], "kind": "adamw"}]).param_groups[0]) == {
        *("params", "kind", "base_lr", "lr", "weight_decay", "betas", "eps", "fused")
    }


def test_it_is_no_adamw_and_no_sgd() -> None:
    """A matrix optimizer that silently became SGD or AdamW moves by anything but lr times an orthogonal matrix."""
    for direction, m, n in (("aurora", 24, 6), ("muon", 24, 6), ("aurora", 6, 24), ("aurora", 6, 6)):
        w = weight(m, n)
        before = w.detach().clone()
        w.grad = with_condition(m, n, 30).float()
        optimizer = Aurora([w], lr=0.5, direction=direction)
        optimizer.step()
        step = (before - w.detach()) / 0.5 / math.sqrt(max(1, m / n))
        assert float((torch.linalg.svdvals(step.double()) - 1).abs().max()) < 0.02
        assert set(optimizer.state[w]) == {"momentum", "step"}
        cosine = torch.nn.functional.cosine_similarity(step.flatten(), w.grad.flatten(), dim=0)
        assert 0.1 < float(cosine) < 0.99


def test_the_name_and_the_parameters_do_not_wake_deepspeeds_muon() -> None:
    w = weight(4, 2)
    optimizer = Aurora([w])
    assert type(optimizer).__name__ == "Aurora"
    assert not hasattr(w, "use_muon")
    assert "use_muon" not in optimizer.param_groups[0]


def test_gradients_are_not_changed_and_nothing_aliases_the_state() -> None:
    matrix, vector = weight(6, 3), nn.Parameter(torch.randn(4))
    groups: list[dict[str, Any]] = [{"params": [matrix], "nesterov": False}, {"params": [vector], "kind": "adamw"}]
    optimizer = Aurora(groups, lr=0.1)
    for p in (matrix, vector):
        p.grad = torch.randn_like(p)
    copies = [matrix.grad.clone(), vector.grad.clone()]  # type: ignore[union-attr]
    optimizer.step()
    assert torch.equal(matrix.grad, copies[0])  # type: ignore[arg-type]
    assert torch.equal(vector.grad, copies[1])  # type: ignore[arg-type]
    states = {key: value.clone() for p in (matrix, vector) for key, value in optimizer.state[p].items()}
    for p in (matrix, vector):
        p.grad.zero_()  # type: ignore[union-attr]
        p.data.zero_()
    for p in (matrix, vector):
        for key, value in optimizer.state[p].items():
            if key != "step":
                assert torch.equal(value, states[key])


def test_equal_shapes_are_stacked_without_changing_the_result() -> None:
    shapes = [(8, 3), (3, 8), (8, 3), (5, 5), (8, 3)]
    together = [weight(*shape, seed=i) for i, shape in enumerate(shapes)]
    alone = [nn.Parameter(w.detach().clone()) for w in together]
    optimizer = Aurora(together, polar="svd", iterations=3)
    singles = [Aurora([w], polar="svd", iterations=3) for w in alone]
    for step in range(3):
        for i, (w, single) in enumerate(zip(together, alone, strict=True)):
            w.grad = gradients(w, 1, seed=10 * step + i)[0]
            single.grad = w.grad.clone()
        optimizer.step()
        for single_optimizer in singles:
            single_optimizer.step()
    for w, single in zip(together, alone, strict=True):
        assert torch.allclose(w, single, atol=1e-6)


def test_buckets_hold_equal_shapes_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "BUCKET_ELEMENTS", 50)
    params = [torch.zeros(shape) for shape in ((4, 5), (5, 4), (4, 5), (4, 5), (20, 20), (20, 20))]
    found = list(buckets(block for p in params for block in blocks(p, None)))
    assert [[block.shape for block in bucket] for bucket in found] == [
        [(4, 5), (4, 5)],
        [(4, 5)],
        [(5, 4)],
        [(20, 20)],
        [(20, 20)],
    ]
    assert {id(block.param) for bucket in found for block in bucket} == {id(p) for p in params}


def test_buckets_are_smaller_on_a_cpu() -> None:
    sizes = {}
    for device in ("cpu", "meta"):
        params = [torch.empty(2048, 512, device=device) for _ in range(20)]
        sizes[device] = [len(bucket) for bucket in buckets(block for p in params for block in blocks(p, None))]
    assert sizes == {"cpu": [4] * 5, "meta": [16, 4]}


def test_wide_and_square_weights_are_muons_under_the_default_scope() -> None:
    for m, n in ((4, 12), (6, 6)):
        first, second = weight(m, n), weight(m, n)
        grads = gradients(first, 3)
        assert torch.equal(run(Aurora([first]), first, grads), run(Aurora([second], direction="muon"), second, grads))


@pytest.mark.parametrize("polar", ["quintic", "svd"])
def test_zero_initialised_matrices_start(polar: str) -> None:
    w = nn.Parameter(torch.zeros(8, 4))
    optimizer = Aurora([w], lr=0.1, weight_decay=0.1, polar=polar)
    w.grad = torch.zeros(8, 4)
    optimizer.step()
    assert torch.equal(w, torch.zeros(8, 4))
    w.grad = torch.randn(8, 4)
    optimizer.step()
    assert float(w.detach().norm()) == pytest.approx(0.1 * math.sqrt(2) * 2, rel=0.02)


def test_bf16_weights_keep_fp32_momentum_and_round_once() -> None:
    w = weight(8, 4, dtype=torch.bfloat16)
    before = w.detach().clone()
    grads = gradients(w, 2)
    optimizer = Aurora([w], lr=0.02, weight_decay=0.1, polar="svd")
    run(optimizer, w, grads[:1])
    momentum = optimizer.state[w]["momentum"]
    assert momentum.dtype == torch.float32
    assert torch.allclose(momentum, 0.05 * grads[0].float(), rtol=1e-6)
    u = grads[0].float() + 0.95 * (momentum - grads[0].float())
    exact = before.float() * (1 - 0.002) - 0.02 * math.sqrt(2) * aurora(u, polar="svd")
    assert torch.equal(w, exact.bfloat16())


@pytest.mark.parametrize("lr", [0.03, torch.tensor(0.03)])
def test_a_schedule_from_outside_is_followed(lr: Any) -> None:
    w, twin = weight(6, 3), weight(6, 3)
    grads = gradients(w, 4)
    optimizer = Aurora([w], lr=lr, weight_decay=0.1, polar="svd")
    for step, grad in enumerate(grads):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / 4)
        run(optimizer, w, [grad])
    other = Aurora([twin], lr=0.03, weight_decay=0.1, polar="svd")
    schedule = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 1 - step / 4)
    for grad in grads:
        run(other, twin, [grad])
        schedule.step()
    assert torch.allclose(w, twin, atol=1e-6)


def test_lr_zero_moves_nothing_but_the_momentum() -> None:
    w = weight(6, 3)
    before = w.detach().clone()
    optimizer = Aurora([w], lr=0.0, weight_decay=0.5)
    assert torch.equal(run(optimizer, w, gradients(w, 2)), before)
    assert bool(optimizer.state[w]["momentum"].any())


def test_missing_gradients_are_skipped_and_steps_counted_per_tensor() -> None:
    first, second = weight(6, 3), weight(6, 3, seed=1)
    optimizer = Aurora([first, second])
    before = second.detach().clone()
    run(optimizer, first, gradients(first, 2))
    assert torch.equal(second, before)
    assert second not in optimizer.state
    second.grad = torch.randn_like(second)
    optimizer.step()
    assert float(optimizer.state[first]["step"]) == 3
    assert float(optimizer.state[second]["step"]) == 1


def test_a_step_without_any_gradient_does_nothing() -> None:
    optimizer = Aurora([weight(4, 2)])
    assert optimizer.step() is None
    assert bool(optimizer.last_step_finite)
    assert not optimizer.state


def test_the_closure_is_evaluated_with_gradients_before_the_step() -> None:
    w = weight(4, 2)
    optimizer = Aurora([w])

    def closure() -> float:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return float(loss.detach())

    before = float(w.detach().square().sum())
    assert optimizer.step(closure) == pytest.approx(before)
    assert float(w.detach().square().sum()) != pytest.approx(before)


def test_two_runs_are_equal_bit_for_bit_and_unmoved_by_autocast() -> None:
    results = []
    for autocast in (False, False, True):
        w = weight(16, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            results.append(run(Aurora([w]), w, gradients(w, 3)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_fallbacks_of_a_step_are_reported() -> None:
    w = weight(12, 3)
    optimizer = Aurora([w], iterations=4)
    run(optimizer, w, gradients(w, 1))
    assert optimizer.last_step_fallbacks.dtype == torch.int64
    assert (int(optimizer.last_step_fallbacks), int(optimizer.last_step_retries)) == (0, 0)


def test_reported_fallbacks_are_those_of_all_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimizers import directions

    def fallen_back(u: Tensor, *_: Any) -> directions.Direction:
        return directions.Direction(torch.zeros_like(u), torch.tensor([2, 3]), torch.tensor([1, 0]))

    monkeypatch.setattr(directions, "from_options", fallen_back)
    params = [weight(6, 2), weight(6, 2)]
    optimizer = Aurora(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert (int(optimizer.last_step_fallbacks), int(optimizer.last_step_retries)) == (5, 1)
    params[0].grad[0, 0] = float("inf")  # type: ignore[index]
    optimizer.step()
    assert (int(optimizer.last_step_fallbacks), int(optimizer.last_step_retries)) == (0, 0)


@pytest.mark.parametrize(
    "options",
    [
        *({"polar": polar, "iterations": 3} for polar in ("quintic", "quintic_exact", "svd", "cans", "polar_express")),
        *({"direction": name, "polar_dtype": "fp16"} for name in get_args(DirectionName)),
        {"row_balance": "gram", "tolerance": 0.01, "iterations": 4, "polar_dtype": "bf16"},
        {"contra": 0.2, "uw_floor": 0.35, "cautious": True, "weight_decay": 0.1},
    ],
)
def test_nothing_waits_for_the_device(options: dict[str, Any]) -> None:
    # Tensors of the meta device have no values: reading one on the host, as .item() or an `if` would, raises.
    weights = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((12, 4), (12, 4), (4, 12), (5, 5))]
    for w in weights:
        w.grad = torch.empty_like(w)
    optimizer = Aurora(weights, **options)
    optimizer.step()
    assert optimizer.last_step_finite.device.type == "meta"


def test_gradients_it_cannot_use_are_refused() -> None:
    table = nn.Parameter(torch.randn(5, 3))
    optimizer = Aurora([{"params": [table], "kind": "adamw"}])
    nn.functional.embedding(torch.tensor([1, 2]), table, sparse=True).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    for kind in ("matrix", "adamw"):
        with pytest.raises(ValueError, match="complex64"):
            Aurora([{"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], "kind": kind}])


def test_a_matrix_that_is_none_is_refused_at_once_and_when_it_is_flattened_later() -> None:
    for shape in ((), (6,), (2, 3, 4), (0,)):
        with pytest.raises(ValueError, match="expected 2-D"):
            Aurora([nn.Parameter(torch.zeros(shape))])
    w = weight(4, 3)
    optimizer = Aurora([("layer.weight", w)])
    flat = nn.Parameter(w.detach().flatten())
    flat.grad = torch.randn(12)
    optimizer.param_groups[0]["params"][0] = flat
    with pytest.raises(ValueError, match=r"layer\.weight of shape \(12,\).*flattened"):
        optimizer.step()
