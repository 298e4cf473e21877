"""Which parameter gets which optimizer, and why.

Modules decide, not names (see optimizers.recognise): input embeddings, the output head (tied or not), routers, biases,
norm gains and everything that is not 2-D go to AdamW; every other 2-D weight is a matrix. Settings can make matrices of
convolutions and stacks of experts too, and say what happens to weights that the modules leave unsure. A regular
expression can override all this.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import options
from .blocks import View, blocks, row_shape
from .directions import Form, form, lr_scale, treats
from .dtensors import refuse_flat
from .fields import OptionError, did_you_mean
from .recognise import Role, Seen, examine

RowBlocks = int | list[int]
"""The number of equal blocks of rows that a weight is split into, or the rows of each."""

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
    """Options of the adamw groups. `weight_decay` acts on weights, never on norm gains and biases."""
    adamw_lrs: Mapping[Role, float] = field(default_factory=dict)
    """Learning rates of adamw groups that differ from the one in `adamw`, by role."""
    preset: str | None = None
    """A preset of matrix options, under those given in `matrix`."""
    overrides: Mapping[str, options.Kind] = field(default_factory=dict)
    """Regular expression that is searched in the parameter's name -> "matrix" or "adamw"."""
    row_blocks: Mapping[str, RowBlocks] = field(default_factory=dict)
    """Regular expression that is searched in the parameter's name -> blocks of rows that get their own directions."""
    unsure: options.Kind | None = None
    """Where 2-D weights go that may be matrices or not, such as bare parameters and the last Linear of a model.
    "matrix" warns and lists them. None: "matrix" in `param_groups` and `routes`, "adamw" in `Aurora(model)`."""
    split_fused: bool | None = None
    """Give each part of a fused weight a direction of its own, if the parts are known: q, k and v of an attention, gate
    and up, the gates of an LSTM. None: False in `param_groups` and `routes`, True in `Aurora(model)`."""
    heads: int = 0
    """Give every so many attention heads of queries, keys and values a direction of their own; 0: none. Head sizes are
    those that the attention states, as in transformers; the table shows which weights are split."""
    conv: options.Kind = "adamw"
    """Where the weights of convolutions go; "matrix": each is one of outputs x (inputs * kernel)."""
    experts: options.Kind = "adamw"
    """Where bare 3-D weights go; "matrix": each is a stack of experts, [experts, outputs, inputs]."""


UNSURE = "unsure: "
"""How the reason of a parameter begins that was not recognised for certain."""


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

    @property
    def is_unsure(self) -> bool:
        """Whether the modules leave open what the parameter is."""
        return self.why.startswith(UNSURE)


def routes(model: nn.Module, settings: Settings) -> list[Route]:
    """The routing table in the model's order: one row per parameter, or per shape of its blocks. A tied parameter has
    its first name.

    Only shapes are read, so the model may be on the meta device.

    Raises:
        OptionError: bad settings; an override or row_blocks that is not a regular expression, matches nothing,
            contradicts another or makes a matrix of a parameter that is none; a matrix optimizer without a matrix, or
            with a flattened one.
    """
    matrix = _matrix_options(settings)
    for p, names in _names(model).items():
        if is_lazy(p):
            raise OptionError(f"{names[0]} has no shape yet: call the model once before the optimizer is made")
    seen = examine(model)
    rows = []
    for p, names in _names(model).items():
        refuse_flat(names[0], p)
        if not p.requires_grad:
            rows.append(row(names[0], tuple(p.shape), "frozen", None, "requires_grad is False"))
            continue
        found = seen[p]
        kind, why = _choose(p, names, found, settings)
        if kind == "adamw":
            rows.append(row(names[0], tuple(p.shape), kind, matrix, why, found.role))
            _row_blocks(p, names, kind, found, settings)  # refuses those of a parameter that is not a matrix
            continue
        view, split = _view(p, found), _row_blocks(p, names, kind, found, settings)
        shapes = Counter(block.shape for block in blocks(p, split, view))
        rows += [row(names[0], shape, kind, matrix, why, found.role, count) for shape, count in shapes.items()]
    if not rows:
        raise OptionError("the model has no parameter yet: make the optimizer after its layers")
    if settings.name != "adamw" and not any(row.optimizer == "matrix" for row in rows):
        unsure = [row.name for row in rows if row.is_unsure]
        optional = sorted({found.optional for found in seen.values() if found.optional is not None})
        frozen = sum(row.optimizer == "frozen" for row in rows)
        raise OptionError(
            f"optimizer {settings.name!r} found no matrix among {len(rows)} parameters"
            + (f", {frozen} of them frozen" if frozen else "")
            + ", so it would step nothing. "
            + (f"Of {', '.join(unsure)} it is not sure; an override makes them matrices. " if unsure else "")
            + (f"Settings has an option for these: {', '.join(optional)}. " if optional else "")
            + "Use name 'adamw' if that is intended",
            "name",
        )
    _refuse_idle(seen, settings)
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


