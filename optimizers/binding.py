"""What the optimizer is given: tensors, groups without a kind, and parameters that wrappers replace.

Wrappers take an optimizer class and call it with `model.parameters()` or with groups that say nothing about matrices
(ZeroRedundancyOptimizer, Hugging Face's Trainer), or exchange the parameters of an optimizer that exists (Accelerate,
DeepSpeed). What can be stepped then, is; what cannot, is an error and never a step that does nothing.
"""

import gc
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import options
from .adamw import AdamwTensor
from .directions.base import LOG_ROW_SCALE
from .dtensors import is_dtensor, placed, refuse_flat
from .fields import OptionError
from .matrices import param_names
from .routing import UNSURE, Route

Work = Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]]
"""The groups of an optimizer, each with those of its parameters that have a gradient."""


def listed(params: Any) -> Any:
    """Parameters as a list; a set as it is, so that torch can refuse it."""
    if isinstance(params, Tensor):
        return [params]
    return params if isinstance(params, set | list) else list(params)


def same(first: object, second: object) -> bool:
    """Whether two values of an option are one. The values of tensors are not read."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return first is second
    return first == second


def fixed(value: Any) -> Any:
    """A value that changes no more when a tensor is changed in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def with_kinds(params: Any) -> tuple[Any, options.GroupKind]:
    """Parameters or groups as a list, and the kind of the groups that do not say theirs.

    "matrix" if all their tensors are 2-D, otherwise "mixed". A warning lists the matrices.

    Raises:
        OptionError: tensors, or groups without a kind, and no matrix among them.
    """
    if isinstance(params, Tensor):
        return params, "matrix"
    given = list(params)
    if any(isinstance(entry, dict) for entry in given):
        given = [_with_list(g) if isinstance(g, dict) else g for g in given]
        without = [g for g in given if isinstance(g, dict) and "kind" not in g]
        tensors = [entry for g in without for entry in _entries(g.get("params", ()))]
    else:
        without = []
        tensors = _entries(given)
    partitioned = is_partitioned() and bool(without)
    matrices = [(name, p) for name, p in tensors if _is_matrix(p)]
    if not partitioned and all(p.ndim == 2 for _, p in tensors):
        if tensors:
            _warn_of_matrices(tensors)
        return given, "matrix"
    if not matrices and not partitioned:
        name, p = next((name, p) for name, p in tensors if p.ndim != 2)
        raise OptionError(
            f"no matrix among {len(tensors)} parameters, the first of which is {name or 'a tensor'} of shape "
            f"{tuple(p.shape)}: expected 2-D ones. If they were flattened or split (by DeepSpeed or FSDP), directions "
            "cannot be found from the pieces; groups of kind 'adamw' are stepped by AdamW"
        )
    if matrices:
        _warn_of_matrices(matrices)
    return given, "mixed"


