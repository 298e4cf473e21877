"""Polar factors of stacks of matrices.

polar(X) = U V^T over the nonzero singular values of X: the nearest matrix with orthonormal rows or columns if X has
full rank, a partial isometry if it does not, and 0 for X = 0. Its squared row norms are the leverage scores of X, which
sum to the rank.

Two errors describe a backend, both over the singular values above 2^-10 of the Frobenius norm: (a) max |sigma - 1| of
the result, and (b) |d - d_svd|_F / |d_svd|_F. Rounding the input alone causes an error (b) that grows with the
condition number and that (a) does not show. Singular directions below the cut come back with 0 <= sigma <= 1 + (a).
`ERRORS` states a bound for both.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from . import iterations
from .gram import gram_polar
from .precision import Accuracy, PolarDtype, as_stated, resolve

# Inputs whose largest entry lies in this range are used as they are; others are scaled by a power of two.
SMALLEST_UNSCALED, LARGEST_UNSCALED = 2.0**-20, 2.0**40


@dataclass(frozen=True)
class Backend:
    """How one method finds polar factors."""

    factor: Callable[..., Tensor]
    """Takes a stack [k, m, n] in fp32 (fp64 for "svd"), finite and scaled, and the dtype of its products. Returns
    [k, m, n] in any floating dtype; its result for a zero matrix is not used."""
    dtype: torch.dtype | None = None
    """The dtype of its products, if there is only one."""
    is_guarded: bool = True
    """Whether its input is scaled first, and zero and non-finite matrices are taken out."""
    polishes: bool = False
    """Whether `factor` takes `even` (see `polar`) as a third argument."""
    is_graded: bool = False
    """Whether `factor` takes `accuracy` (see `polar`)."""

    def with_even_rows(self, even: Callable[[Tensor], Tensor]) -> "Backend":
        """The backend whose factors are made even: see `polar`."""

        def polished(x: Tensor, dtype: torch.dtype) -> Tensor:
            d = self.factor(x, dtype)
            d = d if d.dtype == torch.float64 else d.float()
            scaled = even(d) * d
            residual = scaled.mT @ scaled
            residual.diagonal(dim1=-2, dim2=-1).sub_(1)
            return scaled - scaled @ (residual / 2 - 0.375 * residual @ residual)

        return replace(self, factor=functools.partial(self.factor, even=even) if self.polishes else polished)


def polar(
    x: Tensor,
    method: str = "quintic",
    *,
    exact: bool = False,
    dtype: PolarDtype = "auto",
    accuracy: Accuracy = "default",
    even: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The polar factor of every matrix of a stack.

    Args:
        x: [..., m, n] of any real floating dtype and any strides; it is not changed.
        method: a key of `BACKENDS`. "svd": exact, fp64. "quintic": the released code's 12 steps. "polar_express": 7
            better steps. "cans": to the precision of fp32. "gram": from the smaller Gram matrix, the fastest: by
            Polar Express, or by Cholesky factors in fp32 on a CPU. "quintic_exact": see `exact`.
        exact: with "quintic", the released code's operations in their order, one matrix at a time, in true bf16 and
            without the scaling below: the same as method "quintic_exact".
        dtype: of the products of "polar_express" and "gram": "bf16", "fp16", "fp32", or "auto": fp16 on a GPU, bf16 on
            a CPU with AMX, otherwise fp32. The other methods have one dtype: svd fp64, cans fp32, quintic bf16.
        accuracy: of "gram", the only one with a choice. "loose" takes five steps instead of seven and states its error
            from 2^-8 of the Frobenius norm on, "tight" eight and the residual step, in fp32 only. (By Cholesky factors:
            three, four and five of them.)
        even: takes the factors d of a tall stack [k, m, n] and returns factors of their rows [k, m, 1], near 1. The
            result is then y (I - E/2 + 3 E^2/8) with y = even(d) d and E = y^T y - I: rows as they were wanted, and
            columns that three terms of the inverse root have made orthonormal again. "gram" in bf16 and fp16 ends with
            the first two in any case.

    Returns:
        [..., m, n] in fp32, with any strides. A zero matrix gives zeros. A matrix with a NaN or an infinity gives NaN
        everywhere; the other matrices of the stack are not affected.

    If the largest entry of a matrix is outside [2^-20, 2^40], the matrix is first multiplied by the power of two that
    brings that entry into [1, 2). This is exact, so the result does not depend on the scale, from the smallest to the
    largest number of the dtype.

    Nothing waits for the device, except `svd` itself on a GPU.

    Raises:
        ValueError: x has fewer than two dimensions or is not real floating point, an unknown method or dtype,
            `exact` with another method than "quintic", or a dtype or an accuracy for a method that has only one.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"polar takes a real floating point stack [..., m, n], got {x.dtype} of shape {tuple(x.shape)}"
        )
    if exact and method not in ("quintic", "quintic_exact"):
        raise ValueError(f"exact=True repeats the released quintic: expected method 'quintic', got {method!r}")
    method = "quintic_exact" if exact else method
    backend = backend_named(method)
    dtype_of_products = product_dtype(method, dtype, x.device, accuracy)
    if accuracy != "default":
        backend = replace(backend, factor=functools.partial(backend.factor, accuracy=accuracy))
    if x.numel() == 0:
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    with torch.no_grad(), as_stated(x.device):
        stack = x.detach().reshape(-1, *x.shape[-2:])
        run = _guarded if backend.is_guarded else _as_it_is
        if even is not None:
            backend = backend.with_even_rows(even)
        return run(stack, backend, dtype_of_products).float().reshape(x.shape)


def backend_named(method: str) -> Backend:
    """The backend of that name; ValueError if there is none."""
    if method not in BACKENDS:
        raise ValueError(f"unknown polar method {method!r}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[method]


def has_dtype_choice(method: str) -> bool:
    """Whether a method offers several dtypes for its products."""
    return backend_named(method).dtype is None


def has_accuracy_choice(method: str) -> bool:
    """Whether a method can be looser or tighter."""
    return backend_named(method).is_graded


def product_dtype(
    method: str, dtype: PolarDtype, device: torch.device | str, accuracy: Accuracy = "default"
) -> torch.dtype:
    """The dtype of a method's products on a device.

    Raises:
        ValueError: an unknown name, or a dtype or an accuracy that has no effect.
    """
    only = backend_named(method).dtype
    if accuracy not in get_args(Accuracy):
        raise ValueError(f"unknown polar accuracy {accuracy!r}: expected one of {', '.join(get_args(Accuracy))}")
    if accuracy != "default" and not has_accuracy_choice(method):
        raise ValueError(f"polar accuracy {accuracy!r} has no effect: {method!r} has one accuracy")
    if accuracy == "tight" and dtype not in ("auto", "fp32"):
        raise ValueError(f"polar dtype {dtype!r} has no effect: accuracy 'tight' computes in fp32")
    if accuracy == "tight":
        return torch.float32
    if only is not None and dtype != "auto":
        raise ValueError(f"polar dtype {dtype!r} has no effect: {method!r} computes in {only}")
    return only or resolve(dtype, device)


def working_dtype(method: str) -> torch.dtype:
    """The dtype in which a backend reads its input: fp64 for "svd", fp32 otherwise.

    A product D*u of fp32 numbers is exact in fp64, so it keeps the rank of u; rounded to fp32 it does not.
    """
    return torch.float64 if backend_named(method).dtype == torch.float64 else torch.float32


def prescale(x: Tensor) -> Tensor:
    """Multiplies each matrix of [..., m, n] by a power of two if its largest entry is outside [2^-20, 2^40].

    The largest entry of a scaled matrix is in [1, 2). This is exact, except for entries that underflow next to one that
    is about 1e38 times larger. Zero and non-finite matrices pass unchanged; x itself is returned if it is known that
    nothing has to be scaled.
    """
    largest = largest_entry(x)
    # Looking at a value is free on a CPU only; elsewhere it would wait for the device.
    if x.device.type == "cpu" and not _is_outside(largest).any():
        return x
    return prescale_by(x, largest)


def largest_entry(x: Tensor) -> Tensor:
    """The largest absolute entry of each matrix, [..., 1, 1]; NaN where there is a NaN."""
    # Two reductions instead of one of |x|, which would be a tensor as large as x.
    dims = (-2, -1)
    return torch.maximum(x.amax(dim=dims, keepdim=True), -x.amin(dim=dims, keepdim=True))


def _is_outside(largest: Tensor) -> Tensor:
    """Whether a matrix with this largest entry has to be scaled."""
    outside = (largest < SMALLEST_UNSCALED) | (largest > LARGEST_UNSCALED)
    return outside & largest.isfinite() & (largest > 0)


def prescale_by(x: Tensor, largest: Tensor) -> Tensor:
    """x times the power of two that a matrix with this largest entry is scaled by."""
    exponent = torch.where(_is_outside(largest), 1 - torch.frexp(largest).exponent, 0)
    # In two halves, since 2^exponent alone overflows for a subnormal input.
    half = exponent // 2
    return x * _power_of_two(half, x.dtype) * _power_of_two(exponent - half, x.dtype)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent built from its bits: exact on every device, which exp2 and ldexp do not promise."""
    if dtype == torch.float64:
        return ((exponent.long() + 1023) << 52).view(torch.float64)
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _as_it_is(stack: Tensor, backend: Backend, dtype: torch.dtype) -> Tensor:
    return backend.factor(stack, dtype)