def _refuse_idle(seen: Mapping[Tensor, Seen], settings: Settings) -> None:
    """Refuse options that ask for something which the model does not have."""
    trained = [found for p, found in seen.items() if p.requires_grad]
    missing = {
        "heads": settings.heads > 0 and not any(found.head_size for found in trained),
        "conv": settings.conv == "matrix" and not any(found.optional == "conv" for found in trained),
        "experts": settings.experts == "matrix" and not any(found.optional == "experts" for found in trained),
    }
    reasons = {
        "heads": "no trained weight of queries, keys or values is known whose attention states the size of its heads",
        "conv": "the model has no trained convolution without groups",
        "experts": "the model has no trained stack of experts that is stored as experts x outputs x inputs",
    }
    for key in (key for key, is_missing in missing.items() if is_missing):
        raise OptionError(f"{key} {getattr(settings, key)!r} has no effect: {reasons[key]}", key)


def param_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """The groups for `Aurora(groups)`: one of all matrices, and an adamw group for each role.

    Empty groups and parameters without requires_grad are left out. Each group has `params`, `param_names`, `kind`,
    `role` ("hidden" for the matrices) and all its options that have an effect; `row_blocks` too if any of its
    parameters is split, and `views` if any is not stored as outputs x inputs. Vectors have no weight decay.

    Warns of matrices that the modules leave unsure.

    Raises:
        OptionError: as `routes`, or no parameter is trainable.
    """
    groups = model_groups(model, settings)
    unsure = [f"{row.name}, {row.why.removeprefix(UNSURE)}" for row in routes(model, settings) if row.is_unsure]
    if settings.unsure in (None, "matrix") and unsure:
        warnings.warn(
            f"{len(unsure)} weights are treated as matrices, though it is unclear whether they are: "
            f"{'; '.join(unsure)}. "
            'Settings(unsure="adamw") gives such weights to AdamW, an override decides for each',
            UserWarning,
            stacklevel=2,
        )
    return groups


def model_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """`param_groups` without its warning."""
    parameters = {names[0]: p for p, names in _names(model).items()}
    matrix, adamw = _matrix_options(settings), options.complete("adamw", settings.adamw)
    members: dict[tuple[options.Kind, Role], dict[str, None]] = {("matrix", "hidden"): {}}
    members |= {("adamw", role): {} for role in ("embedding", "head", "hidden", "tensor", "vector")}
    for row in routes(model, settings):
        if row.optimizer != "frozen":
            # A split parameter has a row for each shape of its blocks, hence a dict; all matrices are in one group.
            role = "hidden" if row.optimizer == "matrix" else row.role
            members[row.optimizer, role][row.name] = None
    groups: list[dict[str, Any]] = []
    for (kind, role), names in members.items():
        # More-dimensional weights have the rate of vectors, as "everything else that is not 2-D".
        rate = settings.adamw_lrs.get("vector" if role == "tensor" else role, adamw["lr"])
        given = dict(matrix or {}) if kind == "matrix" else {**adamw, "lr": rate}
        if kind == "adamw" and role == "vector":
            given["weight_decay"] = 0.0
        if names:
            listed = list(names)
            params = [parameters[name] for name in listed]
            groups.append({"params": params, "param_names": listed, "kind": kind, "role": role, **given})
    if groups and groups[0]["kind"] == "matrix":
        groups[0] |= _layout(model, groups[0]["params"], settings)
    if not groups:
        raise OptionError("the model has no parameter that requires a gradient")
    return groups


