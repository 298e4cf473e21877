"""Measurements of the optimizer benchmark: time, memory, and the quality of a direction.

Quality is judged by exact arithmetic in fp64: `optimizers.reference` computes the row scaling D, and one singular value
decomposition of D u gives the exact direction and the singular vectors along which the singular values are measured.
"""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimizers import reference
from optimizers.directions import balances, form

# Singular values below this share of the Frobenius norm need not become 1.
CUT = 2.0**-11
NEAR = 0.01


class Quality(TypedDict):
    """How good the directions of one input are: the worst over its matrices."""

    # max |sigma - 1| of the direction along the singular vectors of its input (D u where the rows are balanced) whose
    # singular values are above 2^-11 of the Frobenius norm.
    orthogonality_error: float
    # Standard deviation over mean of the row norms, rows of zeros left out. Of a wide matrix: of the column norms.
    row_variation: float
    # Share of those rows whose norm is within 1 % of sqrt(n/m) (columns of a wide matrix: of sqrt(m/n)).
    rows_within_1_percent: float
    # |d - d*|_F / |d*|_F, d* the same algorithm in exact arithmetic. Null where none is computed (see `exact`).
    direction_error: float | None
    # <u, d> / |u|_nuclear: 1 for the polar factor, and at most 1 for anything of spectral norm 1.
    alignment: float


@dataclass(frozen=True)
class Exact:
    """The exact direction d [m, n] in fp64 and what is needed to judge others. All in tall orientation (m >= n)."""

    d: Tensor | None
    above: Tensor  # [n, k]: right singular vectors of the input above the cut


class Oracle:
    """Exact directions of the matrices of one input; each is computed once.

    Args:
        u: one matrix [m, n].
    """

    def __init__(self, u: Tensor) -> None:
        self.is_wide = u.shape[0] < u.shape[1]
        self.u = (u.mT if self.is_wide else u).double().cpu()
        self._known: dict[tuple[Any, ...], Exact] = {}
        self._nuclear: float | None = None

    @property
    def nuclear_norm(self) -> float:
        """The sum of the singular values of u."""
        self.exact({"direction": "muon"})
        assert self._nuclear is not None, "the polar factor of u itself has been asked for"
        return self._nuclear

    def exact(self, options: Mapping[str, Any]) -> Exact:
        """What the options of a matrix group amount to in exact arithmetic, at the first step.

        The Riemannian ascent has no exact direction here, as it starts from a polar factor and moves on from there.
        """
        m, n = self.u.shape
        name = options["direction"]
        shape_form = "wide" if self.is_wide else form(m, n)
        if name in ("normuon", "u_normuon") and shape_form == "tall":
            polar = self.exact({"direction": "muon"})
            assert polar.d is not None, "the polar factor has an exact form"
            # At the first step the running mean of NorMuon is a multiple of the row's own: both make all rows even.
            rows = torch.nn.functional.normalize(polar.d, dim=1)
            if name == "u_normuon":
                return Exact(rows * (n / m) ** 0.5, polar.above)
            grafted = rows * (polar.d.norm() / rows.norm())
            return Exact(grafted if options["normuon_target"] == "graft" else rows, polar.above)
        if name == "riemannian_aurora" and balances(options["scope"], shape_form):
            return Exact(None, self.exact({"direction": "muon"}).above)
        if name == "aurora" and balances(options["scope"], shape_form):
            keys = ("iterations", "beta", "balance_rule", "eps_mode", "tolerance")
            return self._balanced({key: options[key] for key in keys})
        return self._balanced(None)

    def _balanced(self, rule: dict[str, Any] | None) -> Exact:
        key = () if rule is None else tuple(rule.items())
        if key not in self._known:
            D = torch.ones(len(self.u)) if rule is None else reference.row_scale(self.u, **rule)[0]
            left, sigma, right = torch.linalg.svd(D[:, None] * self.u, full_matrices=False)
            rank = int((sigma > max(self.u.shape) * 2.0**-52 * sigma[0]).sum())
            above = sigma > CUT * torch.linalg.vector_norm(sigma)
            self._known[key] = Exact(left[:, :rank] @ right[:rank], right[above].T)
            if rule is None:
                self._nuclear = float(sigma.sum())
        return self._known[key]

    def judge(self, d: Tensor, options: Mapping[str, Any]) -> Quality:
        """The quality of a direction of u [m, n] that is meant to be that of the options."""
        exact = self.exact(options)
        tall = (d.mT if self.is_wide else d).double().cpu()
        norms = tall.norm(dim=1)
        norms = norms[norms != 0]
        target = (tall.shape[1] / tall.shape[0]) ** 0.5
        error = None if exact.d is None else float((tall - exact.d).norm() / exact.d.norm())
        return Quality(
            orthogonality_error=orthogonality_error(tall, exact.above),
            row_variation=float(norms.std(correction=0) / norms.mean()),
            rows_within_1_percent=float(((norms / target - 1).abs() <= NEAR).double().mean()),
            direction_error=error,
            alignment=float((self.u * tall).sum()) / self.nuclear_norm,
        )


def orthogonality_error(d: Tensor, along: Tensor) -> float:
    """max |sigma - 1| over the singular values of d V, for d [m, n] and orthonormal columns V [n, k], in fp64.

    They come from the eigenvalues of V^T d^T d V, which near 1 are as exact as a decomposition of d V.
    """
    if not d.isfinite().all():
        return float("nan")
    projected = d if along.shape[0] == along.shape[1] else d @ along
    sigma = torch.linalg.eigvalsh(projected.mT @ projected).clamp(min=0).sqrt()
    return float((sigma - 1).abs().max())


def worst(found: Sequence[Quality]) -> Quality:
    """The worst of each figure; the direction error is null if one of them is."""
    errors = [quality["direction_error"] for quality in found]
    known = [error for error in errors if error is not None]
    return Quality(
        orthogonality_error=_largest([quality["orthogonality_error"] for quality in found]),
        row_variation=_largest([quality["row_variation"] for quality in found]),
        rows_within_1_percent=min(quality["rows_within_1_percent"] for quality in found),
        direction_error=_largest(known) if len(known) == len(errors) else None,
        alignment=min(quality["alignment"] for quality in found),
    )


def _largest(values: Sequence[float]) -> float:
    """The largest, or NaN if there is one: max() would drop it."""
    return float(torch.tensor(values, dtype=torch.float64).max())


class PeakMemory(TorchDispatchMode):
    """Counts the peak bytes of live tensors, in excess of those that existed before.

    It sees every tensor that an operation returns, and its end. What a kernel allocates and frees within one operation
    (the workspace of an SVD, say) is not seen.

    Attributes:
        peak: the most bytes at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return result

    def _free(self, size: int) -> None:
        self._live -= size


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall-clock time of a call, including the work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def timed_rounds(
    calls: Mapping[str, Callable[[], Callable[[], object]]],
    device: torch.device,
    *,
    rounds: int,
    at_least: int,
    budget: float,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Measure the seconds of every call in every round; the calls alternate, in a new order each round.

    Args:
        calls: by name; each prepares (not timed) and returns what is timed.
        device: where they run.
        rounds: how many, fewer once `budget` seconds have passed, but `at_least` so many.
        at_least: see `rounds`.
        budget: in seconds, preparation included.
        seed: of the order.
    """
    order, generator = list(calls), random.Random(seed)
    took: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= at_least and time.perf_counter() - started > budget:
            break
        generator.shuffle(order)
        for name in order:
            took[name].append(seconds(calls[name](), device))
    return took
