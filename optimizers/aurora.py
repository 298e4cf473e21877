"""The optimizer: a torch Optimizer that holds the state and leaves the mathematics to pure functions."""

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from . import binding, dtensors, hooks, options
from .adamw import AdamwTensor, adamw_step
from .blocks import singly
from .dtensors import dense_grad, local
from .fields import OptionError, did_you_mean
from .matrices import DirectionObserver, Matrices, WholeMatrices, check_params, matrix_step
from .routing import Route, Settings, model_groups, model_settings, routes
from .sharded.divided import divided
from .sharded.rows import DTensorMatrices
from .table import format_table, table_routes
from .update import all_finite

# What an optimizer has besides its options; a copy or a pickle begins with these.
_FRESH: dict[str, Any] = {
    "_preset": None,
    "_maximize": False,
    "_otherwise": "matrix",
    "_model": None,
    "_routes": None,
    "_has_begun": False,
    "_is_partitioned": False,
}


class Aurora(Optimizer):
    """Aurora, Muon and their relatives for matrices, AdamW for everything else.

    Args:
        params: a model, tensors, (name, tensor) pairs or groups. The parameters of a model are routed by what its
            modules are; `table` says where each one goes and why, and whatever is not recognised goes to AdamW. A group
            is a dict with `params`, `kind` ("matrix" or "adamw"), any of the options below, and for matrices
            `row_blocks` and `views` (see optimizers.blocks). Groups without a kind, and tensors, are matrices if all of
            them are 2-D; otherwise "mixed": those with at least two rows and columns are matrices, and AdamW steps the
            others. A warning lists the matrices by shape; it cannot know that a Conv1D's is inputs x outputs.
        lr: of the matrices. With a model, and in mixed groups, that of AdamW is `adamw_lr_ratio` times as large.
        preset: "released" takes the matrix options of the released code (see optimizers.options).
        routing: how to route a model, where the defaults do not fit: overrides, convolutions or experts as matrices.
        maximize: climb instead of descend; a group may set it as well.
        **defaults: options, under the same names, for the groups that do not set them.

    `lr` may be a float or a scalar tensor, and may be changed between steps. Each group also has `base_lr`, the rate
    that it was made with, which the optimizer does not read: a schedule sets lr = base_lr * factor. A schedule that
    cycles `momentum` (OneCycleLR, CyclicLR) sets that of the matrices and the first of AdamW's betas.

    A model is not kept alive. If a wrapper replaces the parameters of the groups, the new ones are stepped in their
    place; if it replaces those of the model only, the next step says so, or follows if that was fully_shard (FSDP2).

    One step of a matrix weight w with gradient g: b <- mu b + (1 - mu) g; u = g + mu (b - g), or b without Nesterov;
    w <- w - lr weight_decay w; w <- w - lr s(m, n) d(u). The state is fp32 whatever the dtype of the weight: `momentum`
    and `step` for matrices, with one value per row where row norms are averaged (`second_moment`) or row scales carried
    (`log_row_scale`); `exp_avg`, `exp_avg_sq` and `step` for adamw. `step` counts the steps of that tensor. Gradients
    are not changed and share no memory with the state.

    A NaN or an infinity in any gradient leaves every weight, state and counter as it is, without waiting for the
    device, and so does `permitted`; `last_step_finite` tells.

    Equal shapes are stacked in buckets of at most `optimizers.blocks.BUCKET_ELEMENTS` elements, and a step needs memory
    for one bucket at a time.

    Where an engine flattens parameters and cuts them between processes (DeepSpeed's ZeRO), `bind` says how: the groups
    then hold flat shards, and one step may take a call of `step` for each group. Processes under DDP share the work.

    Attributes:
        last_step_finite: scalar bool tensor, whether the last step was taken.
        last_step_fallbacks: scalar int64 tensor, how often the odds rule fell back to tyler in the last step.
        last_step_retries: scalar int64 tensor, how often a Cholesky factorisation failed in the last step.
        permitted: scalar bool tensor, equal on all processes; while it is False, steps leave everything as it is. None,
            the default, permits every step.
        gradient_observer: called in every step with each parameter or shard that has a gradient, before it is stepped,
            and with the scalar bool tensor that says whether it will be; None, the default, for no calls.
        direction_observer: called with every direction that is found on this process, [rows, columns] fp32 without
            scale and rate, after the `optimizers.matrices.Place` that says which part of which parameter it belongs to.
            The tensor may only be read during the call. None, the default, for no calls.
        matrices: the holder of the matrix groups (see optimizers.matrices); `bind` changes it.

    Raises:
        OptionError: an unknown option, a value out of range, an option without effect in the combination; a matrix
            group with a tensor that is not 2-D; no matrix at all; a complex parameter, a matrix that is a DTensor and
            not sharded by rows, a flat parameter of FSDP1. `step` refuses sparse gradients, and parameters that are no
            longer those of the model.

    """

    last_step_finite: Tensor
    last_step_fallbacks: Tensor
    last_step_retries: Tensor
    permitted: Tensor | None = None
    gradient_observer: Callable[[Tensor, Tensor], None] | None = None
    direction_observer: DirectionObserver | None = None
    matrices: Matrices = WholeMatrices()
    _paused = False
    _preset: str | None
    _maximize: bool
    _otherwise: options.GroupKind
    _model: weakref.ref[nn.Module] | None
    _routes: list[Route] | None
    _has_begun: bool
    _is_partitioned: bool
    _used: set[str]
    _idle: dict[str, str]
    _ndims: list[list[int]]

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor | None = None,
        *,
        preset: str | None = None,
        routing: Settings | None = None,
        maximize: bool = False,
        **defaults: Any,
    ) -> None:
        self.__dict__.update(_FRESH | {"_used": set(), "_ndims": [], "_preset": preset, "_maximize": maximize})
        self._options = defaults if lr is None else {"lr": lr, **defaults}
        self._idle = {"preset": "no matrix group leaves any of its options open"}
        for key in self._options:
            if not any(key in known for known in options.DEFAULTS.values()):
                names = {name for known in options.DEFAULTS.values() for name in known}
                raise OptionError(f"unknown option {key!r} of Aurora{did_you_mean(key, names)}")
        if isinstance(params, nn.Module):
            self._route(params, routing)
        elif routing is not None:
            raise OptionError("routing has no effect: it routes a model, and there is none")
        else:
            groups, self._otherwise = binding.with_kinds(params)
            super().__init__(groups, {})
            self._refuse_idle()
        self.defaults = binding.torch_defaults(self.param_groups)
        self.reset_report()

    def _route(self, model: nn.Module, routing: Settings | None) -> None:
        """Make the groups of a model's parameters."""
        settings = model_settings(routing, self._options, self._preset)
        self._routes = routes(model, settings)
        super().__init__(model_groups(model, settings), {})
        self._model, self._otherwise = weakref.ref(model), "mixed"
        self.matrices = divided(model) or self.matrices
        binding.warn_of_unsure(self._routes)

    def _refuse_idle(self) -> None:
        """Refuse options of the constructor that act in no group."""
        given = [*self._options, *(() if self._preset is None else ("preset",))]
        unsaid = "no group of its kind leaves it open"
        idle = {key: self._idle.get(key, unsaid) for key in given if key not in self._used}
        if idle:
            problems = "; ".join(f"{key} has no effect: {why}" for key, why in idle.items())
            raise OptionError(f"bad options of Aurora: {problems}")

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: self.__dict__[name] for name in (*_FRESH, "_options", "_used", "_idle") if name in self.__dict__}
        matrices = self.matrices if isinstance(self.matrices, DTensorMatrices) else Aurora.matrices
        return {**super().__getstate__(), **kept, "_model": None, "permitted": self.permitted, "matrices": matrices}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, empty in (*_FRESH.items(), ("_options", {}), ("_used", set()), ("_idle", {})):
            self.__dict__.setdefault(name, empty)
        for group in self.param_groups:
            for key, default in options.DEFAULTS[group["kind"]].items():
                group.setdefault(key, default)
            group.setdefault("base_lr", binding.fixed(group["lr"]))
        self._ndims = [[p.ndim for p in group["params"]] for group in self.param_groups]
        self.reset_report()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, completed by the options given to the constructor. The dict itself is not changed.

        If the other groups have names and this one has not, its parameters are named by their positions.
        """
        kind = options.group_kind(param_group, self._otherwise)
        own = {key: value for key, value in param_group.items() if not options.is_foreign(key)}
        inherited = {
            key: value for key, value in self._options.items() if key in options.DEFAULTS[kind] and key not in own
        }
        if kind == "adamw" and "lr" in inherited and self._routes is not None:
            share = self._options.get("adamw_lr_ratio", options.SHARED["adamw_lr_ratio"].default)
            inherited["lr"] = inherited["lr"] * share
        preset = None if kind == "adamw" else self._preset
        full = options.complete(kind, own, inherited=inherited, preset=preset)
        if kind != "adamw" and full["direction"] == "aurora" and full["iterations"] == 1:
            warnings.warn(options.ONE_ITERATION, UserWarning, stacklevel=2)
        self._mark_used(kind, own, inherited, full)
        added = {"base_lr": binding.fixed(full["lr"]), **param_group, "kind": kind, **full}
        if added.setdefault("maximize", self._maximize) not in (True, False):
            raise OptionError(f"maximize is {added['maximize']!r}: expected true or false")
        added["params"] = binding.listed(param_group["params"])
        if not added["maximize"]:
            del added["maximize"]
        if binding.is_partitioned():
            binding.refuse_reordered(added)
            self._is_partitioned = True
            added.pop("param_names", None)
        named = any("param_names" in group for group in self.param_groups)
        if named and "param_names" not in added and not any(isinstance(p, tuple) for p in added["params"]):
            number = len(self.param_groups)
            added["param_names"] = [f"group {number} parameter {i}" for i in range(len(added["params"]))]
        known = {"param_names", *added}
        super().add_param_group(added)
        group = self.param_groups[-1]
        # torch has put its `defaults` into it, whatever its kind.
        for key in group.keys() - known:
            del group[key]
        try:
            check_params(group)
            dtensors.mesh_of(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise
        self._ndims.append([p.ndim for p in group["params"]])

    @property
    def table(self) -> str:
        """Where each parameter goes and why, one line each, as text. A parameter that was not recognised for certain is
        marked "unsure"."""
        rows: Sequence[Route] = self._routes or ()
        if self.matrices.is_whole or not rows:  # groups of shards say nothing of the weights
            rows = table_routes(self.param_groups, rows)
        return "\n".join(format_table(rows))

    def _mark_used(self, kind: str, own: dict[str, Any], inherited: dict[str, Any], full: dict[str, Any]) -> None:
        """Notes which of the constructor's options act in this group, and why the others do not."""
        without = {} if kind == "adamw" else options.ineffective(full)
        # A wrapper may put the options of the constructor into the groups as well.
        repeated = {key for key, value in self._options.items() if key in own and binding.same(own[key], value)}
        self._used.update(key for key in {*inherited, *repeated} if key not in without)
        self._idle.update((key, without[key]) for key in inherited if key in without)
        given = {*own, *inherited}
        if kind != "adamw" and self._preset is not None and not given.issuperset(options.PRESETS[self._preset]):
            self._used.add("preset")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # A compiler would unroll every polar iteration of every shape: torch.compile(optimizer.step) runs it as it is.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient; the loss of `closure` if one is given.

        Raises:
            ValueError: a sparse gradient, a matrix that is no longer 2-D, or parameters that have no gradient because
                something has replaced them in the model.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._paused:
            return loss
        work = self._work()
        grads = [dense_grad(p) for _, params in work for p in params]
        finite = all_finite(grads, self._device())
        if self.permitted is not None:
            finite &= self.permitted.to(finite.device)
        if self.matrices.is_whole:
            self.reset_report()
        finite = self.matrices.agree(finite)
        if self.gradient_observer is not None:
            for p in (p for _, params in work for p in params):
                self.gradient_observer(p, finite)
        counts = torch.zeros(2, dtype=torch.int64, device=finite.device)
        for group, params in work:
            matrices = [p for p in params if binding.is_matrix(p, group)]
            if len(matrices) < len(params):
                self._adamw_step([p for p in params if not binding.is_matrix(p, group)], group, finite)
            if group["kind"] != "adamw":
                counts += self._matrix_step(matrices, group, finite)
        self.last_step_finite &= finite
        fallbacks, retries = torch.where(finite, counts, 0).unbind()
        self.last_step_fallbacks += fallbacks
        self.last_step_retries += retries
        return loss

    def _work(self) -> binding.Work:
        """The groups, each with those of its parameters that have a gradient. What a wrapper has replaced or flattened
        since they were made is followed or refused."""
        if self.matrices.is_whole:
            self._follow()
            if not isinstance(self.matrices, DTensorMatrices) and dtensors.mesh_of(self.param_groups) is not None:
                self.bind(DTensorMatrices())
            self.matrices.prepare(self.param_groups)
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        if not self.matrices.is_whole:
            return work
        for group in self.param_groups if self._is_partitioned else ():
            group.pop("param_names", None)  # ZeroRedundancyOptimizer copies the names back, in another order
        binding.refuse_flattened(work, self._ndims)
        model, names = None if self._model is None else self._model(), {row.name for row in self._routes or ()}
        binding.warn_of_thawed(self.param_groups, self._routes or (), model)
        binding.refuse_stale(work, model, names, is_first=not self._has_begun)
        if not self._has_begun and any(params for _, params in work):
            for group in self.param_groups:
                check_params(group)
            self._has_begun = True
        return work

    def _follow(self) -> None:
        """Take over the DTensors that fully_shard has made of the model's parameters."""
        lacks = any(p.grad is None and p.requires_grad for group in self.param_groups for p in group["params"])
        if (lacks or not self._has_begun) and self._model is not None and (model := self._model()) is not None:
            dtensors.follow(self.param_groups, self.state, model)

    def bind(self, matrices: Matrices) -> None:
        """From now on the matrix group holds what `matrices` says, such as flat shards."""
        self.matrices = matrices
        self.reset_report()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which `step` does nothing: some wrappers call it once while they are set up."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def reset_report(self) -> None:
        """Begin a new step's report. Over shards the caller does that, since one step may take several calls."""
        device = self._device()
        self.last_step_finite = torch.ones((), dtype=torch.bool, device=device)
        self.last_step_fallbacks = torch.zeros((), dtype=torch.int64, device=device)
        self.last_step_retries = torch.zeros((), dtype=torch.int64, device=device)

    @hooks.around
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Takes over a state and the options of its groups; tensors are copied and stay fp32.

        (torch alone would round the momentum of a bf16 weight to bf16.)

        Raises:
            ValueError: groups that differ in number, size or kind, or a state of another shape than its weight; an
                optimizer of shards, whose state is not this process's alone.
        """
        if not self.matrices.is_whole:
            raise ValueError("a state_dict holds one process's shards: load a checkpoint of all of them instead")
        self._follow()
        states = binding.loaded_states(self.param_groups, state_dict, self._state_shapes)
        base_lrs = [group["base_lr"] for group in self.param_groups]
        # How the matrices lie in the parameters is a fact of this model, which states of older versions do not know.
        kept = [{"views": group["views"]} if "views" in group else {} for group in self.param_groups]
        saved_groups = state_dict["param_groups"]
        super().load_state_dict(state_dict)
        self.state.update(states)
        for group, facts, saved, base_lr in zip(self.param_groups, kept, saved_groups, base_lrs, strict=True):
            group.update(facts, base_lr=saved.get("base_lr", base_lr))

    def _matrix_step(self, params: Sequence[Tensor], group: Mapping[str, Any], finite: Tensor) -> Tensor:
        """Step the matrices or shards of a group; return the fallbacks and retries of their directions, int64 [2]."""
        counts = torch.zeros(2, dtype=torch.int64, device=finite.device)
        for holder, own in self.matrices.shares(params, group):
            turns = holder.turns(own, group)
            alone = dict(singly(group)) if holder.is_whole else {}
            for p in own:
                self.state_of(p, alone.get(p, group))["step"] += finite.to(p.device)
            counts += matrix_step(holder, turns, self.state, group, finite, self.direction_observer)
        return counts

    def _adamw_step(self, params: Sequence[Tensor], group: Mapping[str, Any], finite: Tensor) -> None:
        states = [{key: local(value) for key, value in self.state_of(p, group).items()} for p in params]
        tensors = [AdamwTensor(local(p), dense_grad(p), **state) for p, state in zip(params, states, strict=True)]
        for part, own in binding.adamw_parts(tensors, group):
            adamw_step(part, own, finite)

    def state_of(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter or shard of a group: zeros before its first step."""
        state: dict[str, Tensor] = self.state[p]
        for key, shape in self._state_shapes(p, group).items():
            if key not in state:
                state[key] = dtensors.zeros_for(p, shape)
        return state

    def _state_shapes(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, torch.Size]:
        if not binding.is_matrix(p, group):
            return {"exp_avg": p.shape, "exp_avg_sq": p.shape, "step": torch.Size()}
        return self.matrices.state_shapes(p, group)

    def _device(self) -> torch.device:
        """Where the flag of a step lives: with the first parameter, though a wrapper may have taken them all."""
        if self.matrices.device is not None:
            return self.matrices.device
        return next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))


if Aurora.__doc__ is not None:  # it is under python -OO
    Aurora.__doc__ += "\n".join(f"    {line}" for line in options.documentation().splitlines()) + "\n"
