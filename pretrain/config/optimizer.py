"""The optimizer section of the config."""

import re
import warnings
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from optimizers import options
from optimizers.directions import RowBalance, Scope, Target
from optimizers.precision import PolarDtype
from optimizers.riemannian import Variant
from optimizers.routing import Role, RowBlocks, Settings
from optimizers.row_balance import BalanceRule
from pretrain.config.base import NUMERICS, RESULT, Section

_MATRIX = options.DEFAULTS["matrix"]
_ADAMW = options.DEFAULTS["adamw"]
# The matrix options that are fields; eps_mode comes with a preset only, direction is `name`.
_MATRIX_FIELDS = tuple(key for key in _MATRIX if key not in ("direction", "eps_mode"))


class AdamWConfig(Section):
    """AdamW for embeddings, the output head, norm gains and biases, or for everything under name "adamw"."""

    key_class = RESULT

    lr: float = Field(_ADAMW["lr"], ge=0)
    """Peak learning rate, multiplied by the schedule. About ten times smaller than the matrix lr; too large and the
    embeddings blow up within the first hundred steps."""

    embedding_lr: float | None = Field(None, ge=0)
    """Peak learning rate of the input embedding, tied or not; null: `lr`."""

    head_lr: float | None = Field(None, ge=0)
    """Peak learning rate of an output head of its own; null: `lr`."""

    vector_lr: float | None = Field(None, ge=0)
    """Peak learning rate of norm gains, biases and all else that is not 2-D; null: `lr`."""

    betas: tuple[float, float] = _ADAMW["betas"]
    """Averaging factors of the gradient and of its square, each in [0, 1). A second one above 0.99 averages over
    more steps than a short run has."""

    eps: float = Field(_ADAMW["eps"], ge=0)
    """Added to the root of the second moment; large values turn the update towards plain momentum."""

    weight_decay: float = Field(_ADAMW["weight_decay"], ge=0)
    """Decoupled decay a step, times the learning rate. On 2-D weights only: norm gains and biases never decay."""

    fused: Annotated[bool, NUMERICS] = _ADAMW["fused"]
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

    def lrs(self) -> dict[Role, float]:
        """The rates that differ from `lr`, by the role of a parameter."""
        given = {"embedding": self.embedding_lr, "head": self.head_lr, "vector": self.vector_lr}
        return {role: lr for role, lr in given.items() if lr is not None}  # type: ignore[misc]


