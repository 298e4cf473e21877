"""The optimizer section of the config."""

import re
import warnings
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from optimizers import options
from optimizers.directions import Scope
from optimizers.routing import Settings
from optimizers.row_balance import BalanceRule
from pretrain.config.base import Section

_MATRIX = options.DEFAULTS["matrix"]
_ADAMW = options.DEFAULTS["adamw"]
# The matrix options that are fields; eps_mode comes with a preset only, direction is `name`.
_MATRIX_FIELDS = tuple(key for key in _MATRIX if key not in ("direction", "eps_mode"))


class AdamWConfig(Section):
    """AdamW for embeddings, the output head, norm gains and biases, or for everything under name "adamw"."""

    lr: float = Field(_ADAMW["lr"], ge=0)
    """Peak learning rate, multiplied by the schedule. About ten times smaller than the matrix lr; too large and the
    embeddings blow up within the first hundred steps."""

    betas: tuple[float, float] = _ADAMW["betas"]
    """Averaging factors of the gradient and of its square, each in [0, 1). A second one above 0.99 averages over
    more steps than a short run has."""

    eps: float = Field(_ADAMW["eps"], ge=0)
    """Added to the root of the second moment; large values turn the update towards plain momentum."""

    weight_decay: float = Field(_ADAMW["weight_decay"], ge=0)
    """Decoupled decay a step, times the learning rate. On 2-D weights only: norm gains and biases never decay."""

    fused: bool = _ADAMW["fused"]
    """One kernel for all tensors: faster on a GPU, equal up to rounding."""

    @field_validator("betas", mode="before")
    @classmethod
    def _betas_from_list(cls, betas: object) -> object:
        return tuple(betas) if isinstance(betas, list) else betas

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("expected two numbers of at least 0 and below 1")
        return betas


class OptimizerConfig(Section):
    """Which direction the matrices take, with which options, and AdamW for the other parameters.

    A preset is written out into the options that it stands for.
    """

    name: Literal["aurora", "muon", "adamw"] = "aurora"
    """Direction of the matrices: all 2-D weights but embeddings and the output head. "aurora": orthogonal with
    rows of equal norm; "muon": orthogonal; "adamw": no matrix optimizer, every parameter by `adamw`."""

    preset: options.PresetName | None = None
    """"released": the arithmetic of the released Aurora code, for parity runs (slow: true bf16, one matrix at a
    time). Options that are set beside it win. The learning rate is no part of it (the released one is 0.05)."""

    lr: float = Field(_MATRIX["lr"], ge=0)
    """Peak learning rate of the matrices, multiplied by the schedule and by `lr_scale`. The spectral norm of a step,
    before the scale: 0.01 to 0.05 is usual, 0.1 diverges."""

    momentum: float = Field(_MATRIX["momentum"], ge=0, lt=1)
    """Share of the old average of the gradient that each step keeps; 0.95 averages over about 20 steps."""

    nesterov: bool = _MATRIX["nesterov"]
    """Look one gradient ahead: the direction is taken of g + momentum * (average - g) instead of the average."""

    weight_decay: float = Field(_MATRIX["weight_decay"], ge=0)
    """Decoupled decay of the matrices a step, times the scheduled learning rate without `lr_scale`."""

    lr_scale: Literal["aspect", "rms", "spectral"] = _MATRIX["lr_scale"]
    """Factor on the lr of an m x n weight (m outputs). "aspect": sqrt(max(1, m/n)); "rms": 0.2 sqrt(max(m, n)),
    a step as large as AdamW's, which wants AdamW's small lr; "spectral": sqrt(m/n)."""

    scope: Scope = _MATRIX["scope"]
    """Which forms aurora balances: "tall" (gate and up projections), "wide" (down projections) or "all". The others,
    and always the square ones, go by muon."""

    polar: Literal["quintic", "quintic_exact", "svd"] = _MATRIX["polar"]
    """How polar factors are computed. "quintic": 12 steps in bf16 on stacks of equal shapes; "quintic_exact": the
    released order of operations, slow on a CPU without bf16; "svd": exact in fp64, for tests and small models."""

    iterations: int = Field(_MATRIX["iterations"], ge=1)
    """Polar calls of an aurora direction. 2 leaves row norms within about 1 %, 3 within 0.1 %, each call costs as
    much as muon; 1 can leave rows less even than muon does and warns."""

    balance_rule: BalanceRule = _MATRIX["balance_rule"]
    """How row scales move between the polar calls. "odds" sets each row exactly, at any shape; "tyler" is the
    released rule, slow on nearly square matrices."""

    beta: float = Field(_MATRIX["beta"], gt=0, le=1)
    """Power of a "tyler" step: 0.5 is undamped, less is slower and steadier, more overshoots."""

    row_balance: Literal["polar"] = _MATRIX["row_balance"]
    """Where the row norms between the polar calls come from: "polar", a polar factor."""

    adamw: AdamWConfig = AdamWConfig()
    """AdamW for what is no matrix."""

    overrides: dict[str, options.Kind] = Field(default_factory=dict)
    """Regular expression searched in the parameter's name -> "matrix" or "adamw", against the choice by module. One
    that matches nothing is an error when the model is known."""

    @model_validator(mode="before")
    @classmethod
    def _write_out_preset(cls, data: object) -> object:
        """Puts the preset's options under those that are given."""
        if not isinstance(data, dict) or data.get("name", "aurora") != "aurora":
            return data
        preset = data.get("preset")
        if not isinstance(preset, str) or preset not in options.PRESETS:
            return data
        expanded = options.expand_preset(preset, {key: data[key] for key in _MATRIX if key in data})
        return {**{key: value for key, value in expanded.items() if key in cls.model_fields}, **data}

    @field_validator("overrides")
    @classmethod
    def _are_expressions(cls, overrides: dict[str, options.Kind]) -> dict[str, options.Kind]:
        for pattern in overrides:
            try:
                re.compile(pattern)
            except re.error as error:
                problem = {"pattern": repr(pattern), "error": str(error)}
                raise PydanticCustomError(
                    "regular_expression", "{pattern} is no regular expression ({error})", problem
                ) from error
        return overrides

    @model_validator(mode="after")
    def _warn_of_one_iteration(self) -> Self:
        if self.name == "aurora" and self.iterations == 1:
            warnings.warn(f"optimizer.{options.ONE_ITERATION}", UserWarning, stacklevel=2)
        return self

    def settings(self) -> Settings:
        """The same for `optimizers.param_groups` and `optimizers.routes`."""
        without = self.ineffective()
        return Settings(
            name=self.name,
            matrix={key: getattr(self, key) for key in _MATRIX_FIELDS if key not in without},
            adamw=self.adamw.model_dump(),
            preset=self.preset,
            overrides=self.overrides,
        )

    def ineffective(self) -> dict[str, str]:
        """What the direction, the number of iterations and the balance rule leave without a use."""
        if self.name == "adamw":
            return dict.fromkeys(("preset", *_MATRIX_FIELDS, "overrides"), "with name 'adamw' nothing is a matrix")
        without = {} if self.name == "aurora" else {"preset": "presets are of 'aurora'"}
        facts = {"direction": self.name, "iterations": self.iterations, "balance_rule": self.balance_rule}
        return without | options.ineffective(facts)
