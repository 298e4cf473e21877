"""Matrix products in a stated precision, the same on every device.

The polar backends multiply in bf16, fp16 or fp32: operands are rounded to that dtype, sums are in fp32, and the result
is rounded once. On a processor without instructions for a dtype, torch's native product is about a hundred times slower
than fp32. There the operands are fp32 tensors that hold only values of the dtype ("carried" in fp32), the product runs
in fp32, and its result is rounded. Products of two bf16 or fp16 numbers are exact in fp32, so this differs from the
native arithmetic only in the order of summation.
"""

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PolarDtype = Literal["auto", "bf16", "fp16", "fp32"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# A symmetric product is computed in strips of rows up to the diagonal. Below about 256 rows a strip costs more in calls
# than it saves in operations. Four strips save 3/8 of the operations; more strips save little more.
STRIP_ROWS, MOST_STRIPS = 256, 4


def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether matrix products in bf16 are faster than in fp32 on `device`.

    True for CUDA devices of compute capability 8 or more, and for CPUs with AMX or AVX-512 bf16 instructions if torch
    has oneDNN. False for all other devices, which is always safe.

    Raises:
        RuntimeError: by torch, for a name that is not a device, or a CUDA device that does not exist.
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
    return _cpu_has("amx_bf16") or _cpu_has("avx512_bf16")


def _cpu_has(instructions: str) -> bool:
    """Whether the processor has bf16 instructions of this name and torch has a library that uses them."""
    return bool(torch.cpu.get_capabilities().get(instructions, False)) and torch.backends.mkldnn.is_available()


def resolve(dtype: PolarDtype, device: torch.device | str) -> torch.dtype:
    """The torch dtype of a name.

    "auto" is fp16 on a GPU, where it is as fast as bf16 and keeps three more bits; bf16 on a CPU with AMX; fp32
    elsewhere. (The bf16 instructions of AVX-512 are at best twice as fast as fp32, and the iteration in bf16 has more
    products.)

    Raises:
        ValueError: an unknown name.
    """
    if dtype == "auto":
        device = torch.device(device)
        has_tiles = device.type == "cpu" and _cpu_has("amx_bf16")
        dtype = "fp16" if device.type == "cuda" else "bf16" if has_tiles else "fp32"
    if dtype not in DTYPES:
        raise ValueError(f"unknown polar dtype {dtype!r}: expected one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


@contextmanager
def as_stated(device: torch.device) -> Iterator[None]:
    """Switches off whatever would change the precision of products.

    These are autocast, and the permission of torch.set_float32_matmul_precision to run fp32 products in TF32 or bf16:
    a Gram matrix in TF32 is not positive definite.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    allowed = backend.matmul.fp32_precision
    with torch.autocast(device.type, enabled=False) if _has_autocast(device) else nullcontext():
        backend.matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            backend.matmul.fp32_precision = allowed


def _has_autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type)


@dataclass(frozen=True)
class Products:
    """Products of stacks [k, p, q] whose entries are values of `dtype`, held in tensors of `carrier`.

    Every result is rounded once. `out` receives the result and is returned; it may be the addend c, but not a factor.
    """

    dtype: torch.dtype
    carrier: torch.dtype
    mirrored: bool = True
    """Whether large symmetric products are computed only up to the diagonal."""

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, *, mirrored: bool = True) -> "Products":
        """Products in `dtype`: native if the device is fast at them, otherwise carried in fp32."""
        is_native = dtype == torch.float32 or (
            has_fast_bf16(device) if dtype == torch.bfloat16 else device.type == "cuda"
        )
        return cls(dtype, dtype if is_native else torch.float32, mirrored)

    def round(self, x: Tensor) -> Tensor:
        """x in the form that the products take and return: contiguous, sharing no memory with x."""
        rounded = x.to(self.dtype, memory_format=torch.contiguous_format, copy=True)
        return rounded.to(self.carrier)

    def round_(self, x: Tensor) -> Tensor:
        """`round` for an x that the caller no longer needs: no copy if x has that form already."""
        return x.to(self.dtype).to(self.carrier).contiguous()

    def mm(self, a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        """a @ b."""
        return self.settle(torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out))

    def mm_add(
        self, c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """beta * c + alpha * (a @ b)."""
        if out is None:
            return self.settle(torch.baddbmm(c, a, b, beta=beta, alpha=alpha))
        return self.settle(torch.baddbmm(c, a, b, beta=beta, alpha=alpha, out=out))

    def symmetric(
        self,
        a: Tensor,
        b: Tensor,
        *,
        c: Tensor | None = None,
        beta: float = 1.0,
        alpha: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """a @ b, or beta * c + alpha * (a @ b), if it is known to be symmetric: [k, p, q] and [k, q, p].

        Large ones are computed in strips of rows up to the diagonal and mirrored: 5/8 of the operations.
        """
        size = a.shape[-2]
        strips = min(MOST_STRIPS, size // STRIP_ROWS) if self.mirrored else 1
        if strips < 2:
            return self.mm(a, b, out=out) if c is None else self.mm_add(c, a, b, beta=beta, alpha=alpha, out=out)
        result = a.new_empty(a.shape[0], size, size) if out is None else out
        edges = [size * i // strips for i in range(strips + 1)]
        for top, bottom in itertools.pairwise(edges):
            strip = result[:, top:bottom, :bottom]
            rows, columns = a[:, top:bottom], b[:, :, :bottom]
            if c is None:
                self.mm(rows, columns, out=strip)
            else:
                self.mm_add(c[:, top:bottom, :bottom], rows, columns, beta=beta, alpha=alpha, out=strip)
            result[:, :top, top:bottom] = strip[:, :, :top].mT
        return result

    def settle(self, x: Tensor) -> Tensor:
        """Rounds x in place to values of `dtype`; a native result already has them."""
        return x if self.carrier == self.dtype else x.copy_(x.to(self.dtype))


def gram_matrix(x: Tensor) -> Tensor:
    """x^T x in fp32 of a stack [k, m, n] in fp32. (In bf16 it is indefinite from a condition number of 200 on.)"""
    return Products(torch.float32, torch.float32).symmetric(x.mT, x)
