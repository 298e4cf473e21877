"""The options of a parameter group: names, defaults, checks, and which of them have an effect.

A group is a dict with `kind` "matrix" or "adamw" and the keys of `DEFAULTS[kind]`, beside `params`. All that
the optimizer, the routing and a config need to know about options is here, once.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

import torch

from optimizers.directions import LR_SCALES, RowBalance, Scope, Target
from optimizers.polar import BACKENDS, has_dtype_choice
from optimizers.precision import PolarDtype
from optimizers.riemannian import Variant
from optimizers.row_balance import BalanceRule, EpsMode

Kind = Literal["matrix", "adamw"]
DirectionName = Literal["aurora", "riemannian_aurora", "muon", "normuon", "u_normuon"]
OptimizerName = Literal["aurora", "riemannian_aurora", "muon", "normuon", "u_normuon", "adamw"]
PresetName = Literal["released"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "matrix": {
        "lr": 0.02,
        "weight_decay": 0.0,
        "direction": "aurora",
        "momentum": 0.95,
        "nesterov": True,
        "lr_scale": "aspect",
        "polar": "gram",
        "polar_dtype": "auto",
        "scope": "tall",
        "iterations": 2,
        "beta": 0.5,
        "balance_rule": "odds",
        "row_balance": "auto",
        "tolerance": None,
        "eps_mode": "relative",
        "riemannian": "exact",
        "outer_steps": 3,
        "normuon_target": "graft",
        "running_norms": False,
        "beta2": 0.95,
        "contra": 0.0,
        "uw_floor": 0.0,
        "cautious": False,
    },
    "adamw": {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "fused": False},
}
"""Option keys of each kind with the values that a group gets when it does not say."""

PRESETS: dict[str, dict[str, Any]] = {
    "released": {
        "direction": "aurora",
        "scope": "all",
        "row_balance": "polar",
        "balance_rule": "tyler",
        "beta": 0.5,
        "iterations": 2,
        "polar": "quintic_exact",
        "eps_mode": "absolute",
        "momentum": 0.95,
        "nesterov": True,
        "lr_scale": "aspect",
        "weight_decay": 0.025,
    }
}
"""Named sets of matrix options. "released" repeats the arithmetic of tilde-research/aurora-release. A learning
rate is no part of a preset, and an option that is given beside one wins."""

_BALANCING = ("scope", "iterations", "beta", "balance_rule", "row_balance", "tolerance", "eps_mode")
DIRECTION_KEYS: dict[str, tuple[str, ...]] = {
    "aurora": _BALANCING,
    "riemannian_aurora": ("scope", "riemannian", "outer_steps"),
    "muon": (),
    "normuon": ("normuon_target", "beta2"),
    "u_normuon": ("running_norms", "beta2"),
}
"""Matrix options that not every direction has a use for, by the directions that have."""

ONE_ITERATION = (
    "iterations = 1 only normalises the rows before the polar call: the rows of the direction can come out "
    "less even than Muon's; 2 is the default"
)
"""What a config and the optimizer warn of."""

# Keys of a group that are no options: what it consists of, and what torch and its schedulers put there.
FOREIGN_KEYS = frozenset(
    {
        "params",
        "param_names",
        "row_blocks",
        "role",
        "kind",
        "initial_lr",
        "max_lr",
        "min_lr",
        "swa_lr",
        "base_momentum",
        "max_momentum",
    }
)


def group_kind(group: Mapping[str, Any]) -> Kind:
    """The kind of a group, "matrix" if it does not say; ValueError if it is neither."""
    kind = group.get("kind", "matrix")
    if kind not in DEFAULTS:
        raise ValueError(f"kind is {kind!r}: expected one of {', '.join(DEFAULTS)}{did_you_mean(kind, DEFAULTS)}")
    return kind


def complete(
    kind: Kind,
    given: Mapping[str, Any],
    *,
    inherited: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> dict[str, Any]:
    """All options of a group: its own, then those it inherits, then the preset, then the defaults.

    Raises:
        ValueError: naming every unknown key, every value out of range and every option of its own that has no
            effect in the combination (an inherited one may have its effect in another group).
    """
    named = expand_preset(preset, {**(inherited or {}), **given})
    options = {**DEFAULTS[kind], **named}
    problems = [_unknown(kind, key) for key in named if key not in DEFAULTS[kind]]
    problems += invalid(kind, options)
    if not problems and kind == "matrix":
        problems += [f"{key} has no effect: {why}" for key, why in ineffective(options).items() if key in given]
    if problems:
        raise ValueError(f"bad options of a parameter group of kind {kind!r}: " + "; ".join(problems))
    return options


def expand_preset(preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` on top of a preset, without the preset's options that have no effect beside what is given.

    Raises:
        ValueError: an unknown preset, or one for another direction than the one given.
    """
    if preset is None:
        return dict(given)
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}: expected one of {', '.join(PRESETS)}{did_you_mean(preset, PRESETS)}")
    fixed = PRESETS[preset]
    direction = given.get("direction", fixed["direction"])
    if direction != fixed["direction"]:
        raise ValueError(f"preset {preset!r} is one of direction {fixed['direction']!r}, not {direction!r}")
    merged = {**fixed, **given}
    without = ineffective({**DEFAULTS["matrix"], **merged})
    return {key: value for key, value in merged.items() if key in given or key not in without}


