"""Polar factors of stacks of matrices.

polar(X) = U V^T over the singular values of X that are not zero: the nearest matrix with orthonormal
rows or columns where X has full rank, a partial isometry where it has not, and 0 for X = 0.
Its squared row norms are the leverage scores of X; they sum to the rank.

Two errors describe a backend, both over the singular values above 2^-10 of the Frobenius norm:
(a) max |sigma - 1| of the result, (b) |d - d_svd|_F / |d_svd|_F. In bf16 (b) grows with the condition
number and (a) does not show it. Directions below that cut come back with 0 <= sigma <= 1 + (a).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from optimizers.precision import bf16_baddbmm, bf16_bmm, to_bf16, without_autocast

QUINTIC_STEPS = 12
# Guards the division by the Frobenius norm, as in the released code.
NORM_EPS = 1e-7

# Inputs whose largest entry lies in this range are used as they are; others are scaled by a power of two.
SMALLEST_UNSCALED, LARGEST_UNSCALED = 2.0**-20, 2.0**40

Backend = Callable[[Tensor], Tensor]


def polar(x: Tensor, method: str = "quintic", *, exact: bool = False) -> Tensor:
    """The polar factor of every matrix of a stack.

    Args:
        x: [..., m, n] of any real floating dtype and any strides; it is not changed.
        method: a key of `BACKENDS`.
        exact: with "quintic" the released code's operations in their order, one matrix at a time, in
            true bf16 and without the scaling below: the same as method "quintic_exact".

    Returns:
        [..., m, n] in fp32, of any strides. A zero matrix gives zeros. A matrix with a NaN or an infinity
        gives NaN everywhere, and only that matrix of the stack.

    If the largest entry of a matrix is outside [2^-20, 2^40] the matrix is first multiplied by the power
    of two that brings it into [1, 2). That is exact, so the result has no scale from the smallest to
    the largest number of the dtype.

    Nothing waits for the device, except that `svd` itself does on a GPU.

    Raises:
        ValueError: x has fewer than two dimensions or is not real floating point, an unknown method, or
            `exact` with another method than "quintic".
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"polar takes a real floating point stack [..., m, n], got {x.dtype} of shape {tuple(x.shape)}"
        )
    if exact and method not in ("quintic", "quintic_exact"):
        raise ValueError(f"exact=True repeats the released quintic; method {method!r} has no such form")
    backend = backend_named("quintic_exact" if exact else method)
    if x.numel() == 0:
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    with torch.no_grad(), without_autocast(x.device):
        stack = x.detach().reshape(-1, *x.shape[-2:])
        factor = _quintic_exact(stack) if backend is _quintic_exact else _guarded(stack, backend)
        return factor.float().reshape(x.shape)


