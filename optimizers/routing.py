"""Which parameter gets which optimizer, and why.

Modules decide, not names: input embeddings, the output head (tied or not), biases, norm gains and everything that is
not 2-D go to AdamW; every other 2-D weight is a matrix. A regular expression can override this.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn

from . import options
from .directions import Form, form, lr_scale, treats
from .fields import OptionError, did_you_mean

Role = Literal["hidden", "embedding", "head", "vector"]
"""What a parameter is in its model: input embedding (also as a tied head), output head, not 2-D, or anything else."""

RowBlocks = int | list[int]
"""The number of equal blocks of rows that a weight is split into, or the rows of each."""

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)

KEYS = {"override": "overrides", "row_blocks": "row_blocks"}
"""Where an expression was given, by what it is called in a message."""


@dataclass(frozen=True)
class Settings:
    """What `param_groups` needs to know besides the model."""

    name: options.OptimizerName = "aurora"
    """Direction of the matrices; "adamw" gives every parameter to AdamW."""
    matrix: Mapping[str, Any] = field(default_factory=dict)
    """Options of the matrix group (see optimizers.options), except `direction`, which is `name`."""
    adamw: Mapping[str, Any] = field(default_factory=dict)
    """Options of the adamw groups. `weight_decay` acts on 2-D weights only, never on norm gains and biases."""
    adamw_lrs: Mapping[Role, float] = field(default_factory=dict)
    """Learning rates of adamw groups that differ from the one in `adamw`, by role."""
    preset: str | None = None
    """A preset of matrix options, under those given in `matrix`."""
    overrides: Mapping[str, options.Kind] = field(default_factory=dict)
    """Regular expression that is searched in the parameter's name -> "matrix" or "adamw"."""
    row_blocks: Mapping[str, RowBlocks] = field(default_factory=dict)
    """Regular expression that is searched in the parameter's name -> blocks of rows that get their own directions."""


@dataclass(frozen=True)
class Route:
    """One row of the routing table."""

    name: str
    shape: tuple[int, ...]
    """The shape of the parameter or, if it is split, of a block of its rows; `blocks` says how many there are."""
    form: Form | Literal["none"]
    """Tall (more rows than columns), wide, square, or none if it is not 2-D."""
    optimizer: Literal["matrix", "adamw", "frozen"]
    direction: options.OptimizerName | Literal["none"]
    """The direction that is applied: most directions leave some shapes to muon."""
    lr_scale: float | None
    """Factor on the learning rate of a matrix; None for other parameters."""
    why: str
    role: Role = "hidden"
    blocks: int = 1


def routes(model: nn.Module, settings: Settings) -> list[Route]:
    """The routing table in the model's order: one row per parameter, or per shape of its blocks. A tied parameter has
    its first name.

    Only shapes are read, so the model may be on the meta device.

    Raises:
        OptionError: bad settings; an override or row_blocks that is not a regular expression, matches nothing,
            contradicts another or makes a matrix of a parameter that is not 2-D; a matrix optimizer without a matrix,
            or with a flattened one.
    """
    matrix = _matrix_options(settings)
    reasons = _adamw_reasons(model)
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    rows = []
    for p, names in _names(model).items():
        if not p.requires_grad:
            rows.append(_row(names[0], tuple(p.shape), "frozen", None, "requires_grad is False"))
            continue
        role = _role(p, reasons.get(p, ""))
        kind, why = _choose(p, names, reasons.get(p), settings)
        if p in linear and p.ndim != 2 and settings.name != "adamw":
            raise OptionError(
                f"{names[0]} is the weight of a Linear but has shape {tuple(p.shape)}: it was flattened or split (by "
                "DeepSpeed, FSDP). Route the model before it is wrapped"
            )
        split = _row_blocks(p, names, kind, settings)
        shapes = [(height, *p.shape[1:]) for height in split] if split else [tuple(p.shape)]
        rows += [_row(names[0], shape, kind, matrix, why, role, count) for shape, count in Counter(shapes).items()]
    if settings.name != "adamw" and not any(row.optimizer == "matrix" for row in rows):
        raise OptionError(
            f"optimizer {settings.name!r} found no matrix among {len(rows)} parameters, so it would step nothing. Use "
            "name 'adamw' if that is intended",
            "name",
        )
    for role in settings.adamw_lrs:
        if not any(row.optimizer == "adamw" and row.role == role for row in rows):
            raise OptionError(
                f"adamw learning rate of role {role!r} has no effect: no such parameter goes to adamw",
                f"adamw.{role}_lr",
            )
    known = [name for names in _names(model).values() for name in names]
    _check_patterns("override", settings.overrides, known)
    _check_patterns("row_blocks", settings.row_blocks, known)
    return rows


