"""The elementwise parts of a step: the same to the bit in place, where looking is free, and by selecting."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers import Aurora, update
from optimizers.update import all_finite

OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "cautious": True},
    {"weight_decay": 0.1, "lr": torch.tensor(0.03)},
    {"nesterov": False},
    {"maximize": True},
    {"row_balance": "carried"},
]


def trained(options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """The weights and momenta after three steps; one gradient is not finite in the second."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((24, 8), (8, 24), (24, 8))]
    optimizer = Aurora([{"params": params, **options}])
    for step in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        if step == 1:
            params[1].grad[2, 3] = torch.inf  # type: ignore[index]
        optimizer.step()
    return [*(p.detach() for p in params), *(optimizer.state[p]["momentum"] for p in params)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_in_place_and_by_selecting_a_step_is_the_same_to_the_bit(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place = trained(options, dtype)
    monkeypatch.setattr(update, "is_certain", lambda finite: False)
    assert all(torch.equal(one, other) for one, other in zip(in_place, trained(options, dtype), strict=True))


class Large(TorchDispatchMode):
    """Notes the operations that make a tensor of a given number of elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.made = elements, []  # type: ignore[var-annotated]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self.elements:
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            if result.untyped_storage().data_ptr() not in given:
                self.made.append(func.overloadpacket.__name__)
        return result


def test_a_step_makes_few_tensors_as_large_as_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """u and the direction: memory for a large tensor takes longer to get than to fill."""
    weight = nn.Parameter(torch.randn(96, 40))
    weight.grad = torch.randn(96, 40)
    optimizer = Aurora([{"params": [weight], "direction": "muon", "weight_decay": 0.1}])
    optimizer.step()
    with Large(weight.numel()) as large:
        optimizer.step()
    assert sorted(large.made) == ["bmm", "lerp"]
    monkeypatch.setattr(update, "is_certain", lambda finite: False)
    with Large(weight.numel()) as selecting:
        optimizer.step()
    assert len(selecting.made) > len(large.made) + 4


def test_what_an_observer_keeps_is_the_direction_and_not_the_step() -> None:
    weight = nn.Parameter(torch.randn(64, 16))
    weight.grad = torch.randn(64, 16)
    optimizer = Aurora([{"params": [weight], "direction": "muon"}])
    seen: list[Tensor] = []
    optimizer.direction_observer = lambda place, d: seen.append(d)
    optimizer.step()
    torch.testing.assert_close(torch.linalg.svdvals(seen[0]), torch.ones(16), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_what_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, bad: float | None) -> None:
    largest = torch.finfo(dtype).max
    grads = [torch.zeros(0, dtype=dtype), torch.full((3, 4), largest, dtype=dtype), -torch.ones(5, dtype=dtype)]
    for place in ((1, (2, 1)), (2, (4,))):
        given = [grad.clone() for grad in grads]
        if bad is not None:
            given[place[0]][place[1]] = bad
        assert bool(all_finite(given, torch.device("cpu"))) == (bad is None)
    assert bool(all_finite([], torch.device("cpu")))
    assert bool(all_finite(grads[:1], torch.device("cpu")))
