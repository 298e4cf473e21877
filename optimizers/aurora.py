"""The optimizer: a torch Optimizer that holds the state and leaves the mathematics to pure functions."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from optimizers import directions, options
from optimizers.adamw import AdamwTensor, adamw_step
from optimizers.blocks import Block, blocks, buckets, row_blocks
from optimizers.speedrun import uw_floor
from optimizers.update import all_finite, blend, commit_, updated

if TYPE_CHECKING:
    from optimizers.sharded.matrices import ShardedMatrices


class Aurora(Optimizer):
    """Aurora, Muon and their relatives for matrices, AdamW for everything else.

    Args:
        params: tensors, (name, tensor) pairs or groups. A group is a dict with `params`, `kind` ("matrix", the
            default, or "adamw"), any of the options below, and for matrices `row_blocks` (see optimizers.blocks);
            bare 2-D tensors are one matrix group. Which parameter belongs where is said by `optimizers.param_groups`.
        preset: "released" takes the matrix options of the released code (see optimizers.options).
        **defaults: options for the groups that do not say themselves, under the same names.

    Options of a matrix group, with their defaults:
        lr 0.02, weight_decay 0: the decay is decoupled, by the base lr. cautious False: decay only entries whose step
            does not point away from zero.
        momentum 0.95, nesterov True.
        direction "aurora": or "riemannian_aurora", "muon", "normuon", "u_normuon" (see optimizers.directions).
        lr_scale "aspect": or "rms", "spectral", by the shape of the matrix.
        polar "gram", polar_dtype "auto": how polar factors are found (see optimizers.polar).
        of both auroras: scope "tall" ("all", "wide").
        of aurora: iterations 2, tolerance None, balance_rule "odds" ("tyler", with beta 0.5), row_balance "auto"
            ("polar", "leverage", "gram"), eps_mode "relative" ("absolute").
        of riemannian_aurora: riemannian "exact" ("released"), outer_steps 3.
        of normuon: normuon_target "graft" ("unit"), beta2 0.95; of u_normuon: running_norms False, beta2 with it.
        contra 0, uw_floor 0: see optimizers.speedrun; 0 is off.
    Options of an adamw group: lr 3e-3, weight_decay 0, betas (0.9, 0.95), eps 1e-8, fused False.
    `lr` may be a float or a scalar tensor, and may be changed between steps.

    One step of a matrix weight w with gradient g: b <- mu b + (1 - mu) g; u = g + mu (b - g), or b without
    Nesterov; w <- w - lr weight_decay w; w <- w - lr s(m, n) d(u). The state is fp32 for every dtype of
    weight: `momentum` and `step` for matrices, with `second_moment` (one value a row) for the directions that average
    row norms; `exp_avg`, `exp_avg_sq` and `step` for adamw. `step` counts the steps of that tensor. Gradients are not
    changed and share no memory with the state.

    A NaN or an infinity in any gradient leaves every weight, state and counter as it is, without waiting for
    the device; `last_step_finite` tells.

    Equal shapes are stacked to buckets of at most `optimizers.blocks.BUCKET_ELEMENTS` elements, and a step needs
    memory for one bucket at a time.

    Where an engine cuts its flattened parameters between processes (DeepSpeed's ZeRO), `bind` says how: the groups then
    hold flat shards, and a `step` may come for one group at a time.

    Attributes:
        last_step_finite: scalar bool tensor, whether the last step was taken.
        last_step_fallbacks: scalar int64 tensor, how often the odds rule fell back to tyler in the last step.
        last_step_retries: scalar int64 tensor, how often a Cholesky factorisation failed in the last step.
        gradient_observer: called in every step with each parameter or shard that has a gradient, before it is stepped,
            and with the scalar bool tensor that says whether it will be; None, the default, is no call.
        direction_observer: called with every block of a matrix and the direction that is applied to it, [m, n] fp32
            without scale and rate, to be read during the call; None, the default, is no call. `sharded` has its own.
        sharded: what `bind` was given; None where every parameter is whole.

    Raises:
        ValueError: an unknown option, a value out of range, an option without effect in the combination; a matrix
            group with a tensor that is not 2-D; a complex parameter; a sparse or complex gradient.
    """

    last_step_finite: Tensor
    last_step_fallbacks: Tensor
    last_step_retries: Tensor
    gradient_observer: Callable[[Tensor, Tensor], None] | None = None
    direction_observer: Callable[[Block, Tensor], None] | None = None
    sharded: "ShardedMatrices | None" = None
    _paused = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        *,
        preset: str | None = None,
        **defaults: Any,
    ) -> None:
        self._preset = preset
        self._options = defaults if lr is None else {"lr": lr, **defaults}
        self._used: set[str] = set()
        self._idle = {"preset": "no matrix group leaves any of its options open"}
        for key in self._options:
            if not any(key in known for known in options.DEFAULTS.values()):
                names = {name for known in options.DEFAULTS.values() for name in known}
                raise ValueError(f"unknown option {key!r} of Aurora{options.did_you_mean(key, names)}")
        super().__init__(params, {})
        given = [*self._options, *(() if preset is None else ("preset",))]
        unsaid = "no group of its kind leaves it open"
        idle = {key: self._idle.get(key, unsaid) for key in given if key not in self._used}
        if idle:
            problems = "; ".join(f"{key} has no effect: {why}" for key, why in idle.items())
            raise ValueError(f"bad options of Aurora: {problems}")
        self.reset_report()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, empty in (("_preset", None), ("_options", {}), ("_used", set()), ("_idle", {})):
            self.__dict__.setdefault(name, empty)
        for group in self.param_groups:
            for key, default in options.DEFAULTS[group["kind"]].items():
                group.setdefault(key, default)
        self.reset_report()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, completed by the options given to the constructor. The dict itself is not changed."""
        kind = options.group_kind(param_group)
        own = {key: value for key, value in param_group.items() if key not in options.FOREIGN_KEYS}
        inherited = {
            key: value for key, value in self._options.items() if key in options.DEFAULTS[kind] and key not in own
        }
        preset = self._preset if kind == "matrix" else None
        full = options.complete(kind, own, inherited=inherited, preset=preset)
        if kind == "matrix" and full["direction"] == "aurora" and full["iterations"] == 1:
            warnings.warn(options.ONE_ITERATION, UserWarning, stacklevel=2)
        self._mark_used(kind, own, inherited, full)
        super().add_param_group({**param_group, "kind": kind, **full})
        try:
            _check_params(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _mark_used(self, kind: str, own: dict[str, Any], inherited: dict[str, Any], full: dict[str, Any]) -> None:
        """Notes which of the constructor's options act in this group, and why the others do not."""
        without = options.ineffective(full) if kind == "matrix" else {}
        self._used.update(key for key in inherited if key not in without)
        self._idle.update((key, without[key]) for key in inherited if key in without)
        given = {*own, *inherited}
        if kind == "matrix" and self._preset is not None and not given.issuperset(options.PRESETS[self._preset]):
            self._used.add("preset")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient; the loss of `closure` if one is given.

        Raises:
            ValueError: a sparse gradient, or a matrix that is no longer 2-D.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._paused:
            return loss
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        grads = [_dense_grad(p) for _, params in work for p in params]
        finite = all_finite(grads, self._device())
        if self.sharded is None:
            self.reset_report()
        else:
            finite = self.sharded.agree(finite)
        if self.gradient_observer is not None:
            for p in (p for _, params in work for p in params):
                self.gradient_observer(p, finite)
        counts = torch.zeros(2, dtype=torch.int64, device=finite.device)
        for group, params in work:
            if group["kind"] == "adamw":
                self._adamw_step(params, group, finite)
            elif self.sharded is None:
                _check_params(group)
                counts += self._matrix_steps(params, group, finite)
            else:
                counts += self._shard_steps(params, group, finite)
        self.last_step_finite &= finite
        fallbacks, retries = torch.where(finite, counts, 0).unbind()
        self.last_step_fallbacks += fallbacks
        self.last_step_retries += retries
        return loss

    def bind(self, sharded: "ShardedMatrices") -> None:
        """From now on the groups hold flat shards, of which `sharded` knows the matrices."""
        self.sharded = sharded
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
        """Begin a new step's report. Over shards its caller does that, since one step may be several calls."""
        device = self._device()
        self.last_step_finite = torch.ones((), dtype=torch.bool, device=device)
        self.last_step_fallbacks = torch.zeros((), dtype=torch.int64, device=device)
        self.last_step_retries = torch.zeros((), dtype=torch.int64, device=device)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Takes over a state and the options of its groups; tensors are copied and stay fp32.

        (torch alone would round the momentum of a bf16 weight to bf16.)

        Raises:
            ValueError: groups that differ in number, size or kind, or a state of another shape than its weight; an
                optimizer of shards, whose state is not this process's alone.
        """
        if self.sharded is not None:
            raise ValueError("a state_dict holds one process's shards: load a checkpoint of all of them instead")
        saved_groups = state_dict["param_groups"]
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=False)):
            if saved.get("kind") != group["kind"]:
                raise ValueError(
                    f"group {index} of the loaded state is of kind {saved.get('kind')!r}, "
                    f"this optimizer's of kind {group['kind']!r}: the state is another optimizer's"
                )
        saved_ids = [index for saved in saved_groups for index in saved["params"]]
        # The loaded options win, so they say which state belongs to a parameter.
        own = [
            (p, _state_shapes(p, entry, full))
            for group, saved in zip(self.param_groups, saved_groups, strict=False)
            for full in [{**options.DEFAULTS[group["kind"]], **saved, "params": group["params"]}]
            for p, entry in zip(group["params"], row_blocks(full), strict=True)
        ]
        states = {
            p: _loaded_state(p, shapes, state_dict["state"][index])
            for (p, shapes), index in zip(own, saved_ids, strict=False)
            if index in state_dict["state"]
        }
        super().load_state_dict(state_dict)
        self.state.update(states)

    def _shard_steps(self, shards: Sequence[Tensor], group: dict[str, Any], finite: Tensor) -> Tensor:
        """Steps a shard of the matrix group; returns the fallbacks and retries of all processes."""
        assert self.sharded is not None, "the caller looks"
        counts = torch.zeros(2, dtype=torch.int64, device=self.sharded.device)
        for flat in shards:
            state = self.state_of(flat, group)
            state["step"] += finite.to(flat.device)
            counts += self.sharded.step(flat, state, group, finite)
        return counts

    def _matrix_steps(self, params: Sequence[Tensor], group: dict[str, Any], finite: Tensor) -> Tensor:
        """Steps matrices; returns the fallbacks and retries that their directions took, an int64 tensor [2]."""
        entries = dict(zip(group["params"], row_blocks(group), strict=True))
        for p in params:
            self.state_of(p, group, entries[p])["step"] += finite.to(p.device)
        counts = torch.zeros(2, dtype=torch.int64, device=finite.device)
        for bucket in buckets(block for p in params for block in blocks(p, entries[p])):
            counts += self._bucket_step(bucket, group, finite).to(finite.device)
        return counts

    def _bucket_step(self, bucket: Sequence[Block], group: dict[str, Any], finite: Tensor) -> Tensor:
        """Steps equally shaped blocks, stacked."""
        (m, n), device = bucket[0].shape, bucket[0].param.device
        finite = finite.to(device)
        states = [{key: block.of(value) for key, value in self._rows_of(block.param).items()} for block in bucket]
        u = torch.empty(len(bucket), m, n, dtype=torch.float32, device=device)
        for block, state, row in zip(bucket, states, u, strict=True):
            self._blend(block, state["momentum"], row, group, finite)
        second_moment = None
        if directions.keeps_second_moment(group, m, n):
            second_moment = torch.stack([state["second_moment"] for state in states])
        found = directions.from_options(u, group, second_moment)
        if found.second_moment is not None:
            for state, values in zip(states, found.second_moment, strict=True):
                commit_(state["second_moment"], values, finite)
        self._apply(bucket, found.d, group, finite)
        return torch.stack([found.fallbacks.sum(), found.retries.sum()])

    def _blend(self, block: Block, momentum: Tensor, u: Tensor, group: dict[str, Any], finite: Tensor) -> None:
        """Moves the momentum of a block and fills in u; zeros where the step is void, so that no backend sees a NaN."""
        grad = block.of(_dense_grad(block.param))
        moved, blended = blend(grad, momentum, group["momentum"], group["nesterov"])
        commit_(momentum, moved, finite)
        u.copy_(torch.where(finite, blended, 0.0))

    def _apply(self, bucket: Sequence[Block], d: Tensor, group: dict[str, Any], finite: Tensor) -> None:
        """Updates the weights of equally shaped blocks by their directions [k, m, n]."""
        scale = directions.lr_scale(group["lr_scale"], *bucket[0].shape)
        decay = {key: group[key] for key in ("lr", "weight_decay", "cautious")}
        for block, matrix in zip(bucket, d, strict=True):
            if self.direction_observer is not None:
                self.direction_observer(block, matrix)
            weight = block.of(block.param)
            step = directions.scaled(matrix, scale, polar=group["polar"])
            if group["uw_floor"]:
                step = uw_floor(step, weight.float(), group["uw_floor"])
            commit_(weight, updated(weight, step, **decay), finite)

    def _adamw_step(self, params: Sequence[Tensor], group: dict[str, Any], finite: Tensor) -> None:
        tensors = [AdamwTensor(weight=p, grad=_dense_grad(p), **self.state_of(p, group)) for p in params]
        adamw_step(tensors, group, finite)

    def state_of(self, p: Tensor, group: Mapping[str, Any], entry: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        """The state of a parameter or shard of a group, zeros before its first step; `entry` is its row_blocks."""
        state: dict[str, Tensor] = self.state[p]
        is_shard = self.sharded is not None and group["kind"] == "matrix"
        shapes = self.sharded.state_shapes(group) if is_shard else _state_shapes(p, entry, group)  # type: ignore[union-attr]
        for key, shape in shapes.items():
            if key not in state:
                state[key] = torch.zeros(shape, dtype=torch.float32, device=p.device)
        return state

    def _rows_of(self, p: Tensor) -> dict[str, Tensor]:
        """What of a parameter's state has its rows."""
        return {key: value for key, value in self.state[p].items() if key != "step"}

    def _device(self) -> torch.device:
        """Where the flag of a step lives: with the first parameter, though a wrapper may have taken them all."""
        if self.sharded is not None:
            return self.sharded.device
        params = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in params), torch.device("cpu"))