def param_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """The groups for `Aurora(groups)`: one of all matrices, and an adamw group for each role.

    Empty groups and parameters without requires_grad are left out. Each group has `params`, `param_names`, `kind`,
    `role` ("hidden" for the matrices) and all its options that have an effect; `row_blocks` too if the settings split
    any of its parameters. Vectors have no weight decay.

    Raises:
        OptionError: as `routes`, or no parameter is trainable.
    """
    parameters = {names[0]: p for p, names in _names(model).items()}
    matrix, adamw = _matrix_options(settings), options.complete("adamw", settings.adamw)
    members: dict[tuple[options.Kind, Role], dict[str, None]] = {("matrix", "hidden"): {}}
    members |= {("adamw", role): {} for role in ("embedding", "head", "hidden", "vector")}
    for row in routes(model, settings):
        if row.optimizer != "frozen":
            # A split parameter has a row for each shape of its blocks, hence a dict; all matrices are in one group.
            role = "hidden" if row.optimizer == "matrix" else row.role
            members[row.optimizer, role][row.name] = None
    groups: list[dict[str, Any]] = []
    for (kind, role), names in members.items():
        given = dict(matrix or {}) if kind == "matrix" else {**adamw, "lr": settings.adamw_lrs.get(role, adamw["lr"])}
        if kind == "adamw" and role == "vector":
            given["weight_decay"] = 0.0
        if names:
            listed = list(names)
            params = [parameters[name] for name in listed]
            groups.append({"params": params, "param_names": listed, "kind": kind, "role": role, **given})
    if settings.row_blocks and groups and groups[0]["kind"] == "matrix":
        named = _names(model)
        groups[0]["row_blocks"] = [_row_blocks(p, named[p], "matrix", settings) for p in groups[0]["params"]]
    if not groups:
        raise OptionError("the model has no parameter that requires a gradient")
    return groups


def _matrix_options(settings: Settings) -> dict[str, Any] | None:
    """The options of the matrix group that have an effect; None if everything goes to AdamW."""
    known = get_args(options.OptimizerName)
    if settings.name not in known:
        hint = did_you_mean(settings.name, known)
        raise OptionError(f"optimizer name is {settings.name!r}: expected one of {', '.join(known)}{hint}", "name")
    if settings.name == "adamw":
        given = [
            *settings.matrix,
            *(["preset"] if settings.preset else []),
            *(["overrides"] if settings.overrides else []),
            *(["row_blocks"] if settings.row_blocks else []),
        ]
        if given:
            raise OptionError(f"these options have no effect with optimizer 'adamw': {', '.join(given)}")
        return None
    full = options.complete("matrix", {"direction": settings.name, **settings.matrix}, preset=settings.preset)
    without = options.ineffective(full)
    return {key: value for key, value in full.items() if key not in without}