def _matrix_options(settings: Settings) -> dict[str, Any] | None:
    """The options of the matrix group that have an effect; None if everything goes to AdamW."""
    known = get_args(options.OptimizerName)
    if settings.name not in known:
        hint = did_you_mean(settings.name, known)
        raise OptionError(f"optimizer name is {settings.name!r}: expected one of {', '.join(known)}{hint}", "name")
    for key in ("unsure", "conv", "experts"):
        given = getattr(settings, key)
        if given not in get_args(options.Kind) and not (key == "unsure" and given is None):
            expected = ", ".join(get_args(options.Kind))
            raise OptionError(
                f"{key} is {given!r}: expected one of {expected}{did_you_mean(given, ('matrix', 'adamw'))}"
            )
    if not isinstance(settings.heads, int) or isinstance(settings.heads, bool) or settings.heads < 0:
        raise OptionError(f"heads is {settings.heads!r}: expected a whole number of at least 0")
    if settings.name == "adamw":
        plain = Settings()
        keys = ("preset", "overrides", "row_blocks", "unsure", "split_fused", "heads", "conv", "experts")
        idle = [*settings.matrix, *(key for key in keys if getattr(settings, key) != getattr(plain, key))]
        if idle:
            raise OptionError(f"these options have no effect with optimizer 'adamw': {', '.join(idle)}")
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


def _layout(model: nn.Module, params: Sequence[Tensor], settings: Settings) -> dict[str, Any]:
    """`row_blocks` and `views` of a matrix group, if any of its parameters needs them."""
    names, seen = _names(model), examine(model)
    split = [_row_blocks(p, names[p], "matrix", seen[p], settings) for p in params]
    found = [_view(p, seen[p]) for p in params]
    needed = {"row_blocks": split} if settings.row_blocks or any(split) else {}
    return needed | ({"views": found} if any(found) else {})


def _view(p: Tensor, seen: Seen) -> View | None:
    """How the matrices of a parameter lie in it, if it goes to the matrix optimizer."""
    return seen.view if p.ndim > 2 or seen.view == "in_out" else None


def _choose(p: Tensor, names: list[str], seen: Seen, settings: Settings) -> tuple[options.Kind, str]:
    if settings.name == "adamw":
        return "adamw", "everything by adamw"
    if seen.is_flattened:
        raise OptionError(
            f"{names[0]} is the weight of a Linear but has shape {tuple(p.shape)}: it was flattened or split (by "
            "DeepSpeed, FSDP). Route the model before it is wrapped"
        )
    wanted = {kind: pattern for pattern, kind in settings.overrides.items() if _matches(pattern, names)}
    if len(wanted) > 1:
        raise OptionError(
            f"overrides contradict each other for {names[0]}: {', '.join(map(repr, wanted.values()))}", "overrides"
        )
    for kind, pattern in wanted.items():
        if kind == "matrix" and p.ndim != 2 and seen.optional is None:
            raise OptionError(
                f"override {pattern!r} makes a matrix of {names[0]}, whose shape is {tuple(p.shape)}: expected 2-D",
                "overrides",
            )
        return kind, f"override {pattern!r}"
    if seen.optional is not None and getattr(settings, seen.optional) == "matrix":
        return "matrix", "convolution" if seen.optional == "conv" else f"stack of {len(p)} experts"
    if seen.is_sure:
        return "matrix" if seen.is_matrix else "adamw", seen.why
    return settings.unsure or "matrix", UNSURE + seen.why


def _matches(pattern: str, names: list[str], what: str = "override") -> bool:
    try:
        return any(re.search(pattern, name) for name in names)
    except re.error as error:
        raise OptionError(f"{what} {pattern!r} is not a regular expression: {error}", KEYS[what]) from error