def _guarded(stack: Tensor, backend: Backend, dtype: torch.dtype) -> Tensor:
    """Runs a backend on a scaled, finite stack [k, m, n] and puts zero and NaN matrices in afterwards."""
    x = stack if stack.dtype == torch.float64 else stack.float()
    largest = largest_entry(x)
    finite = largest.isfinite()
    usable = finite & (largest > 0)
    # Zero matrices are common (every zero-initialised weight at its first step). Looking for them is free on a CPU; on
    # an accelerator it would stall the queue.
    if x.device.type == "cpu":
        if not usable.any():
            return torch.where(finite, torch.zeros_like(x), torch.nan)
        if usable.all() and not _is_outside(largest).any():
            return backend.factor(x, dtype)
    factor = backend.factor(prescale_by(torch.where(finite, x, 0), torch.where(finite, largest, 0)), dtype)
    return torch.where(usable, factor, torch.where(finite, 0.0, torch.nan).to(factor.dtype))


def _svd(x: Tensor, _: torch.dtype) -> Tensor:
    """Exact, in fp64: singular values up to max(m, n) * 2^-52 of the largest count as zero."""
    u, sigma, vh = torch.linalg.svd(x.double(), full_matrices=False)
    cut = max(x.shape[-2:]) * 2.0**-52 * sigma[..., :1]
    factor = (u * (sigma > cut).unsqueeze(-2)) @ vh
    # Rows and columns of zeros come back with entries of 1e-17, which a direction that evens out rows would enlarge.
    live = (x != 0).any(dim=-1, keepdim=True) & (x != 0).any(dim=-2, keepdim=True)
    return torch.where(live, factor, 0.0)


