"""Floating point operations of directions and optimizer steps, counted while they run.

A direction runs on the meta device, where tensors have shapes but no values, under torch's own counter. No formula of a
direction is written down twice, so none can become outdated. Torch counts matrix products, with 2 operations for a
multiplication and an addition; `counter` adds the linear algebra that torch does not count. Elementwise work and
reductions are left out, as is usual.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from . import directions
from .options import DEFAULTS, MATRIX
from .polar import has_dtype_choice, product_dtype
from .polar.precision import DTYPES, counted_as

# Options that directions do not read are left out: a learning rate that moves must not start a new count.
_READ = ("direction", *(name for name, known in MATRIX.items() if known.acts != "step"))

aten = torch.ops.aten


def counter() -> FlopCounterMode:
    """A context manager that counts everything run inside it; `get_total_flops()` has the sum.

    Besides the products that torch counts, it counts for each n x n matrix of a stack: n^3/3 for a Cholesky factor and
    for a triangular inverse, 2 n^3/3 for an inverse from a Cholesky factor, m n^2 for a triangular solve with m
    right-hand sides, products with a vector, products in place, and the textbook estimates of `FORMULAS`.

    A triangular inverse is a solve whose right-hand side is an identity that `torch.eye` made under this counter, or a
    view of it. It is counted like LAPACK's trtri, which skips the zeros.
    """
    identities: set[StorageWeakRef] = set()

    def eye(*_: object, out_val: Tensor, **__: object) -> int:
        identities.add(StorageWeakRef(out_val.untyped_storage()))
        return 0

    def solve_triangular(a: Tensor, b: Tensor, *_: object, out_val: Tensor, **__: object) -> int:
        if StorageWeakRef(b.untyped_storage()) in identities:
            return _third_of_cube(out_val.shape)
        return out_val.numel() * a.shape[-1]

    with_values = {aten.eye: _Raw(eye), aten.linalg_solve_triangular: _Raw(solve_triangular)}
    return FlopCounterMode(display=False, custom_mapping={**FORMULAS, **with_values})


def direction_flops(m: int, n: int, options: Mapping[str, Any], *, device: torch.device | str = "cpu") -> int:
    """Operations of the direction of one m x n matrix under the complete options of a matrix group.

    Args:
        m: rows of the weight.
        n: columns.
        options: of a group of `optimizers.Aurora`, or for one; missing options have their defaults.
        device: where the direction will run; options that are "auto" are resolved for it.

    A loop that may end early, depending on its values, is counted to its last turn. Counts are cached by shape and
    options.
    """
    return _counted(m, n, torch.device(device).type, tuple(sorted(read_options(options, device).items())))


def step_flops(
    shapes: Iterable[tuple[int, int]], options: Mapping[str, Any], *, device: torch.device | str = "cpu"
) -> int:
    """Operations of one step of a matrix group with weights of these shapes: see `direction_flops`."""
    return sum(direction_flops(m, n, options, device=device) for m, n in shapes)


@functools.lru_cache(maxsize=1024)
def _counted(m: int, n: int, device: str, options: tuple[tuple[str, Any], ...]) -> int:
    given = dict(options)
    u = torch.empty(1, m, n, device="meta")
    v = u.new_empty(1, m) if directions.row_slot(given, m, n) else None
    with counter() as count, counted_as(device):
        directions.from_options(u, given, v)
    return int(count.get_total_flops())


def read_options(options: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """All options that a direction reads, with "auto" replaced by what it means on `device`.

    (On the meta device "auto" would be the choice for that device.)
    """
    complete = {**DEFAULTS["matrix"], **options}
    chosen = {key: complete[key] for key in _READ}
    if chosen["polar_dtype"] == "auto" and has_dtype_choice(chosen["polar"]):
        dtype = product_dtype(chosen["polar"], "auto", device, chosen["polar_accuracy"])
        chosen["polar_dtype"] = next(name for name, known in DTYPES.items() if known == dtype)
    if chosen["row_balance"] == "auto":
        chosen["row_balance"] = directions.automatic_row_balance(chosen, device)
    return chosen


class _Raw:
    """A formula that takes the tensors rather than their shapes."""

    _get_raw = True  # how torch's counter recognises one

    def __init__(self, formula: Callable[..., int]) -> None:
        self._formula = formula

    def __call__(self, *args: object, **kwargs: object) -> int:
        return self._formula(*args, **kwargs)


# The formulas take the shapes of an operation's arguments in order, and the shape of its result as `out_shape`.
Shape = tuple[int, ...]


def _third_of_cube(a: Shape, *_: object, **__: object) -> int:
    return prod(a[:-2]) * (a[-1] ** 3 // 3)


def _two_thirds_of_cube(a: Shape, *_: object, **__: object) -> int:
    return prod(a[:-2]) * (2 * a[-1] ** 3 // 3)


def _svd(a: Shape, *_: object, **__: object) -> int:
    """Thin factors of an l x s matrix, l >= s: 6 l s^2 + 20 s^3 (Golub & Van Loan, Matrix Computations, 8.6)."""
    small, large = sorted(a[-2:])
    return prod(a[:-2]) * (6 * large * small**2 + 20 * small**3)


def _eigh(a: Shape, *_: object, **__: object) -> int:
    """Eigenvalues and eigenvectors by symmetric QR: 9 n^3 (Golub & Van Loan, Matrix Computations, 8.3)."""
    return prod(a[:-2]) * 9 * a[-1] ** 3


def _vector_product(a: Shape, *_: object, **__: object) -> int:
    return 2 * prod(a)


def _vector_product_added(_c: Shape, a: Shape, *_: object, **__: object) -> int:
    return 2 * prod(a)


def _product_added(_c: Shape, a: Shape, b: Shape, *_: object, **__: object) -> int:
    return 2 * prod(a) * b[-1]


FORMULAS: dict[Any, Callable[..., int]] = {
    aten.linalg_cholesky_ex: _third_of_cube,
    aten.cholesky_inverse: _two_thirds_of_cube,
    aten._linalg_svd: _svd,
    aten._linalg_eigh: _eigh,
    aten.mv: _vector_product,
    aten.dot: _vector_product,
    aten.addmv: _vector_product_added,
    aten.addmm_: _product_added,
    aten.baddbmm_: _product_added,
}
"""Formulas for operations, with all their overloads, that torch's counter does not know. Those of `svd` and `eigh` are
textbook estimates with all vectors: the number of their iterations depends on the values."""
