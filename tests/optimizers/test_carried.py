"""Row scales that are carried from step to step: one polar call, even rows, and a state like any other."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from optimizers import Aurora, directions, reference
from optimizers.directions import aurora_carried, muon
from optimizers.directions.carried import LOG_LARGEST
from optimizers.flops import step_flops
from optimizers.options import DEFAULTS, complete
from optimizers.polar import backends
from optimizers.sharded.matrices import Applied, doubts
from optimizers.sharded.owners import Unit
from pretrain.checkpoint.state import load_tensors
from tests.optimizers.helpers import error, gaussian, low_rank, row_spread, uneven, with_condition

pytestmark = pytest.mark.filterwarnings("ignore:these parameters are treated", "ignore:iterations = 1")

CARRIED: dict[str, Any] = {**DEFAULTS["matrix"], "row_balance": "carried"}
SLOT = "log_row_scale"


def momenta(m: int, n: int, steps: int, seed: int = 0) -> list[Tensor]:
    """A walk whose rows differ in size, each step a tenth new."""
    size = gaussian(m, 1, seed + 1).exp()
    u = gaussian(m, n, seed)
    found = []
    for step in range(steps):
        u = 0.9 * u + 0.1**0.5 * gaussian(m, n, 1000 * seed + step + 2)
        found.append(size * u)
    return found


def even_scale(u: Tensor, steps: int = 30) -> Tensor:
    log_scale = torch.zeros(u.shape[:-1])
    for _ in range(steps):
        _, log_scale = aurora_carried(u, log_scale, polar="svd")
    return log_scale


SHAPES = [(16, 4), (40, 36), (9, 1), (4, 16)]


# Random matrices of nearly square shape are too badly conditioned for a bound of other methods.
@pytest.mark.parametrize("how", ["carried", "polished"])
@pytest.mark.parametrize(
    ("polar", "dtype", "bound", "m", "n"),
    [
        *(("svd", "auto", 1e-5, *shape) for shape in (*SHAPES, (33, 32), (65, 64), (12, 12))),
        *(("gram", "fp32", 2e-3, *shape) for shape in SHAPES),
        *(("gram", "bf16", 0.1, *shape) for shape in SHAPES),
    ],
)
def test_it_follows_its_reference_over_steps(polar: Any, dtype: Any, bound: float, m: int, n: int, how: Any) -> None:
    log_scale, log_D = torch.zeros(m), torch.zeros(m, dtype=torch.float64)
    for u in momenta(m, n, 8, seed=m):
        u = u.float()
        d, log_scale = aurora_carried(u, log_scale, polar=polar, polar_dtype=dtype, row_balance=how)
        wanted, log_D = reference.aurora_carried(u, log_D, polished=how == "polished")
        assert error(d, wanted) < bound
        assert float((log_scale - log_D).abs().max()) < 10 * bound
    assert bool(log_scale.any()) == (m >= 1.03 * n)


def test_a_step_of_the_rule_by_hand() -> None:
    """D_i <- D_i (odds(n/m) / odds(l_i))^(1/2), up to a factor that the polar factor does not see."""
    u, before = uneven(20, 5), gaussian(20, 1)[:, 0] * 0.3
    d, after = aurora_carried(u.float(), before.float(), polar="svd")
    scores = reference.leverage_scores(before.exp()[:, None] * u)
    assert torch.allclose(d.double().square().sum(dim=1), scores, atol=1e-5)
    factor = (5 / 15 * (1 - scores) / scores).sqrt()
    ratio = after.double().exp() / (before.exp() * factor)
    assert float(ratio.std() / ratio.mean()) < 1e-5
    assert float(after.mean()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("m", "n"), [(64, 16), (40, 36), (300, 20), (9, 1)])
def test_rows_become_even_and_columns_stay_orthonormal(m: int, n: int) -> None:
    u = uneven(m, n).float()
    log_scale = torch.zeros(m)
    spreads = []
    for _ in range(8):
        d, log_scale = aurora_carried(u, log_scale, polar="svd")
        spreads.append(row_spread(d))
        assert error(d.T @ d, torch.eye(n)) < 1e-5
    assert torch.equal(aurora_carried(u, torch.zeros(m), polar="svd")[0], muon(u, polar="svd"))
    assert spreads[0] > 0.05
    assert spreads[-1] < 1e-3
    # The same fixed point as that of the rule within a step.
    assert error(d, directions.aurora(u, polar="svd", row_balance="polar", iterations=8)) < 1e-3


def test_rows_of_a_walk_are_more_even_than_muons() -> None:
    log_scale = torch.zeros(256)
    for step, u in enumerate(momenta(256, 64, 24)):
        d, log_scale = aurora_carried(u.float(), log_scale, polar="gram", polar_dtype="fp32")
        if step >= 8:
            assert row_spread(d) < 0.7 * row_spread(muon(u.float(), polar="gram", polar_dtype="fp32"))


@pytest.mark.parametrize("how", ["carried", "polished"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_hard_rows_leave_everything_finite_and_recover(dtype: Any, how: Any) -> None:
    """Rows of next to nothing, rows that take a dimension for themselves, a spike, and zeros in between."""
    u = uneven(48, 12).float()
    log_scale = even_scale(u)
    hard = u.clone()
    hard[0] *= 1e-12
    hard[1] *= 1e8
    hard[2] = 0
    hard[3:6] *= 1e-4
    for x in (hard, hard * 1e-25, torch.zeros_like(u), hard * 1e15, low_rank(48, 12, 3), torch.eye(48, 12)):
        before = log_scale.clone()
        for _ in range(10):
            d, log_scale = aurora_carried(x, log_scale, polar="gram", polar_dtype=dtype, row_balance=how)
            assert bool(d.isfinite().all())
            assert bool((log_scale.abs() <= LOG_LARGEST + 1e-5).all())
            assert float(torch.linalg.matrix_norm(d, 2)) < 1.03
        kept = (x == 0).all(dim=1)
        assert torch.equal(log_scale[kept], before[kept])
    for _ in range(12):
        d, log_scale = aurora_carried(u, log_scale, polar="gram", polar_dtype=dtype, row_balance=how)
    assert row_spread(d) < 0.03


@pytest.mark.parametrize("polar", ["svd", "gram", "quintic", "polar_express", "cans"])
def test_polishing_makes_rows_even_at_once_and_keeps_the_columns(polar: Any) -> None:
    us = momenta(256, 64, 14)
    spreads = {}
    for how in ("carried", "polished"):
        log_scale = torch.zeros(256)
        for u in us:
            d, log_scale = aurora_carried(u.float(), log_scale, polar=polar, row_balance=how)
            assert float((torch.linalg.svdvals(d) - 1).abs().max()) < 0.04
        spreads[how] = row_spread(d)
        assert float((torch.linalg.svdvals(d) - 1).abs().max()) < 0.01
    assert spreads["polished"] < 0.2 * spreads["carried"]


def test_a_row_that_comes_back_is_even_after_two_steps() -> None:
    u = uneven(64, 16).float()
    faint = u.clone()
    faint[7] *= 1e-9
    log_scale = even_scale(faint, 8)
    norms = []
    for _ in range(4):
        d, log_scale = aurora_carried(u, log_scale, polar="svd")
        norms.append(float(d[7].norm()) / math.sqrt(16 / 64))
    assert norms[0] == pytest.approx(2, rel=0.01)  # alone in a direction: at most sqrt(m/n) times its share
    assert abs(norms[-1] - 1) < 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_zeros_and_what_is_not_finite_leave_the_scales(bad: float) -> None:
    stack = torch.stack([uneven(12, 4, seed).float() for seed in range(3)])
    before = gaussian(3, 12).float()
    before -= before.mean(dim=1, keepdim=True)
    clean, after = aurora_carried(stack, before, polar="svd")
    stack[1] = 0
    stack[2, 3, 1] = bad
    d, kept = aurora_carried(stack, before, polar="svd")
    assert torch.equal(kept[1:], before[1:])
    assert torch.equal(d[0], clean[0])
    assert torch.equal(kept[0], after[0])
    for polar in ("svd", "gram"):
        for how in ("carried", "polished"):
            d, kept = aurora_carried(stack, before, polar=polar, row_balance=how)  # type: ignore[arg-type]
            assert torch.equal(kept[1:], before[1:])
            assert not torch.equal(kept[0], before[0])
            assert not d[1].any()
            assert bool(d[2].isnan().all())
            d, kept = aurora_carried(stack[1:], before[1:], polar=polar, row_balance=how)  # type: ignore[arg-type]
            assert torch.equal(kept, before[1:])


def test_no_freedom_and_deficient_matrices_leave_the_scales_or_stay_in_range() -> None:
    u = torch.zeros(20, 6)
    u[:6] = uneven(6, 6).float()  # as many rows as columns
    before = gaussian(20, 1)[:, 0].float()
    assert torch.equal(aurora_carried(u, before, polar="svd")[1], before)
    steep = with_condition(40, 12, 1e7).float()
    assert bool(even_scale(steep).isfinite().all())


def test_the_mean_of_the_scales_does_not_drift() -> None:
    log_scale = torch.zeros(40)
    for u in momenta(40, 10, 300):
        _, log_scale = aurora_carried(u.float(), log_scale, polar="svd")
    assert abs(float(log_scale.mean())) < 1e-4
    assert float(log_scale.std()) < 3


def test_scaling_single_rows_changes_the_direction_and_scaling_all_does_not() -> None:
    u = uneven(30, 8).float()
    log_scale = even_scale(u, 3)
    d, _ = aurora_carried(u, log_scale, polar="svd")
    assert error(aurora_carried(u * 2**-60, log_scale, polar="svd")[0], d) < 1e-6
    other = u.clone()
    other[::2] *= 3
    assert error(aurora_carried(other, log_scale, polar="svd")[0], d) > 0.05
    assert error(directions.aurora(other, polar="svd"), directions.aurora(u, polar="svd")) < 1e-5


def weights(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    return [nn.Parameter(gaussian(*shape, seed).float()) for seed, shape in enumerate(shapes)]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    for index, p in enumerate(params):
        p.grad = uneven(*p.shape, seed=100 * seed + index).float()


@pytest.mark.parametrize("polar", ["gram", "svd", "quintic"])
def test_one_polar_call_a_step(polar: str) -> None:
    params = weights((24, 8), (8, 24), (24, 8), (8, 8))
    calls = {}
    backend = backends.BACKENDS[polar]
    for name in ({"direction": "muon"}, {"row_balance": "carried"}, {"row_balance": "polar"}):
        seen: list[int] = []

        def counted(x: Tensor, dtype: torch.dtype, seen: list[int] = seen) -> Tensor:
            seen.append(len(x))
            return backend.factor(x, dtype)

        optimizer = Aurora(params, polar=polar, **name)
        set_gradients(params, 1)
        with mock.patch.dict(backends.BACKENDS, {polar: backend.__class__(counted, backend.dtype)}):
            optimizer.step()
        calls[name.get("row_balance", "muon")] = sum(seen)
    assert calls == {"muon": 4, "carried": 4, "polar": 6}


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 1.04), ("fp32", 1.5)])
def test_it_costs_what_muon_costs_and_polishing_little_where_the_backend_ends_with_that_step(
    dtype: str, most: float
) -> None:
    muons, carried, polished, auto = (
        step_flops([(1408, 512), (512, 512)], complete("matrix", {**given, "polar_dtype": dtype}))
        for given in ({"direction": "muon"}, {"row_balance": "carried"}, {"row_balance": "polished"}, {})
    )
    assert carried == muons
    assert muons < polished <= most * muons
    assert auto > 1.04 * muons


def test_only_what_is_balanced_keeps_scales() -> None:
    params = weights((16, 4), (4, 16), (8, 8), (65, 64))
    optimizer = Aurora(params, row_balance="carried", polar="svd")
    set_gradients(params, 1)
    optimizer.step()
    assert [SLOT in optimizer.state[p] for p in params] == [True, False, False, False]
    assert optimizer.state[params[0]][SLOT].shape == (16,)
    lines = optimizer.table.splitlines()
    assert sum("aurora" in line for line in lines) == 1
    assert sum("muon" in line for line in lines) == 3


@pytest.mark.parametrize("how", ["carried", "polished"])
def test_a_step_of_the_optimizer_is_that_of_the_reference(how: str) -> None:
    (w,) = weights((18, 6))
    options = {"row_balance": how, "polar": "svd", "lr": 0.1, "weight_decay": 0.1}
    optimizer = Aurora([w], **options)
    wanted, b, v = w.detach().double(), torch.zeros(18, 6), None
    for seed in range(5):
        set_gradients([w], seed)
        assert w.grad is not None
        wanted, b, v = reference.step(wanted, w.grad, b, DEFAULTS["matrix"] | options, v)
        optimizer.step()
        assert error(w.detach(), wanted) < 1e-5
        assert v is not None
        assert float((optimizer.state[w][SLOT] - v).abs().max()) < 1e-4


def test_copies_pickles_and_state_dicts_continue_bit_for_bit() -> None:
    params = weights((16, 4), (6, 12))
    optimizer = Aurora(params, row_balance="carried")
    for seed in range(3):
        set_gradients(params, seed)
        optimizer.step()
    assert bool(optimizer.state[params[0]][SLOT].any())
    ends = []
    for how in ("copy", "pickle", "state_dict", "none"):
        if how == "copy":
            mine, other = copy.deepcopy((params, optimizer))
        elif how == "pickle":
            mine, other = pickle.loads(pickle.dumps((params, optimizer)))
        elif how == "state_dict":
            mine = copy.deepcopy(params)
            other = Aurora(mine, row_balance="carried")
            other.load_state_dict(optimizer.state_dict())
        else:
            mine, other = params, optimizer
        for seed in range(3, 6):
            set_gradients(mine, seed)
            other.step()
        ends.append([t for p in mine for t in (p.detach(), *(other.state[p][k] for k in sorted(other.state[p])))])
    for end in ends[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(end, ends[-1], strict=True))


def test_a_state_without_scales_begins_with_ones() -> None:
    (w,) = weights((16, 4))
    before = Aurora([w])
    set_gradients([w], 1)
    before.step()
    saved = before.state_dict()
    # The loaded options win: what was saved with "auto" goes on with two polar calls and nothing carried.
    kept = Aurora([w], row_balance="carried")
    kept.load_state_dict(saved)
    assert kept.param_groups[0]["row_balance"] == "auto"
    assert kept.param_groups[0]["iterations"] == 2
    kept.step()
    assert SLOT not in kept.state[w]
    # A run that changes to carried scales on purpose.
    saved = copy.deepcopy(saved)
    saved["param_groups"][0]["row_balance"] = "carried"
    other = Aurora([w])
    other.load_state_dict(saved)
    b = other.state[w]["momentum"].clone()
    set_gradients([w], 2)
    seen = []
    other.direction_observer = lambda _, d: seen.append(d.clone())
    other.step()
    assert w.grad is not None
    _, u = reference.blend(w.grad, b, 0.95, True)
    assert error(seen[0], reference.muon(u)) < 0.02
    assert bool(other.state[w][SLOT].any())
    foreign = copy.deepcopy(saved)
    foreign["state"][0]["second_moment"] = torch.zeros(16)
    with pytest.raises(ValueError, match="second_moment"):
        Aurora([w]).load_state_dict(foreign)


class WithoutScales:
    """A checkpoint of a run that did not carry them."""

    folder = "here"

    def __init__(self, optimizer: Aurora, w: nn.Parameter) -> None:
        slots = {"weight": w.detach().clone(), **{k: v.clone() for k, v in optimizer.state[w].items() if k != SLOT}}
        self.slots = slots
        self.index = {"parameters": {"weight": {k: {"shape": list(v.shape)} for k, v in slots.items()}}}

    def read(self, _: str, slot: str, start: int = 0, count: int | None = None) -> Tensor:
        return self.slots[slot].reshape(-1)[start : None if count is None else start + count]


def test_a_checkpoint_without_scales_begins_with_ones() -> None:
    model = nn.Linear(4, 16, bias=False)
    optimizer = Aurora([{"params": [("weight", model.weight)], "kind": "matrix"}], row_balance="carried")
    set_gradients([model.weight], 1)
    optimizer.step()
    assert bool(optimizer.state[model.weight][SLOT].any())
    load_tensors(WithoutScales(optimizer, model.weight), model, optimizer)  # type: ignore[arg-type]
    assert not optimizer.state[model.weight][SLOT].any()


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_void_or_zero_first_step_leaves_the_scales(bad: float) -> None:
    (w,) = weights((16, 4))
    optimizer = Aurora([w], row_balance="carried")
    w.grad = torch.full((16, 4), bad)
    optimizer.step()
    assert not optimizer.state[w][SLOT].any()
    set_gradients([w], 1)
    optimizer.step()
    scales = optimizer.state[w][SLOT].clone()
    w.grad = torch.full((16, 4), math.nan)
    optimizer.step()
    assert torch.equal(optimizer.state[w][SLOT], scales)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"iterations": 2}, "iterations has no effect: row_balance 'carried' takes one polar call"),
        ({"iterations": 1}, "iterations has no effect"),
        ({"tolerance": 0.01}, "tolerance has no effect: row_balance 'carried'"),
        ({"balance_rule": "tyler"}, "balance_rule has no effect: row_balance 'carried'"),
        ({"beta": 0.4}, "beta has no effect: row_balance 'carried'"),
        ({"eps_mode": "absolute"}, "eps_mode has no effect: row_balance 'carried'"),
        ({"scope": "all"}, "scope has no effect: row_balance 'carried' keeps one number for each row"),
        ({"scope": "wide"}, "scope has no effect: .*balances tall matrices only"),
        ({"direction": "muon"}, "row_balance has no effect: the direction 'muon' does not use it"),
        ({"direction": "riemannian_aurora"}, "row_balance has no effect"),
    ],
)
def test_what_makes_no_sense_with_it_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Aurora(weights((16, 4)), row_balance="carried", **options)
    with pytest.raises(ValueError, match=words):
        Aurora([{"params": weights((16, 4)), "row_balance": "carried", **options}])


def test_it_goes_with_a_preset_and_with_the_scope_that_it_has() -> None:
    group = Aurora(weights((16, 4)), preset="released", row_balance="carried").param_groups[0]
    assert (group["scope"], group["eps_mode"], group["polar"]) == ("tall", "relative", "quintic_exact")
    Aurora(weights((16, 4)), row_balance="carried", scope="tall")


def test_the_pure_function_without_state_says_what_to_call() -> None:
    with pytest.raises(ValueError, match="call aurora_carried"):
        directions.aurora(torch.randn(8, 2), row_balance="carried")
    with pytest.raises(ValueError, match="row_balance is 'gram': expected one of carried, polished"):
        aurora_carried(torch.randn(8, 2), torch.zeros(8), row_balance="gram")
    with pytest.raises(ValueError, match="needs its log row scale, got None"):
        directions.from_options(torch.randn(8, 2), CARRIED)
    x = torch.randn(2, 8)
    assert torch.equal(directions.from_options(x, CARRIED).d, muon(x))


def test_the_first_uneven_steps_of_shards_are_not_doubted() -> None:
    """Shards are checked after their first step, which begins with D = 1 and has the rows of muon."""
    applied = Applied(Unit("up", 0, 16, 4, 1), largest=1.0, filled=1.0, spread=0.4)
    assert "differ by 40" in doubts([applied], DEFAULTS["matrix"])[0]
    assert not doubts([applied], CARRIED)


def test_a_stored_transposed_weight_carries_the_scales_of_its_outputs() -> None:
    (w,) = weights((6, 20))
    twin = nn.Parameter(w.detach().T.contiguous())
    optimizer = Aurora([{"params": [w], "views": ["in_out"], "row_balance": "carried", "polar": "svd"}])
    other = Aurora([twin], row_balance="carried", polar="svd")
    for seed in range(3):
        set_gradients([w], seed)
        assert w.grad is not None
        twin.grad = w.grad.T.contiguous()
        optimizer.step()
        other.step()
    assert optimizer.state[w][SLOT].shape == (20,)
    assert torch.allclose(optimizer.state[w][SLOT], other.state[twin][SLOT], atol=1e-6)
    assert torch.allclose(w.detach().T, twin.detach(), atol=1e-6)


def test_each_block_carries_its_own_scales() -> None:
    (fused,) = weights((40, 8))
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split((24, 16))]
    optimizer = Aurora([{"params": [fused], "row_blocks": [(24, 16)], "row_balance": "polished", "polar": "svd"}])
    other = Aurora(parts, row_balance="polished", polar="svd")
    for seed in range(3):
        set_gradients([fused], seed)
        assert fused.grad is not None
        for part, grad in zip(parts, fused.grad.split((24, 16)), strict=True):
            part.grad = grad.clone()
        optimizer.step()
        other.step()
    scales = torch.cat([other.state[part][SLOT] for part in parts])
    assert torch.allclose(optimizer.state[fused][SLOT], scales, atol=1e-6)
