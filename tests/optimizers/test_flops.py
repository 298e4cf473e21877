from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optimizers import Aurora
from optimizers.flops import direction_flops, polar_flops, step_flops
from optimizers.polar import polar


@pytest.mark.parametrize("method", ["quintic", "quintic_exact"])
@pytest.mark.parametrize(("m", "n"), [(24, 8), (8, 24), (12, 12)])
def test_polar_flops_are_those_that_torch_counts(m: int, n: int, method: str) -> None:
    with FlopCounterMode(display=False) as counter:
        polar(torch.randn(m, n), method)
    assert counter.get_total_flops() == polar_flops(m, n, method)


def test_the_formula_of_the_quintic() -> None:
    assert polar_flops(1024, 256) == polar_flops(256, 1024) == 12 * (4 * 1024 * 256**2 + 2 * 256**3)
    with pytest.raises(ValueError, match="unknown polar method"):
        polar_flops(2, 2, "cubic")


@pytest.mark.parametrize("options", [{}, {"iterations": 3}, {"scope": "all"}, {"direction": "muon"}])
def test_step_flops_are_those_that_torch_counts(options: dict[str, Any]) -> None:
    shapes = [(24, 8), (8, 24), (24, 8), (8, 8)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Aurora(params, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == step_flops(shapes, optimizer.param_groups[0])


def test_only_forms_in_the_scope_are_balanced() -> None:
    options = {"direction": "aurora", "scope": "tall", "iterations": 3, "polar": "quintic"}
    assert direction_flops(24, 8, options) == 3 * direction_flops(8, 24, options)
