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
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

PolarDtype = Literal["auto", "bf16", "fp16", "fp32"]
Accuracy = Literal["loose", "default", "tight"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Spelling(NamedTuple):
    """How a device multiplies fastest."""

    strip_rows: int | None
    """A symmetric product is computed in strips of at least so many rows, up to its diagonal; None: in one call. Four
    strips save 3/8 of the operations, more save little more; a short strip costs more in calls than it saves."""
    transposed: bool = False
    """Whether a tall X is kept as a contiguous X^T."""
    factorises: bool = False
    """Whether the inverse of a Gram matrix by its Cholesky factor takes no longer than a product or two."""


MOST_STRIPS = 4
SPELLINGS: dict[tuple[str, torch.dtype], Spelling] = {
    ("cpu", torch.float32): Spelling(256, factorises=True),
    ("avx512_bf16", torch.bfloat16): Spelling(512),
    ("amx_bf16", torch.bfloat16): Spelling(None, transposed=True),
    ("cuda", torch.float32): Spelling(512),
    ("cuda", torch.float16): Spelling(None),
    ("cuda", torch.bfloat16): Spelling(None),
}
"""By the instructions and the dtype in which products run: what scripts/bench_products.py found, at 8192 x 2048 in time
of one call. An EPYC with AVX-512: in fp32 strips take 0.69 of it for a square product and 0.63 for X^T X, in bf16 0.77
and 1.02. A processor with AMX: in bf16 1.5 and 1.9, and X^T X from a contiguous X^T 0.56. An H200: in fp32 0.87 and
0.70, in fp16 and bf16 10 and 2.5. An inverse by a Cholesky factor takes 0.95 of a product in full on the
EPYC; on a GPU, where it is a sequence of small dependent steps, it has not been measured."""


UNKNOWN = Spelling(256)
"""For other devices."""


_counted_as: ContextVar[str] = ContextVar("_counted_as", default="cpu")


@contextmanager
def counted_as(device: torch.device | str) -> Iterator[None]:
    """In this context the meta device multiplies as `device` does, which this machine need not have."""
    token = _counted_as.set(torch.device(device).type)
    try:
        yield
    finally:
        _counted_as.reset(token)


def spelling(device: torch.device, dtype: torch.dtype) -> Spelling:
    """How products whose operands are tensors of this dtype are spelled on a device."""
    kind = device.type
    if kind == "cpu" and dtype == torch.bfloat16:
        kind = "amx_bf16" if _cpu_has("amx_bf16") else "avx512_bf16"
    return SPELLINGS.get((kind, dtype), UNKNOWN)


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
    spelling: Spelling

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, *, mirrored: bool = True) -> "Products":
        """Products in `dtype`: native if the device is fast at them, otherwise carried in fp32.

        Without `mirrored`, symmetric products are always computed in full.
        """
        device = torch.device(_counted_as.get()) if device.type == "meta" else device
        is_native = dtype == torch.float32 or device.type == "cuda"
        if dtype == torch.bfloat16 and (device.type != "cuda" or torch.cuda.is_available()):
            is_native = has_fast_bf16(device)
        carrier = dtype if is_native else torch.float32
        spelled = spelling(device, carrier)
        return cls(dtype, carrier, spelled if mirrored else spelled._replace(strip_rows=None))

    def round(self, x: Tensor) -> Tensor:
        """x in the form that the products take and return: contiguous, sharing no memory with x."""
        rounded = x.to(self.dtype, memory_format=torch.contiguous_format, copy=True)
        return rounded.to(self.carrier)

    def round_(self, x: Tensor) -> Tensor:
        """`round` for an x that the caller no longer needs: no copy if x has that form already."""
        return x.to(self.dtype).to(self.carrier).contiguous()

    def tall(self, x: Tensor) -> Tensor:
        """`round_` of a tall stack, in the layout in which the device multiplies it fastest."""
        rounded = x.to(self.dtype).to(self.carrier)
        return rounded.mT.contiguous().mT if self.spelling.transposed else rounded.contiguous()

    def by_symmetric(
        self, x: Tensor, s: Tensor, *, c: Tensor | None = None, beta: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """x @ s, or beta * c + x @ s, for a tall x and a symmetric s; c and `out` are laid out as x."""
        if x.is_contiguous():
            return self.mm(x, s, out=out) if c is None else self.mm_add(c, x, s, beta=beta, out=out)
        flat = None if out is None else out.mT
        if c is None:
            return self.mm(s, x.mT, out=flat).mT
        return self.mm_add(c.mT, s, x.mT, beta=beta, out=flat).mT

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
        least = self.spelling.strip_rows
        strips = 1 if least is None else min(MOST_STRIPS, size // least)
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
    return Products.on(x.device, torch.float32).symmetric(x.mT, x)