def _quintic_exact(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The released iteration, one matrix at a time.

    On one machine it repeats the released code bit for bit; between machines the summation order of the products
    differs. It has the range of the released code: it fails below about 1e-8 and above about 1e18.
    """
    if not len(x):
        return x.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    # One at a time, each in memory of its own, whose alignment the products depend on.
    rounded = (matrix.to(dtype, copy=True) for matrix in x)
    wide = [iterations.released_quintic(matrix.mT if tall else matrix) for matrix in rounded]
    factors = [factor.mT if tall else factor for factor in wide]
    # Stacked in the layout that each of them has: how the next sum over their rows rounds depends on it.
    if factors[0].is_contiguous():
        return torch.stack(factors)
    return torch.stack([factor.mT for factor in factors]).mT


BACKENDS: dict[str, Backend] = {
    "svd": Backend(_svd, torch.float64),
    "quintic": Backend(iterations.quintic, torch.bfloat16),
    "quintic_exact": Backend(_quintic_exact, torch.bfloat16, is_guarded=False),
    "polar_express": Backend(iterations.express),
    "cans": Backend(iterations.precise, torch.float32),
    "gram": Backend(gram_polar, polishes=True, is_graded=True),
}
"""Backends by name."""


class StatedError(NamedTuple):
    """A bound of (a) and (b): measured over random and hard spectra, with a margin, and tested."""

    floor: float
    """For well conditioned matrices: the error of the polynomials and of rounded products."""
    slope: float
    """Per unit of the spread, which is the Frobenius norm over the smallest singular value that counts (at most 2^10):
    rounding X turns the direction of that value by about the spread times the unit roundoff."""

    def at(self, spread: float) -> float:
        """The bound for a matrix of this spread."""
        return self.floor + self.slope * spread


_BF16, _FP16, _FP32 = 2.0**-9, 2.0**-12, 2.0**-24

ERRORS: dict[tuple[str, str], StatedError] = {
    ("svd", "auto"): StatedError(1e-6, _FP32),
    ("quintic", "auto"): StatedError(1e-2, 3 * _BF16),
    ("quintic_exact", "auto"): StatedError(3e-2, 4 * _BF16),
    ("polar_express", "bf16"): StatedError(2e-2, 2 * _BF16),
    ("polar_express", "fp16"): StatedError(4e-3, 2 * _FP16),
    ("polar_express", "fp32"): StatedError(2e-3, 8 * _FP32),
    ("cans", "auto"): StatedError(1e-5, 8 * _FP32),
    ("gram", "bf16"): StatedError(3e-2, 2 * _BF16),
    ("gram", "fp16"): StatedError(1.5e-2, 3 * _FP16),
    ("gram", "fp32"): StatedError(1e-4, 16 * _FP32),
}
"""The stated error of each method and dtype."""

GRADED_ERRORS: dict[tuple[str, str], StatedError] = {
    ("loose", "bf16"): StatedError(8e-2, 3 * _BF16),
    ("loose", "fp16"): StatedError(4e-2, 3 * _FP16),
    ("loose", "fp32"): StatedError(3e-3, 16 * _FP32),
    ("tight", "fp32"): StatedError(1e-5, 16 * _FP32),
}
"""The stated error of "gram" in other accuracies than the default. That of "loose" is over the singular values above
2^-8 of the Frobenius norm."""