def backend_named(method: str) -> Backend:
    """The backend of that name; ValueError if there is none."""
    if method not in BACKENDS:
        raise ValueError(f"unknown polar method {method!r}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[method]


def working_dtype(method: str) -> torch.dtype:
    """The dtype in which a backend reads its input: fp64 for "svd", fp32 otherwise.

    A product D*u of fp32 numbers is exact in fp64, so it keeps the rank of u; rounded to fp32 it does not.
    """
    return torch.float64 if backend_named(method) is _svd else torch.float32


def prescale(x: Tensor) -> Tensor:
    """Multiplies each matrix of [..., m, n] by a power of two if its largest entry is outside [2^-20, 2^40].

    The largest entry of a scaled matrix is in [1, 2). Exact, but for entries that underflow beside one
    about 1e38 times larger. Zero and non-finite matrices pass unchanged.
    """
    return _prescale(x, _largest(x))


def _largest(x: Tensor) -> Tensor:
    """The largest absolute entry of each matrix, [..., 1, 1]; NaN where there is a NaN."""
    return x.abs().amax(dim=(-2, -1), keepdim=True)


def _prescale(x: Tensor, largest: Tensor) -> Tensor:
    outside = ((largest < SMALLEST_UNSCALED) | (largest > LARGEST_UNSCALED)) & largest.isfinite()
    exponent = torch.where(outside & (largest > 0), 1 - torch.frexp(largest).exponent, 0)
    # In two halves, since 2^exponent itself overflows for a subnormal input.
    half = exponent // 2
    return x * _power_of_two(half, x.dtype) * _power_of_two(exponent - half, x.dtype)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent built from its bits: exact on every device, which exp2 and ldexp do not promise."""
    if dtype == torch.float64:
        return ((exponent.long() + 1023) << 52).view(torch.float64)
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _guarded(stack: Tensor, backend: Backend) -> Tensor:
    """Runs a backend on a scaled, finite stack [k, m, n] and puts zero and NaN matrices in afterwards."""
    x = stack if stack.dtype == torch.float64 else stack.float()
    largest = _largest(x)
    finite = largest.isfinite()
    usable = finite & (largest > 0)
    # Zero matrices are common (every zero-initialised weight at its first step), and on a CPU the look
    # costs nothing; on an accelerator it would stall the queue.
    if x.device.type == "cpu" and not usable.any():
        return torch.where(finite, torch.zeros_like(x), torch.nan)
    factor = backend(_prescale(torch.where(finite, x, 0), torch.where(finite, largest, 0)))
    return torch.where(usable, factor, torch.where(finite, 0.0, torch.nan).to(factor.dtype))


def _svd(x: Tensor) -> Tensor:
    """Exact, in fp64: singular values up to max(m, n) * 2^-52 of the largest count as zero.

    Error: (a) and (b) below 1e-7, the rounding of the result to fp32.
    """
    u, sigma, vh = torch.linalg.svd(x.double(), full_matrices=False)
    cut = max(x.shape[-2:]) * 2.0**-52 * sigma[..., :1]
    return (u * (sigma > cut).unsqueeze(-2)) @ vh


def _quintic(x: Tensor) -> Tensor:
    """12 steps X <- 2X - 1.5 (XX^T) X + 0.5 (XX^T)^2 X in bf16, equal shapes as one batched product.

    The polynomial has its fixed point at 1 with slope 0 and doubles small values, so 12 steps lift
    everything above about 2^-10 of the Frobenius norm. Error: (a) below 1 %; (b) below 1 % up to condition
    number 10, 3 % at 50, 5 % at 100, 15 % at 500 (log-uniform spectra), most of it the rounding of X itself.
    """
    tall = x.shape[-2] > x.shape[-1]
    wide = (x.mT if tall else x).float()
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    X = to_bf16(wide / (norm + NORM_EPS))
    for _ in range(QUINTIC_STEPS):
        A = bf16_bmm(X, X.mT)
        B = bf16_baddbmm(A, A, A, beta=-1.5, alpha=0.5)
        X = bf16_baddbmm(X, B, X, beta=2.0)
    return X.mT if tall else X


def _quintic_exact(x: Tensor) -> Tensor:
    """The released iteration: one matrix at a time, every operation rounded to bf16, in the same order.

    On one machine it repeats the released code bit for bit; between machines the summation order of the
    products differs. It has the released code's range: fails from about 1e-8 down and 1e18 up.
    """
    tall = x.shape[-2] > x.shape[-1]
    factors = torch.stack([_released_quintic(matrix.mT if tall else matrix) for matrix in x.bfloat16()])
    return factors.mT if tall else factors


def _released_quintic(X: Tensor) -> Tensor:
    """On one wide bf16 matrix. The strides count too: products and sums run in the order that they give."""
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + NORM_EPS)
    for _ in range(QUINTIC_STEPS):
        A = X @ X.mT
        B = -1.5 * A + (0.5 * A) @ A
        X = 2 * X + B @ X
    return X


BACKENDS: dict[str, Backend] = {"quintic": _quintic, "quintic_exact": _quintic_exact, "svd": _svd}
"""Backends by name. Each takes a stack [k, m, n] in its `working_dtype` or fp32, finite and scaled (but for
"quintic_exact", which takes it as it is), and returns [k, m, n] of any floating dtype."""
