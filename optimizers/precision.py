"""Where bf16 matrix products are fast, and the same arithmetic where they are not.

The polar backends multiply in bf16: operands of 8 significant bits, sums in fp32, one rounding of the
result. A processor without bf16 instructions runs torch's native bf16 product some hundred times slower
than fp32. There the operands are kept as fp32 tensors that hold only bf16 values ("carried" in fp32),
the product runs in fp32 and its result is rounded: the products of two bf16 numbers are exact in fp32,
so this differs from the native arithmetic in the order of summation only.
"""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether matrix products in bf16 are faster than in fp32 on `device`.

    True for CUDA devices of compute capability 8 or more, and for CPUs with AMX or AVX-512 bf16
    instructions in a torch that has oneDNN. Every other device says False, which is always safe.

    Raises:
        RuntimeError: by torch, for a name that is no device, or a CUDA device that is not there.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_has_fast_bf16(torch.cuda.current_device() if device.index is None else device.index)
    return device.type == "cpu" and _cpu_has_fast_bf16()


@functools.cache
def _cuda_has_fast_bf16(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] >= 8


@functools.cache
def _cpu_has_fast_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    has_instructions = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    return bool(has_instructions) and torch.backends.mkldnn.is_available()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switches autocast off: under it the products would take another dtype than the one chosen here."""
    is_available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if is_available else nullcontext()


def to_bf16(x: Tensor) -> Tensor:
    """Rounds x to bf16 values: a bf16 tensor where bf16 is fast, an fp32 tensor of bf16 values elsewhere.

    The result is contiguous and shares no memory with x. This is the form that `bf16_bmm` and
    `bf16_baddbmm` take and return.
    """
    rounded = x.to(torch.bfloat16, memory_format=torch.contiguous_format, copy=True)
    return rounded if has_fast_bf16(x.device) else rounded.float()


def bf16_bmm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two stacks [k, m, n] and [k, n, p] in the form of `to_bf16`, rounded once to bf16."""
    return _rounded(torch.bmm(a, b))


def bf16_baddbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """beta * c + alpha * (a @ b) of stacks in the form of `to_bf16`, rounded once to bf16."""
    return _rounded(torch.baddbmm(c, a, b, beta=beta, alpha=alpha))


def _rounded(product: Tensor) -> Tensor:
    """Rounds a fresh product in place; a bf16 one is rounded already."""
    return product if product.dtype == torch.bfloat16 else product.copy_(product.to(torch.bfloat16))
