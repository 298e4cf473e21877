"""Floating point operations of one optimizer step, for the run's budget.

Matrix products only, 2 per multiplication with addition; the elementwise work is left out.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from optimizers.directions import balances, form
from optimizers.polar import QUINTIC_STEPS, backend_named


def polar_flops(m: int, n: int, method: str = "quintic") -> int:
    """Operations of one polar call on an m x n matrix; symmetric in m and n.

    Quintic: 12 (4 l s^2 + 2 s^3) with s the smaller and l the larger side. Svd: the textbook estimate for thin
    factors, 6 l s^2 + 20 s^3 (Golub & Van Loan, 8.6), and 2 l s^2 for their product.

    Raises:
        ValueError: an unknown method.
    """
    backend_named(method)
    small, large = sorted((m, n))
    return _POLAR_FLOPS[method](small, large)


def direction_flops(m: int, n: int, options: Mapping[str, Any]) -> int:
    """Operations of one direction under the complete options of a matrix group."""
    is_balanced = options["direction"] == "aurora" and balances(options["scope"], form(m, n))
    return (options["iterations"] if is_balanced else 1) * polar_flops(m, n, options["polar"])


def step_flops(shapes: Iterable[tuple[int, int]], options: Mapping[str, Any]) -> int:
    """Operations of one step of a matrix group with weights of these shapes."""
    return sum(direction_flops(m, n, options) for m, n in shapes)


def _quintic_flops(small: int, large: int) -> int:
    return QUINTIC_STEPS * (4 * large * small**2 + 2 * small**3)


_POLAR_FLOPS: dict[str, Callable[[int, int], int]] = {
    "quintic": _quintic_flops,
    "quintic_exact": _quintic_flops,
    "svd": lambda small, large: 8 * large * small**2 + 20 * small**3,
}