def _row_blocks(
    p: Tensor, names: list[str], kind: options.Kind, seen: Seen, settings: Settings
) -> tuple[int, ...] | None:
    """The rows of the blocks of a parameter, None if it is not split."""
    wanted = {
        pattern: split for pattern, split in settings.row_blocks.items() if _matches(pattern, names, "row_blocks")
    }
    if settings.name == "adamw":
        return None
    if not wanted:
        return _known_parts(p, seen, settings) if kind == "matrix" else None
    if len(wanted) > 1:
        raise OptionError(
            f"row_blocks contradict each other for {names[0]}: {', '.join(map(repr, wanted))}", "row_blocks"
        )
    ((pattern, split),) = wanted.items()
    if kind != "matrix":
        raise OptionError(
            f"row_blocks {pattern!r} splits {names[0]}, which does not belong to the matrix optimizer", "row_blocks"
        )
    rows = row_shape(p.shape, _view(p, seen))[-1]
    heights = split
    if isinstance(split, int):
        heights = [rows // split] * split if split > 0 and rows % split == 0 else []
    if not isinstance(heights, Sequence) or sum(heights) != rows or any(height < 1 for height in heights):
        raise OptionError(
            f"row_blocks {pattern!r} splits {names[0]} into {split}: expected parts of its {rows} rows", "row_blocks"
        )
    return tuple(heights)


def _known_parts(p: Tensor, seen: Seen, settings: Settings) -> tuple[int, ...] | None:
    """The rows of the parts of a weight that the settings split without naming it."""
    if not settings.heads or seen.head_size is None:
        return seen.fused if settings.split_fused else None
    parts = seen.fused or (row_shape(p.shape, _view(p, seen))[-1],)
    height = settings.heads * seen.head_size
    return tuple(min(height, part - start) for part in parts for start in range(0, part, height))


def _check_patterns(what: str, by_pattern: Mapping[str, object], names: list[str]) -> None:
    for pattern, given in by_pattern.items():
        if what == "override" and given not in get_args(options.Kind):
            raise OptionError(
                f"override {pattern!r} is {given!r}: expected one of {', '.join(get_args(options.Kind))}", "overrides"
            )
        if not _matches(pattern, names, what):
            raise OptionError(f"{what} {pattern!r} matches no parameter name; names look like {names[0]!r}", KEYS[what])


def row(
    name: str,
    shape: tuple[int, ...],
    optimizer: Literal["matrix", "adamw", "frozen"],
    matrix: Mapping[str, Any] | None,
    why: str,
    role: Role = "hidden",
    blocks: int = 1,
) -> Route:
    """A row of the table; `matrix` has the options of matrices."""
    shape_form = form(*shape) if len(shape) == 2 else "none"
    direction: options.OptimizerName | Literal["none"] = "none" if optimizer == "frozen" else "adamw"
    scale = None
    if optimizer == "matrix":
        assert matrix is not None, "only a matrix optimizer routes to itself"
        direction = matrix["direction"] if treats(matrix, *shape) else "muon"
        scale = lr_scale(matrix["lr_scale"], *shape)
    return Route(name, shape, shape_form, optimizer, direction, scale, why, role, blocks)


def model_settings(routing: Settings | None, given: Mapping[str, Any], preset: str | None) -> Settings:
    """The settings of `Aurora(model, ...)`: what is not recognised goes to AdamW, and fused weights are split.

    Args:
        routing: other settings.
        given: options by name; they act in all groups that know them. `lr` is that of the matrices, AdamW's is a share.
        preset: of matrix options.
    """
    base = routing if routing is not None else Settings()
    known = {kind: {k: v for k, v in given.items() if k in options.DEFAULTS[kind]} for kind in ("matrix", "adamw")}
    name = known["matrix"].pop("direction", base.name)
    if name != "adamw":
        unsure: options.Kind = base.unsure if base.unsure is not None else "adamw"
        base = replace(base, unsure=unsure, split_fused=base.split_fused is not False)
    ratio = given.get("adamw_lr_ratio", options.SHARED["adamw_lr_ratio"].default)
    if problem := options.SHARED["adamw_lr_ratio"].problem(ratio):
        raise OptionError(problem)
    if "lr" in {*given, *base.matrix} or "adamw_lr_ratio" in given:
        lr = given.get("lr", base.matrix.get("lr", options.MATRIX["lr"].default))
        if problem := options.MATRIX["lr"].problem(lr):
            raise OptionError(problem)
        known["adamw"]["lr"] = base.adamw.get("lr", lr * ratio)
    matrix = {} if name == "adamw" else {**base.matrix, **known["matrix"]}
    return replace(base, name=name, matrix=matrix, adamw={**base.adamw, **known["adamw"]}, preset=preset or base.preset)