class OptimizerConfig(Section):
    """Which direction the matrices take, with which options, and AdamW for the other parameters.

    A preset is written out into the options that it stands for.
    """

    key_class = RESULT

    name: options.OptimizerName = "aurora"
    """Direction of the matrices: all 2-D weights but embeddings and the output head. "aurora": orthogonal with
    rows of equal norm; "riemannian_aurora": the same, nearer to the gradient, at several times the cost; "muon":
    orthogonal; "normuon": muon with each row divided by its running size; "u_normuon": muon with rows of equal norm, no
    longer orthogonal; "adamw": no matrix optimizer, every parameter by `adamw`."""

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

    polar: Literal["gram", "cans", "polar_express", "quintic", "quintic_exact", "svd"] = _MATRIX["polar"]
    """How polar factors are computed. "gram": Polar Express on the small Gram matrix, the fastest; "polar_express":
    the same on the matrix itself; "cans": to the precision of fp32, three times slower; "quintic": the released 12
    steps in bf16; "quintic_exact": in the released order of operations, slow on a CPU without bf16; "svd": exact in
    fp64, for tests and small models."""

    polar_dtype: Annotated[PolarDtype, NUMERICS] = _MATRIX["polar_dtype"]
    """Precision of the products of "gram" and "polar_express": "auto" is fp16 on a GPU, bf16 on a CPU with AMX,
    else fp32. At condition numbers up to 2,000 bf16 turns directions by 1 to 4 %, fp16 by under 1 %, fp32 by under
    0.01 %."""

    scope: Scope = _MATRIX["scope"]
    """Which forms the auroras balance: "tall" (gate and up projections), "wide" (down projections) or "all". The
    others, and always the square ones, go by muon."""

    iterations: int = Field(_MATRIX["iterations"], ge=1)
    """Polar calls of an aurora direction. 2 leaves row norms within about 1 %, 3 within 0.1 %; what each costs says
    `row_balance`. 1 can leave rows less even than muon does and warns."""

    tolerance: float | None = Field(_MATRIX["tolerance"], gt=0, lt=1)
    """Stop balancing a matrix once all its rows are within this share of their norm, after `iterations` calls at the
    latest: 0.01 is 1 %. null: always `iterations`."""

    balance_rule: BalanceRule = _MATRIX["balance_rule"]
    """How row scales move between the polar calls. "odds" sets each row exactly, at any shape; "tyler" is the
    released rule, slow on nearly square matrices."""

    beta: float = Field(_MATRIX["beta"], gt=0, le=1)
    """Power of a "tyler" step: 0.5 is undamped, less is slower and steadier, more overshoots."""

    row_balance: RowBalance = _MATRIX["row_balance"]
    """Where the row norms between the polar calls come from: "polar", a polar factor, as costly as muon; "leverage", a
    Cholesky factor, about a quarter of that; "gram", products alone, for a GPU. "auto": "leverage" on a CPU, else
    "gram"."""

    riemannian: Variant = _MATRIX["riemannian"]
    """Of "riemannian_aurora": "exact", or "released", whose ascent vanishes for gradients of real size."""

    outer_steps: int = Field(_MATRIX["outer_steps"], ge=1)
    """Ascent steps of "riemannian_aurora", each with two polar calls."""

    normuon_target: Target = _MATRIX["normuon_target"]
    """Size of a normuon direction: "graft", that of muon's; "unit", every row 1, on a tall m x n matrix a step
    sqrt(m/n) times larger."""

    running_norms: bool = _MATRIX["running_norms"]
    """Let u_normuon divide by running instead of present row norms."""

    beta2: float = Field(_MATRIX["beta2"], ge=0, lt=1)
    """Share of the running row norms that a step of normuon, or of u_normuon with `running_norms`, keeps."""

    contra: float = Field(_MATRIX["contra"], ge=0, lt=1)
    """Contra-Muon: subtract this share of the normalised momentum from the direction; 0.2 in the 3,175-step speedrun
    recipe, 0 is off."""

    uw_floor: float = Field(_MATRIX["uw_floor"], ge=0)
    """Enlarge a step whose Frobenius norm is below this share of its weight's, before the learning rate; 0.35 in the
    speedrun recipe, 0 is off."""

    cautious: bool = _MATRIX["cautious"]
    """Decay only the entries of a matrix whose step does not point away from zero."""

    row_blocks: dict[str, RowBlocks] = Field(default_factory=dict)
    """Regular expression searched in the parameter's name -> number of equal row blocks, or their rows: each block
    gets a direction of its own. [2048, 512, 512] for a fused q/k/v; 32 for the heads of a q_proj."""

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

    @field_validator("overrides", "row_blocks")
    @classmethod
    def _are_expressions(cls, by_name: dict[str, Any]) -> dict[str, Any]:
        for pattern in by_name:
            try:
                re.compile(pattern)
            except re.error as error:
                problem = {"pattern": repr(pattern), "error": str(error)}
                raise PydanticCustomError(
                    "regular_expression", "{pattern} is no regular expression ({error})", problem
                ) from error
        return by_name

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
            adamw={key: getattr(self.adamw, key) for key in _ADAMW},
            adamw_lrs=self.adamw.lrs(),
            preset=self.preset,
            overrides=self.overrides,
            row_blocks=self.row_blocks,
        )

    def ineffective(self) -> dict[str, str]:
        """What the direction and its other options leave without a use."""
        if self.name == "adamw":
            keys = ("preset", *_MATRIX_FIELDS, "overrides", "row_blocks")
            return dict.fromkeys(keys, "with name 'adamw' nothing is a matrix")
        without = {} if self.name == "aurora" else {"preset": "presets are of 'aurora'"}
        own = {key: getattr(self, key) for key in _MATRIX_FIELDS}
        return without | options.ineffective({"direction": self.name, **own})