def _names(model: nn.Module) -> dict[Tensor, list[str]]:
    """All names of every parameter in the model's order; a tied parameter has several."""
    names: dict[Tensor, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return names


def _adamw_reasons(model: nn.Module) -> dict[Tensor, str]:
    """Why parameters do not belong to the matrix optimizer, for those that do not."""
    reasons: dict[Tensor, list[str]] = {}

    def add(p: object, reason: str) -> None:
        if isinstance(p, Tensor) and reason not in reasons.setdefault(p, []):
            reasons[p].append(reason)

    for module in model.modules():
        if isinstance(module, _EMBEDDINGS):
            add(module.weight, "embedding")
        if isinstance(module, _NORMS):
            add(module.weight, "norm gain")
        add(module._parameters.get("bias"), "bias")
        add(_weight_of(module, "get_input_embeddings"), "embedding")
        add(_weight_of(module, "get_output_embeddings"), "output head")
    return {
        p: "embedding, tied to the output head" if why == ["embedding", "output head"] else ", ".join(why)
        for p, why in reasons.items()
    }


def _role(p: Tensor, reason: str) -> Role:
    if p.ndim != 2:
        return "vector"
    return "embedding" if reason.startswith("embedding") else "head" if "output head" in reason else "hidden"


def _weight_of(module: nn.Module, getter: str) -> Tensor | None:
    """The weight of the layer that a method of transformers models returns, if there is one."""
    get = getattr(module, getter, None)
    if get is None:
        return None
    try:
        layer = get()
    except (NotImplementedError, AttributeError):
        # The base classes of transformers raise these for models without such a layer.
        return None
    return getattr(layer, "weight", None)


def _choose(p: Tensor, names: list[str], reason: str | None, settings: Settings) -> tuple[options.Kind, str]:
    if settings.name == "adamw":
        return "adamw", "everything by adamw"
    wanted = {kind: pattern for pattern, kind in settings.overrides.items() if _matches(pattern, names)}
    if len(wanted) > 1:
        raise OptionError(
            f"overrides contradict each other for {names[0]}: {', '.join(map(repr, wanted.values()))}", "overrides"
        )
    for kind, pattern in wanted.items():
        if kind == "matrix" and p.ndim != 2:
            raise OptionError(
                f"override {pattern!r} makes a matrix of {names[0]}, whose shape is {tuple(p.shape)}: expected 2-D",
                "overrides",
            )
        return kind, f"override {pattern!r}"
    if reason is not None:
        return "adamw", reason
    if p.ndim != 2:
        return "adamw", "not 2-D"
    return "matrix", "2-D weight"


def _matches(pattern: str, names: list[str], what: str = "override") -> bool:
    try:
        return any(re.search(pattern, name) for name in names)
    except re.error as error:
        raise OptionError(f"{what} {pattern!r} is not a regular expression: {error}", KEYS[what]) from error


def _row_blocks(p: Tensor, names: list[str], kind: options.Kind, settings: Settings) -> tuple[int, ...] | None:
    """The rows of the blocks of a parameter, None if it is not split."""
    wanted = {
        pattern: split for pattern, split in settings.row_blocks.items() if _matches(pattern, names, "row_blocks")
    }
    if not wanted or settings.name == "adamw":
        return None
    if len(wanted) > 1:
        raise OptionError(
            f"row_blocks contradict each other for {names[0]}: {', '.join(map(repr, wanted))}", "row_blocks"
        )
    ((pattern, split),) = wanted.items()
    if kind != "matrix" or p.ndim != 2:
        raise OptionError(
            f"row_blocks {pattern!r} splits {names[0]}, which does not belong to the matrix optimizer", "row_blocks"
        )
    rows = len(p)
    heights = split
    if isinstance(split, int):
        heights = [rows // split] * split if split > 0 and rows % split == 0 else []
    if not isinstance(heights, Sequence) or sum(heights) != rows or any(height < 1 for height in heights):
        raise OptionError(
            f"row_blocks {pattern!r} splits {names[0]} into {split}: expected parts of its {rows} rows", "row_blocks"
        )
    return tuple(heights)


def _check_patterns(what: str, by_pattern: Mapping[str, object], names: list[str]) -> None:
    for pattern, given in by_pattern.items():
        if what == "override" and given not in options.DEFAULTS:
            raise OptionError(
                f"override {pattern!r} is {given!r}: expected one of {', '.join(options.DEFAULTS)}", "overrides"
            )
        if not _matches(pattern, names, what):
            raise OptionError(f"{what} {pattern!r} matches no parameter name; names look like {names[0]!r}", KEYS[what])


def _row(
    name: str,
    shape: tuple[int, ...],
    optimizer: Literal["matrix", "adamw", "frozen"],
    matrix: Mapping[str, Any] | None,
    why: str,
    role: Role = "hidden",
    blocks: int = 1,
) -> Route:
    shape_form = form(*shape) if len(shape) == 2 else "none"
    direction: options.OptimizerName | Literal["none"] = "none" if optimizer == "frozen" else "adamw"
    scale = None
    if optimizer == "matrix":
        assert matrix is not None, "only a matrix optimizer routes to itself"
        direction = matrix["direction"] if treats(matrix, *shape) else "muon"
        scale = lr_scale(matrix["lr_scale"], *shape)
    return Route(name, shape, shape_form, optimizer, direction, scale, why, role, blocks)