def ineffective(options: Mapping[str, Any]) -> dict[str, str]:
    """The matrix options that change nothing beside the others of a complete set, with why."""
    direction = options["direction"]
    own = DIRECTION_KEYS[direction]
    without = {
        key: f"the direction {direction!r} does not use it"
        for keys in DIRECTION_KEYS.values()
        for key in keys
        if key not in own
    }
    if not has_dtype_choice(options["polar"]):
        without["polar_dtype"] = f"polar {options['polar']!r} has one dtype only"
    if direction == "aurora":
        without |= _ineffective_balancing(options)
    if direction == "normuon" and options["normuon_target"] == "unit":
        without["beta2"] = "normuon_target 'unit' gives every row norm 1, whatever it was before"
    if direction == "u_normuon" and not options["running_norms"]:
        without["beta2"] = "without running_norms nothing is averaged"
    return without


def _ineffective_balancing(options: Mapping[str, Any]) -> dict[str, str]:
    if options["iterations"] == 1:
        why = "with iterations = 1 the row scaling is never updated"
        return {"beta": why, "balance_rule": why, "row_balance": why, "tolerance": why}
    if options["balance_rule"] == "odds":
        return {"beta": "the balance rule 'odds' has no step size; it is one of 'tyler'"}
    return {}


def invalid(kind: Kind, options: Mapping[str, Any]) -> list[str]:
    """One message for every option of the kind whose value cannot be used."""
    problems = []
    for key in DEFAULTS[kind]:
        value = options[key]
        check = _CHECKS[key]
        if isinstance(check, tuple):
            if not isinstance(value, str) or value not in check:
                problems.append(f"{key} is {value!r}: expected one of {', '.join(check)}{did_you_mean(value, check)}")
        elif not check.holds(value):
            problems.append(f"{key} is {value!r}: expected {check.expected}")
    return problems


def did_you_mean(got: object, known: Iterable[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(got), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _unknown(kind: Kind, key: str) -> str:
    other = next((name for name in DEFAULTS if name != kind and key in DEFAULTS[name]), None)
    if other is not None:
        return f"{key!r} is an option of kind {other!r}"
    return f"unknown option {key!r}{did_you_mean(key, DEFAULTS[kind])}"


@dataclass(frozen=True)
class _Number:
    """A finite number in [low, high), or [low, high] if `closed`; low itself is out if `above`.

    With `tensor` a scalar tensor will do; its value is not looked at, which would wait for its device. With
    `optional` so will None.
    """

    low: float = 0.0
    high: float = math.inf
    above: bool = False
    closed: bool = False
    whole: bool = False
    tensor: bool = False
    optional: bool = False

    def holds(self, value: object) -> bool:
        if isinstance(value, torch.Tensor):
            return self.tensor and value.numel() == 1 and value.is_floating_point()
        if value is None:
            return self.optional
        if not _is_number(value) or (self.whole and not isinstance(value, int)):
            return False
        over = value > self.low if self.above else value >= self.low
        under = value <= self.high if self.closed else value < self.high
        return over and under

    @property
    def expected(self) -> str:
        what = "a whole number" if self.whole else "a number"
        low = f"{'above' if self.above else 'of at least'} {self.low:g}"
        high = "" if math.isinf(self.high) else f" and {'at most' if self.closed else 'below'} {self.high:g}"
        return f"{what} {low}{high}{' or null' if self.optional else ''}"


@dataclass(frozen=True)
class _Flag:
    expected: str = "true or false"

    def holds(self, value: object) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class _Betas:
    expected: str = "two numbers of at least 0 and below 1"

    def holds(self, value: object) -> bool:
        if not isinstance(value, list | tuple) or len(value) != 2:
            return False
        return all(_is_number(beta) and 0 <= beta < 1 for beta in value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_CHECKS: dict[str, tuple[str, ...] | _Number | _Flag | _Betas] = {
    "lr": _Number(tensor=True),
    "weight_decay": _Number(),
    "direction": get_args(DirectionName),
    "momentum": _Number(high=1.0),
    "nesterov": _Flag(),
    "lr_scale": tuple(LR_SCALES),
    "scope": get_args(Scope),
    "iterations": _Number(low=1, whole=True),
    "beta": _Number(above=True, high=1.0, closed=True),
    "balance_rule": get_args(BalanceRule),
    "row_balance": get_args(RowBalance),
    "polar": tuple(BACKENDS),
    "eps_mode": get_args(EpsMode),
    "polar_dtype": get_args(PolarDtype),
    "tolerance": _Number(above=True, high=1.0, optional=True),
    "riemannian": get_args(Variant),
    "outer_steps": _Number(low=1, whole=True),
    "normuon_target": get_args(Target),
    "running_norms": _Flag(),
    "beta2": _Number(high=1.0),
    "contra": _Number(high=1.0),
    "uw_floor": _Number(),
    "cautious": _Flag(),
    "betas": _Betas(),
    "eps": _Number(),
    "fused": _Flag(),
}
