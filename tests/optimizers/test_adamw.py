from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers import Aurora


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((7,), (5, 3), (2, 2, 2), ())]


def step_all(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def group(params: list[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    return [{"params": params, "kind": "adamw", "lr": 0.01, "weight_decay": 0.1, **options}]


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_it_equals_torchs_adamw_exactly(lr: float | Tensor) -> None:
    ours, theirs = parameters(), parameters()
    step_all(Aurora(group(ours, lr=lr, betas=(0.8, 0.95), eps=1e-10)), ours, 5)
    reference = torch.optim.AdamW(theirs, lr=lr, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1, foreach=False)
    step_all(reference, theirs, 5)
    for p, expected in zip(ours, theirs, strict=True):
        assert torch.equal(p, expected)


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_plain(dtype: torch.dtype, lr: float | Tensor) -> None:
    plain, fused = parameters(dtype), parameters(dtype)
    first, second = Aurora(group(plain, lr=lr)), Aurora(group(fused, lr=lr, fused=True))
    step_all(first, plain, 5)
    step_all(second, fused, 5)
    for p, q in zip(plain, fused, strict=True):
        # fp32 to 1e-6; bf16 weights may round the other way once.
        assert torch.allclose(p, q, atol=1e-6, rtol=0.0 if dtype == torch.float32 else 0.01)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.allclose(first.state[p][key], second.state[q][key], atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_moments_of_bf16_weights_are_fp32(fused: bool) -> None:
    params = parameters(torch.bfloat16)
    optimizer = Aurora(group(params, fused=fused))
    step_all(optimizer, params, 3)
    reference = [nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)]
    twin = Aurora(group(reference, fused=fused))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in reference:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().float()
        twin.step()
    for p, q in zip(params, reference, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][key].dtype == torch.float32
            assert torch.equal(optimizer.state[p][key], twin.state[q][key])
        # Three roundings of the weight against none.
        assert torch.allclose(p.float(), q, atol=3 * 2.0**-8)