def torch_defaults(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of the first group with matrices, or else of the first group, for wrappers that read `defaults`.

    Without `betas` if there is a `momentum`: the schedules that cycle one of the two look here for which.
    """
    first = next((g for g in groups if g["kind"] != "adamw"), groups[0])
    known = options.DEFAULTS["adamw" if first["kind"] == "adamw" else "matrix"]
    return {key: first.get(key, default) for key, default in known.items()}


def warn_of_unsure(rows: Sequence[Route]) -> None:
    """Warn of parameters that go to AdamW because it is not sure what they are."""
    unsure = [f"{row.name} ({row.why.removeprefix(UNSURE)})" for row in rows if row.is_unsure]
    if unsure:
        where = {row.optimizer for row in rows if row.is_unsure}
        warnings.warn(
            f"it is unclear whether these weights are matrices: {', '.join(unsure)}. They go to "
            f"{' and '.join(sorted(where))}; overrides in routing=Settings(...) change that",
            UserWarning,
            stacklevel=4,
        )


def warn_of_thawed(groups: Sequence[Mapping[str, Any]], rows: Sequence[Route], model: nn.Module | None) -> None:
    """Warn of parameters of a model that were frozen when its groups were made, and have a gradient now."""
    frozen = {row.name for row in rows if row.optimizer == "frozen"}
    if model is None or not frozen:
        return
    held = {p for group in groups for p in group["params"]}
    thawed = [name for name, p in model.named_parameters() if name in frozen and p.grad is not None and p not in held]
    if thawed:
        warnings.warn(
            f"{len(thawed)} parameters have a gradient and are in no group, {thawed[0]} for example: they were frozen "
            "when the optimizer was made, and are not stepped. add_param_group takes them",
            UserWarning,
            stacklevel=5,
        )


def is_matrix(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the matrix optimizer steps this parameter, or shard, of a group."""
    return _is_matrix(p) if group["kind"] == "mixed" else group["kind"] == "matrix"


def adamw_parts(
    tensors: Sequence[AdamwTensor], group: Mapping[str, Any]
) -> list[tuple[Sequence[AdamwTensor], Mapping[str, Any]]]:
    """The AdamW steps of a group: tensors, and the options of `adamw_step` for them.

    A schedule that cycles `momentum` sets the first of `betas` too. In a mixed group the learning rate is a share of
    the matrices', and vectors do not decay.
    """
    own = dict(group)
    is_mixed = group["kind"] == "mixed"
    if "momentum" in group and (not is_mixed or "base_momentum" in group):
        own["betas"] = (group["momentum"], group["betas"][1])
    if not is_mixed:
        return [(tensors, own)]
    own["lr"] = group["lr"] * group["adamw_lr_ratio"]
    vectors = [tensor for tensor in tensors if tensor.weight.ndim < 2]
    others = [tensor for tensor in tensors if tensor.weight.ndim >= 2]
    parts = [(others, own), (vectors, {**own, "weight_decay": 0.0})]
    return [(part, chosen) for part, chosen in parts if part]


def refuse_reordered(group: Mapping[str, Any]) -> None:
    """Refuse lists by position in a group whose parameters torch's ZeroRedundancyOptimizer has sorted and shared out.

    Raises:
        OptionError: it has row_blocks or views.
    """
    given = [key for key in ("row_blocks", "views") if any(group.get(key) or ())]
    if given:
        raise OptionError(
            f"a group has {' and '.join(given)}, with an entry for each parameter, and ZeroRedundancyOptimizer sorts "
            "the parameters but not these: they would be those of other parameters. Make groups without them "
            "(Settings(split_fused=False), no heads, row_blocks or Conv1D), or use DistributedDataParallel"
        )


def refuse_flattened(work: Work, ndims: Sequence[Sequence[int]]) -> None:
    """Refuse a group of matrices whose parameters have other dimensions than when it was made, such as flat ones: a
    mixed group would give pieces of matrices to AdamW.

    Raises:
        OptionError: it was flattened or split.
    """
    for (group, _), before in zip(work, ndims, strict=False):
        found = [p.ndim for p in group["params"]]
        is_mixed = group["kind"] == "mixed"
        if group["kind"] != "adamw" and (found != list(before) if is_mixed else not set(before).issuperset(found)):
            names = zip(param_names(group), group["params"], strict=True)
            now = ", ".join(f"{name} of shape {tuple(p.shape)}" for name, p in list(names)[:3])
            raise OptionError(
                f"the {len(before)} parameters of a group have other dimensions than when it was made, now {now}: if "
                "they were flattened or split (by DeepSpeed or FSDP), directions cannot be found from the pieces. "
                "DeepSpeed leaves parameters whole at stage 0; optimizers.sharded, which `aurora train` uses, reads "
                "the shards of the stages 1 to 3"
            )


def refuse_stale(work: Work, model: nn.Module | None, names: Collection[str], *, is_first: bool) -> None:
    """Refuse parameters without a gradient that were replaced: by another of that name in the model, or by fully_shard
    or FullyShardedDataParallel (FSDP1). At the first step a name that is gone from the model, and no gradient at all,
    are a warning.

    Args:
        work: of a step.
        model: that the groups were made of, if it is known and still alive.
        names: of its parameters; others were added to the optimizer later.
        is_first: whether it is the first step that may have gradients.

    Raises:
        OptionError: naming the first.
    """
    if not is_first and all(p.grad is not None or not p.requires_grad for group, _ in work for p in group["params"]):
        return
    is_idle = not any(params for _, params in work)
    cure = "Make the optimizer after the model is wrapped (fully_shard, for example), or wrap both together"
    if model is not None:
        current = dict(model.named_parameters(remove_duplicate=False))
        held = set(current.values())
        named = [
            (name, p)
            for group, _ in work
            for name, p in zip(group.get("param_names", ()), group["params"], strict=False)
            if name in names and p not in held and not _is_unsharded(p, current.get(name))
        ]
        # If a wrapper steps copies of the parameters (master weights), those without a gradient are copies too.
        has_copies = any(p.grad is not None for _, p in named)
        gone = [] if has_copies else [name for name, _ in named]
        lost = [name for name in gone if name in current]
        if lost:
            raise OptionError(
                f"{len(lost)} parameters have no gradient and are no longer those of the model, {lost[0]} for "
                f"example: they were replaced after the optimizer was made, so that it would step nothing. {cure}"
            )
        for name in current if gone else ():
            refuse_flat(name, current[name])
        if gone and is_first:
            warnings.warn(
                f"{len(gone)} parameters have no gradient and are no longer in the model, {gone[0]} for example: they "
                "are not stepped",
                UserWarning,
                stacklevel=5,
            )
    idle = [p for group, _ in work for p in group["params"] if p.grad is None and p.requires_grad]
    # DTensors are what fully_shard has made: without gradients they may wait for more micro-batches.
    idle = [p for p in idle if not is_dtensor(p)] if is_idle or is_first else []
    if idle and _has_fully_sharded() and ((is_idle and is_first) or (missing := _unheld(idle))):
        what = "no parameter has a" if is_idle and is_first else f"{missing} parameters in no module have no"
        raise OptionError(
            f"{what} gradient{' at the first step' * is_first}, and a model in this process was sharded by fully_shard "
            f"or FullyShardedDataParallel, which replace parameters: the optimizer would not step them. {cure}"
        )
    if not (is_idle and is_first):
        return
    warnings.warn(
        "no parameter has a gradient at the first step, so it does nothing. If a wrapper has replaced the parameters "
        "of the model, make the optimizer after it",
        UserWarning,
        stacklevel=5,
    )


def loaded_states(
    groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
    state_shapes: Callable[[Tensor, Mapping[str, Any]], Mapping[str, torch.Size]],
) -> dict[Tensor, dict[str, Tensor]]:
    """The state of each parameter of an optimizer's groups in a state_dict.

    Args:
        groups: of the optimizer.
        state_dict: as torch saves it.
        state_shapes: the slots of a parameter in a group of these options.

    Raises:
        ValueError: groups of other kinds, or a state of another shape than its parameter.
    """
    saved_groups = state_dict["param_groups"]
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        if saved.get("kind") != group["kind"]:
            raise ValueError(
                f"group {index} of the loaded state is of kind {saved.get('kind')!r}, "
                f"this optimizer's of kind {group['kind']!r}: the state is another optimizer's"
            )
    saved_ids = [index for saved in saved_groups for index in saved["params"]]
    # The loaded options win, so they say which state belongs to a parameter.
    own = [
        (p, state_shapes(p, full))
        for group, saved in zip(groups, saved_groups, strict=False)
        for facts in [{"views": group["views"]} if "views" in group else {}]
        for full in [{**options.DEFAULTS[group["kind"]], **saved, **facts, "params": group["params"]}]
        for p in group["params"]
    ]
    return {
        p: loaded_state(p, shapes, state_dict["state"][index])
        for (p, shapes), index in zip(own, saved_ids, strict=False)
        if index in state_dict["state"]
    }


def loaded_state(p: Tensor, shapes: Mapping[str, torch.Size], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """A copy of the saved state of a parameter, in fp32 on its device.

    The row scales of aurora may be missing, in a state of a run that did not carry them: they begin at D = 1.

    Raises:
        ValueError: other tensors than `shapes` has, of other shapes, or DTensors where the parameter is none.
    """
    # Some frameworks keep a step count as a plain number.
    saved = {key: torch.as_tensor(value, dtype=torch.float32) for key, value in given.items()}
    if set(saved) | ({LOG_ROW_SCALE} & set(shapes)) != set(shapes):
        raise ValueError(f"the loaded state of a parameter has {sorted(saved)}: expected {sorted(shapes)}")
    for key, value in saved.items():
        if value.shape != shapes[key]:
            raise ValueError(
                f"the loaded {key} has shape {tuple(value.shape)}, its parameter {tuple(shapes[key])}: "
                "the parameters are in another order or of another model"
            )
    own = {key: placed(p, key, value) for key, value in saved.items()}
    return {key: value.to(p.device, torch.float32, copy=True) for key, value in own.items()}


def _is_matrix(p: Tensor) -> bool:
    return p.ndim == 2 and min(p.shape) > 1


def _entries(params: Any) -> list[tuple[str, Tensor]]:
    """Tensors with their names, "" for none. What is not a tensor is left for torch to refuse, and quantised weights,
    which have no gradient, say nothing of the others."""
    pairs = [entry if isinstance(entry, tuple) else ("", entry) for entry in params]
    named = [(str(pair[0]), pair[1]) for pair in pairs if len(pair) == 2 and isinstance(pair[1], Tensor)]
    return [(name, p) for name, p in named if p.requires_grad or p.is_floating_point()]


def _with_list(group: dict[str, Any]) -> dict[str, Any]:
    """A group whose parameters can be read twice; one with blocks or views is one of matrices."""
    kind = {"kind": "matrix"} if {"row_blocks", "views"} & group.keys() else {}
    return {**kind, **group, **({"params": listed(group["params"])} if "params" in group else {})}


def _warn_of_matrices(matrices: Sequence[tuple[str, Tensor]]) -> None:
    shapes = Counter(f"{name} " * bool(name) + " x ".join(map(str, p.shape)) for name, p in matrices)
    found = ", ".join(shape + (f" ({count} times)" if count > 1 else "") for shape, count in shapes.items())
    warnings.warn(
        f"these parameters are treated as matrices, since nothing but their shapes is known: {found}. Embeddings and "
        "output heads should go to AdamW, and weights stored as inputs x outputs (GPT-2's Conv1D) are transposed: "
        "Aurora(model) or optimizers.param_groups(model, ...) knows which they are. Groups of kind 'matrix' or 'adamw' "
        "are not guessed",
        UserWarning,
        stacklevel=4,
    )


def _is_unsharded(p: Tensor, current: Tensor | None) -> bool:
    """Whether the model has all of this DTensor now: modules that are not resharded after their forward pass do."""
    return is_dtensor(p) and current is not None and not is_dtensor(current)


def _unheld(params: Sequence[Tensor]) -> int:
    """How many parameters no module of this process holds. Looks at all objects."""
    modules = [known for known in gc.get_objects() if issubclass(type(known), nn.Module)]
    held = {p for module in modules for p in module.parameters(recurse=False)}
    return sum(p not in held for p in params)


def is_partitioned() -> bool:
    """Whether the caller is torch's ZeroRedundancyOptimizer, which gives each rank some of the parameters: perhaps
    none that is a matrix, though the groups have to be alike on all ranks."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _has_fully_sharded() -> bool:
    """Whether a module of this process was sharded by fully_shard, or wrapped by FullyShardedDataParallel. Looks at all
    objects: only before an error."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not torch.distributed.is_available():
        return False

    def found() -> bool:
        kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
        return any(issubclass(type(known), kinds) for known in gc.get_objects())

    if not found():
        return False
    gc.collect()  # a model that is no longer used says nothing about this one, but may be in a reference cycle
    return found()
