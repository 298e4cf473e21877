"""The variants in the optimizer benchmark: our directions, the released algorithm, and other packages."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from optimizers import Aurora, directions, has_fast_bf16
from optimizers.directions import balances, form
from optimizers.options import complete

LARGE = 2**21
"""Elements from which on only the `main` variants run unless all are asked for."""
SLOW_BF16_FLOPS = 2e10
"""Most operations in native bf16 that are run where the machine has no instructions for them: about 20 seconds."""
LR = 0.02

_BARE: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "nesterov": False}

# Builds an optimizer for weights; with True one whose step is the bare direction: lr 1, no momentum, no decay.
Maker = Callable[[list[Tensor], bool], Optimizer]


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    name: str
    given: dict[str, Any] = field(default_factory=dict)
    """Options of a matrix group: what is computed, or, for an optimizer of others, what it approximates."""
    make: Maker | None = None
    """If given, whole steps of that optimizer are timed, otherwise only directions."""
    main: bool = False
    """Also runs on large matrices."""
    judged: bool = True
    """Whether its quality is measured. Not where another row has it."""
    native_bf16_steps: int = 0
    """Polar steps in native bf16 products, which are slow without instructions for them. 0 for ours."""
    needs: str | None = None
    """A package that must be installed."""
    note: str = ""

    @cached_property
    def options(self) -> dict[str, Any]:
        """The complete options of the group."""
        return complete("matrix", self.given)

    @property
    def timed(self) -> Literal["direction", "step"]:
        """What is timed."""
        return "direction" if self.make is None else "step"

    def skipped(self, u: Tensor, *, everything: bool) -> str | None:
        """Why it does not run on this stack; None if it does. `everything`: also on large matrices."""
        k, m, n = u.shape
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        small, large = sorted((m, n))
        flops = k * self.native_bf16_steps * (4 * large * small**2 + 2 * small**3)
        if flops > SLOW_BF16_FLOPS and not has_fast_bf16(u.device):
            return "native bf16 products, for which this machine has no instructions"
        if self.timed == "direction" and self.is_muon(m, n):
            return "muon in this form"
        if m * n >= LARGE and not (self.main or everything):
            return "not a main variant: use --all-variants"
        return None

    def is_muon(self, m: int, n: int) -> bool:
        """Whether it leaves this form to muon, and with the backend that the row "muon" has."""
        name = self.options["direction"]
        if name == "muon" or "polar" in self.given:
            return False
        return m <= n if name in ("normuon", "u_normuon") else not balances(self.options["scope"], form(m, n))

    def call(self, u: Tensor) -> Callable[[], Tensor | None]:
        """What is timed for a stack [k, m, n]; of a direction it returns it.

        Weights, gradients, optimizers and running means are made here, beforehand.
        """
        if self.make is not None:
            step = self._optimizer(u, bare=False)[1].step
            return lambda: step()
        v = u.new_zeros(u.shape[:-1]) if directions.row_slot(self.options, *u.shape[-2:]) else None
        return lambda: directions.from_options(u, self.options, v).d

    def direction(self, u: Tensor) -> Tensor:
        """The direction of a stack [k, m, n]; of an optimizer by one step from weights of zeros."""
        if self.make is None:
            d = self.call(u)()
            assert d is not None, "a direction returns it"
            return d
        weights, optimizer = self._optimizer(u, bare=True)
        optimizer.step()
        return torch.stack([-weight.detach() for weight in weights]) / directions.lr_scale("aspect", *u.shape[-2:])

    def _optimizer(self, u: Tensor, *, bare: bool) -> tuple[list[Tensor], Optimizer]:
        assert self.make is not None, "only a variant with an optimizer has one"
        weights = [torch.zeros_like(matrix).requires_grad_() for matrix in u]
        for weight, matrix in zip(weights, u, strict=True):
            weight.grad = matrix.clone()
        return weights, self.make(weights, bare)


def _aurora_class(**given: Any) -> Maker:
    def make(weights: list[Tensor], bare: bool) -> Optimizer:
        own = _BARE if bare else {"lr": LR}
        return Aurora([{"params": weights, "kind": "matrix", **given, **own}])

    return make


def _torch_muon(weights: list[Tensor], bare: bool) -> Optimizer:
    own: dict[str, Any] = _BARE if bare else {"lr": LR}
    return torch.optim.Muon(weights, weight_decay=0.0, **own)


def _pytorch_optimizer(name: str) -> Maker:
    def make(weights: list[Tensor], bare: bool) -> Optimizer:
        own = _BARE if bare else {"lr": LR}
        optimizer = getattr(importlib.import_module("pytorch_optimizer"), name)
        return optimizer([{"params": weights, "use_muon": True, **own}])

    return make


_RELEASED = {
    "direction": "aurora",
    "scope": "all",
    "iterations": 2,
    "balance_rule": "tyler",
    "row_balance": "polar",
    "eps_mode": "absolute",
}

MUON, AURORA, AURORA_3 = "muon", "aurora", "aurora, K = 3"
RELEASED, RELEASED_NATIVE = "released", "released, native bf16"
CARRIED, LOOSE = "aurora, carried", "step of Muon, loose"
AURORA_STEP, MUON_STEP, TORCH_STEP = "step of Aurora", "step of Muon", "step of torch.optim.Muon"

VARIANTS = (
    Variant(MUON, {"direction": "muon"}, main=True, note="default backend"),
    Variant("normuon", {"direction": "normuon"}, main=True, note="first step, so v is the row's own"),
    Variant("u_normuon", {"direction": "u_normuon"}, main=True),
    Variant(AURORA, {"direction": "aurora"}, main=True, note="defaults: K = 2, odds rule"),
    Variant(AURORA_3, {"direction": "aurora", "iterations": 3}, main=True),
    Variant(
        CARRIED,
        {"direction": "aurora", "row_balance": "carried"},
        main=True,
        judged=False,
        note="from row scales of 1, so its rows say nothing",
    ),
    Variant("aurora, polished", {"direction": "aurora", "row_balance": "polished"}, main=True, judged=False),
    Variant("muon, loose", {"direction": "muon", "polar_accuracy": "loose"}, main=True),
    Variant(
        RELEASED,
        {**_RELEASED, "polar": "quintic"},
        main=True,
        note="batched; bf16 values in fp32 products where bf16 is slow",
    ),
    Variant(
        RELEASED_NATIVE,
        {**_RELEASED, "polar": "quintic_exact"},
        main=True,
        native_bf16_steps=24,
        note="operation by operation as released, in true bf16",
    ),
    Variant("aurora, by polar", {"direction": "aurora", "row_balance": "polar"}, note="two polar calls"),
    Variant("aurora, by leverage", {"direction": "aurora", "row_balance": "leverage"}),
    Variant("aurora, by gram", {"direction": "aurora", "row_balance": "gram"}),
    Variant("aurora, tyler", {"direction": "aurora", "balance_rule": "tyler"}),
    Variant("aurora, tolerance", {"direction": "aurora", "iterations": 6, "tolerance": 0.01}, note="K <= 6, 1 %"),
    Variant("riemannian, exact", {"direction": "riemannian_aurora", "riemannian": "exact"}),
    Variant("riemannian, released", {"direction": "riemannian_aurora", "riemannian": "released"}),
    Variant("muon, gram fp32", {"direction": "muon", "polar": "gram", "polar_dtype": "fp32"}),
    Variant("muon, gram fp16", {"direction": "muon", "polar": "gram", "polar_dtype": "fp16"}),
    Variant("muon, gram bf16", {"direction": "muon", "polar": "gram", "polar_dtype": "bf16"}),
    Variant("muon, polar_express fp32", {"direction": "muon", "polar": "polar_express", "polar_dtype": "fp32"}),
    Variant("muon, polar_express bf16", {"direction": "muon", "polar": "polar_express", "polar_dtype": "bf16"}),
    Variant("muon, cans", {"direction": "muon", "polar": "cans"}),
    Variant("muon, quintic", {"direction": "muon", "polar": "quintic"}),
    Variant("muon, svd", {"direction": "muon", "polar": "svd"}),
    Variant(
        AURORA_STEP,
        {"direction": "aurora"},
        make=_aurora_class(direction="aurora"),
        main=True,
        judged=False,
        note="optimizers.Aurora",
    ),
    Variant(
        MUON_STEP,
        {"direction": "muon"},
        make=_aurora_class(direction="muon"),
        main=True,
        judged=False,
        note="optimizers.Aurora",
    ),
    Variant(
        LOOSE,
        {"direction": "muon", "polar_accuracy": "loose"},
        make=_aurora_class(direction="muon", polar_accuracy="loose"),
        main=True,
        judged=False,
    ),
    Variant(TORCH_STEP, {"direction": "muon"}, make=_torch_muon, main=True, native_bf16_steps=5),
    Variant(
        "step of pytorch_optimizer.Muon",
        {"direction": "muon"},
        make=_pytorch_optimizer("Muon"),
        main=True,
        native_bf16_steps=5,
        needs="pytorch_optimizer",
    ),
    Variant(
        "step of pytorch_optimizer.NorMuon",
        {"direction": "normuon"},
        make=_pytorch_optimizer("NorMuon"),
        main=True,
        native_bf16_steps=5,
        needs="pytorch_optimizer",
    ),
)
