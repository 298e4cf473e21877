"""The optimizer section of the config, with a key for each option that `optimizers` declares.

Types, defaults, ranges and descriptions of those keys come from `optimizers.options`: an option that is added there is
a key here. Only the keys that choose, route or combine are written out below.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, create_model, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

import optimizers
from optimizers import OptionError, options
from optimizers.fields import Option
from optimizers.recognise import Role
from optimizers.routing import Route, RowBlocks, Settings
from pretrain.config.base import NUMERICS, RESULT, Section
from pretrain.config.errors import ConfigError

_GROUPS = {"tuning": "further options", "parity": "only for comparisons with other code, and tests"}
"""The headings of the groups of options in the reference; those that most runs set have none."""

_MATRIX_KEYS = {name: known for name, known in options.MATRIX.items() if not known.preset_only}


def _fields(declared: Mapping[str, Option]) -> dict[str, Any]:
    """Declared options as the field definitions of a pydantic model."""
    return {name: (_type(known), _field(known)) for name, known in declared.items()}


def _type(known: Option) -> Any:
    """The type of an option, without the tensor that a learning rate may also be, and with the class of its key."""
    found = reduce(or_, (member for member in known.members if member is not Tensor))
    return Annotated[found, NUMERICS] if known.numerics else found


def _field(known: Option) -> FieldInfo:
    bounds: dict[str, float] = {}
    if known.is_number:
        bounds["gt" if known.above else "ge"] = known.low
        if known.high != float("inf"):
            bounds["le" if known.closed else "lt"] = known.high
    description = f"{known.doc} Unit: {known.unit}." if known.unit else known.doc
    extra = {"group": _GROUPS[known.group]} if known.group in _GROUPS else None
    field: FieldInfo = Field(known.default, description=description, json_schema_extra=extra, **bounds)  # type: ignore[call-overload]
    return field


class _Chosen(Section):
    """The keys that come before those of the matrix options."""

    key_class = RESULT

    name: options.OptimizerName = "aurora"
    """Direction of the matrices: all 2-D weights except embeddings and the output head. "aurora": orthogonal with rows
    of equal norm. "riemannian_aurora": the same, nearer to the gradient, at several times the cost. "muon": orthogonal.
    "normuon": muon with each row divided by its running size. "u_normuon": muon with rows of equal norm, no longer
    orthogonal. "adamw": no matrix optimizer; `adamw` trains every parameter."""

    preset: options.PresetName | None = None
    """"released": the arithmetic of the released Aurora code, for comparisons with it (slow: true bf16, one matrix at a
    time). Options that are set alongside it win. It does not set the learning rate (the released one is 0.05)."""


if TYPE_CHECKING:

    class _AdamWFields(Section):
        def __getattr__(self, name: str) -> Any: ...

    class _MatrixFields(_Chosen):
        def __getattr__(self, name: str) -> Any: ...

else:
    _AdamWFields = create_model("_AdamWFields", __base__=Section, **_fields(options.ADAMW))
    _MatrixFields = create_model("_MatrixFields", __base__=_Chosen, **_fields(_MATRIX_KEYS))


class AdamWConfig(_AdamWFields):
    """AdamW for embeddings, the output head, norm gains and biases, or for everything under name "adamw"."""

    key_class = RESULT

    embedding_lr: float | None = Field(None, ge=0)
    """Peak learning rate of the input embedding, tied or not; null: `lr`."""

    head_lr: float | None = Field(None, ge=0)
    """Peak learning rate of an output head that is not tied; null: `lr`."""

    vector_lr: float | None = Field(None, ge=0)
    """Peak learning rate of norm gains, biases and everything else that is not 2-D; null: `lr`."""

    @field_validator("betas", mode="before")
    @classmethod
    def _betas_from_list(cls, betas: object) -> object:
        return tuple(betas) if isinstance(betas, list) else betas

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if options.ADAMW["betas"].problem(betas):
            raise ValueError(f"expected {options.ADAMW['betas'].expected}")
        return betas

    def lrs(self) -> dict[Role, float]:
        """The rates that differ from `lr`, by the role of a parameter."""
        given = {"embedding": self.embedding_lr, "head": self.head_lr, "vector": self.vector_lr}
        return {role: lr for role, lr in given.items() if lr is not None}  # type: ignore[misc]


class OptimizerConfig(_MatrixFields):
    """Which direction the matrices take, with which options, and AdamW for the other parameters.

    A preset is written out into the options that it stands for.
    """

    row_blocks: dict[str, RowBlocks] = Field(default_factory=dict)
    """Regular expression that is searched in the parameter's name -> number of equal row blocks, or the rows of each:
    every block gets a direction of its own. [2048, 512, 512] for a fused q/k/v; 32 for the heads of a q_proj."""

    heads: int = Field(0, ge=0)
    """Every so many attention heads get a direction of their own, in the weights of queries, keys and values; 0: a
    weight is one matrix. `row_blocks` of a weight wins."""

    adamw: AdamWConfig = AdamWConfig()
    """AdamW for everything that is not a matrix."""

    overrides: dict[str, options.Kind] = Field(default_factory=dict)
    """Regular expression that is searched in the parameter's name -> "matrix" or "adamw", against the choice by module.
    One that matches nothing is an error once the model is known."""

    @model_validator(mode="before")
    @classmethod
    def _write_out_preset(cls, data: object) -> object:
        """Puts the preset's options under those that are given."""
        if not isinstance(data, dict) or data.get("name", "aurora") != "aurora":
            return data
        preset = data.get("preset")
        if not isinstance(preset, str) or preset not in options.PRESETS:
            return data
        expanded = options.expand_preset(preset, {key: data[key] for key in options.DEFAULTS["matrix"] if key in data})
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
                    "regular_expression", "{pattern} is not a regular expression ({error})", problem
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
            matrix={key: getattr(self, key) for key in _MATRIX_KEYS if key not in without},
            adamw={key: getattr(self.adamw, key) for key in options.ADAMW},
            adamw_lrs=self.adamw.lrs(),
            preset=self.preset,
            overrides=self.overrides,
            row_blocks=self.row_blocks,
            heads=self.heads,
        )

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The groups of a model's parameters for `optimizers.Aurora`.

        Raises:
            ConfigError: the settings do not fit the model.
        """
        with _option_errors():
            return optimizers.param_groups(model, self.settings())

    def routes(self, model: nn.Module) -> list[Route]:
        """The routing table of a model's parameters.

        Raises:
            ConfigError: the settings do not fit the model.
        """
        with _option_errors():
            return optimizers.routes(model, self.settings())

    def ineffective(self) -> dict[str, str]:
        """The keys that have no effect with this direction and these other keys."""
        if self.name == "adamw":
            keys = ("preset", *_MATRIX_KEYS, "overrides", "row_blocks", "heads")
            return dict.fromkeys(keys, "with name 'adamw' nothing is a matrix")
        without = {} if self.name == "aurora" else {"preset": "presets are for 'aurora'"}
        own = {key: getattr(self, key) for key in _MATRIX_KEYS}
        return without | options.ineffective({"direction": self.name, **own})


@contextmanager
def _option_errors() -> Iterator[None]:
    """Turns an error of the options into one of the config."""
    try:
        yield
    except OptionError as error:
        key = f"optimizer.{error.option}" if error.option else "optimizer"
        raise ConfigError([f"{key}: {error}"]) from error