def _state_shapes(p: Tensor, entry: tuple[int, ...] | None, group: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The state tensors of a parameter and their shapes."""
    step, whole = torch.Size(), p.shape
    if group["kind"] == "adamw":
        return {"exp_avg": whole, "exp_avg_sq": whole, "step": step}
    shapes = {"momentum": whole, "step": step}
    if any(directions.keeps_second_moment(group, *block.shape) for block in blocks(p, entry)):
        shapes["second_moment"] = whole[:1]
    return shapes


def _check_params(group: dict[str, Any]) -> None:
    """Refuses what a group of this kind cannot step: complex or integer tensors, matrices that are none."""
    names = group.get("param_names", [f"parameter {i}" for i in range(len(group["params"]))])
    for name, p in zip(names, group["params"], strict=True):
        if not p.is_floating_point():
            raise ValueError(f"{name} is of dtype {p.dtype}: expected a real floating point tensor")
        if group["kind"] == "matrix" and p.ndim != 2:
            raise ValueError(
                f"{name} of shape {tuple(p.shape)} is in a matrix group: expected 2-D. If it was flattened "
                "or split (by DeepSpeed, FSDP), its direction cannot be found from the pieces; if it is no "
                "matrix, put it into a group of kind 'adamw' (optimizers.param_groups does)"
            )
    if group["kind"] == "adamw" and "row_blocks" in group:
        raise ValueError("row_blocks in a group of kind 'adamw': only matrices have blocks")
    if group["kind"] == "matrix":
        row_blocks(group)


def _dense_grad(p: Tensor) -> Tensor:
    grad = p.grad
    assert grad is not None, "callers choose parameters that have a gradient"
    if grad.layout != torch.strided:
        raise ValueError(f"a gradient of layout {grad.layout}: expected a dense one (sparse=False in nn.Embedding)")
    return grad


def _loaded_state(p: Tensor, shapes: Mapping[str, torch.Size], saved: dict[str, Tensor]) -> dict[str, Tensor]:
    if set(saved) != set(shapes):
        raise ValueError(f"the loaded state of a parameter has {sorted(saved)}: expected {sorted(shapes)}")
    for key, value in saved.items():
        if value.shape != shapes[key]:
            raise ValueError(
                f"the loaded {key} has shape {tuple(value.shape)}, its parameter {tuple(shapes[key])}: "
                "the parameters are in another order or of another model"
            )
    return {key: value.to(p.device, torch.float32, copy=True) for key, value in saved.items()}
