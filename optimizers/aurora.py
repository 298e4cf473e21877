"""The optimizer: a torch Optimizer that holds the state and leaves the mathematics to pure functions."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from optimizers import directions, options
from optimizers.adamw import AdamwTensor, adamw_step
from optimizers.update import all_finite, blend, commit_, updated

BUCKET_ELEMENTS = 2**24
"""Most elements that equal shapes are stacked to (one matrix may be larger alone). The directions of a bucket
need a few fp32 tensors of this size at a time (64 MiB each), however many weights a model has."""

_STATE_KEYS = {"matrix": ("momentum", "step"), "adamw": ("exp_avg", "exp_avg_sq", "step")}


class Aurora(Optimizer):
    """Aurora or Muon for matrices, AdamW for everything else.

    Args:
        params: tensors, (name, tensor) pairs or groups. A group is a dict with `params`, `kind` ("matrix", the
            default, or "adamw") and any of the options below; bare 2-D tensors are one matrix group. Which
            parameter belongs where is said by `optimizers.param_groups`.
        preset: "released" takes the matrix options of the released code (see optimizers.options).
        **defaults: options for the groups that do not say themselves, under the same names.

    Options of a matrix group: `lr` 0.02, `weight_decay` 0 (decoupled, by the base lr), `direction` "aurora" or
    "muon", `momentum` 0.95, `nesterov` True, `lr_scale` "aspect" ("rms", "spectral"), `polar` "quintic" ("svd",
    "quintic_exact"), and for aurora `scope` "tall" ("all", "wide"), `iterations` 2, `balance_rule` "odds"
    ("tyler", with `beta` 0.5), `row_balance` "polar", `eps_mode` "relative" ("absolute"). See
    `optimizers.directions`. Options of an adamw group: `lr` 3e-3, `weight_decay` 0, `betas` (0.9, 0.95), `eps`
    1e-8, `fused` False. `lr` may be a float or a scalar tensor, and may be changed between steps.

    One step of a matrix weight w with gradient g: b <- mu b + (1 - mu) g; u = g + mu (b - g), or b without
    Nesterov; w <- w - lr weight_decay w; w <- w - lr s(m, n) d(u). The state is fp32 for every dtype of
    weight: `momentum` and `step` for matrices, `exp_avg`, `exp_avg_sq` and `step` for adamw. `step` counts the
    steps of that tensor. Gradients are not changed and share no memory with the state.

    A NaN or an infinity in any gradient leaves every weight, state and counter as it is, without waiting for
    the device; `last_step_finite` tells.

    Attributes:
        last_step_finite: scalar bool tensor, whether the last step was taken.
        last_step_fallbacks: scalar int64 tensor, how often the odds rule fell back to tyler in the last step.

    Raises:
        ValueError: an unknown option, a value out of range, an option without effect in the combination; a matrix
            group with a tensor that is not 2-D; a complex parameter; a sparse or complex gradient.
    """

    last_step_finite: Tensor
    last_step_fallbacks: Tensor

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
        self._reset_report()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, empty in (("_preset", None), ("_options", {}), ("_used", set()), ("_idle", {})):
            self.__dict__.setdefault(name, empty)
        for group in self.param_groups:
            for key, default in options.DEFAULTS[group["kind"]].items():
                group.setdefault(key, default)
        self._reset_report()

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
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        grads = [_dense_grad(p) for _, params in work for p in params]
        finite = all_finite(grads, self._device())
        fallbacks = torch.zeros((), dtype=torch.int64, device=finite.device)
        for group, params in work:
            if group["kind"] == "matrix":
                _check_params(group)
                for bucket in buckets(params):
                    fallbacks += self._matrix_step(bucket, group, finite).to(fallbacks.device)
            else:
                self._adamw_step(params, group, finite)
        self.last_step_finite = finite
        self.last_step_fallbacks = torch.where(finite, fallbacks, 0)
        return loss

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Takes over a state and the options of its groups; tensors are copied and stay fp32.

        (torch alone would round the momentum of a bf16 weight to bf16.)

        Raises:
            ValueError: groups that differ in number, size or kind, or a state of another shape than its weight.
        """
        saved_groups = state_dict["param_groups"]
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=False)):
            if saved.get("kind") != group["kind"]:
                raise ValueError(
                    f"group {index} of the loaded state is of kind {saved.get('kind')!r}, "
                    f"this optimizer's of kind {group['kind']!r}: the state is another optimizer's"
                )
        saved_ids = [index for saved in saved_groups for index in saved["params"]]
        own = [(p, group["kind"]) for group in self.param_groups for p in group["params"]]
        states = {
            p: _loaded_state(p, kind, state_dict["state"][index])
            for (p, kind), index in zip(own, saved_ids, strict=False)
            if index in state_dict["state"]
        }
        super().load_state_dict(state_dict)
        self.state.update(states)

    def _matrix_step(self, bucket: Sequence[Tensor], group: dict[str, Any], finite: Tensor) -> Tensor:
        """Steps equally shaped weights; returns how often their balance rule fell back."""
        inputs = []
        for p in bucket:
            state = self._state_of(p, "matrix")
            momentum, u = blend(_dense_grad(p), state["momentum"], group["momentum"], group["nesterov"])
            commit_(state["momentum"], momentum, finite)
            state["step"] += finite.to(p.device)
            # Zeros where the step is void: no backend sees a NaN, nor works for nothing.
            inputs.append(torch.where(finite.to(p.device), u, 0.0))
        d, fallbacks = directions.from_options(torch.stack(inputs), group)
        m, n = bucket[0].shape
        step = directions.scaled(d, directions.lr_scale(group["lr_scale"], m, n), polar=group["polar"])
        for p, matrix in zip(bucket, step, strict=True):
            commit_(p, updated(p, matrix, lr=group["lr"], weight_decay=group["weight_decay"]), finite)
        return fallbacks.sum()

    def _adamw_step(self, params: Sequence[Tensor], group: dict[str, Any], finite: Tensor) -> None:
        tensors = [AdamwTensor(weight=p, grad=_dense_grad(p), **self._state_of(p, "adamw")) for p in params]
        adamw_step(tensors, group, finite)

    def _state_of(self, p: Tensor, kind: str) -> dict[str, Tensor]:
        """The state of a parameter, zeros before its first step."""
        state: dict[str, Tensor] = self.state[p]
        for key in _STATE_KEYS[kind]:
            if key not in state:
                shape = () if key == "step" else p.shape
                state[key] = torch.zeros(shape, dtype=torch.float32, device=p.device)
        return state

    def _device(self) -> torch.device:
        """Where the flag of a step lives: with the first parameter, though a wrapper may have taken them all."""
        params = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in params), torch.device("cpu"))

    def _reset_report(self) -> None:
        self.last_step_finite = torch.ones((), dtype=torch.bool, device=self._device())
        self.last_step_fallbacks = torch.zeros((), dtype=torch.int64, device=self._device())


def buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of parameters of one shape and device in the order given, up to BUCKET_ELEMENTS elements each."""
    alike: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
    for p in params:
        alike[p.shape, p.device].append(p)
    for (shape, _), members in alike.items():
        size = max(1, BUCKET_ELEMENTS // max(1, shape.numel()))
        for start in range(0, len(members), size):
            yield members[start : start + size]


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


def _dense_grad(p: Tensor) -> Tensor:
    grad = p.grad
    assert grad is not None, "callers choose parameters that have a gradient"
    if grad.layout != torch.strided:
        raise ValueError(f"a gradient of layout {grad.layout}: expected a dense one (sparse=False in nn.Embedding)")
    return grad


def _loaded_state(p: Tensor, kind: str, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    if set(saved) != set(_STATE_KEYS[kind]):
        raise ValueError(f"the loaded state of a {kind} parameter has {sorted(saved)}: expected {_STATE_KEYS[kind]}")
    for key, value in saved.items():
        expected = torch.Size() if key == "step" else p.shape
        if value.shape != expected:
            raise ValueError(
                f"the loaded {key} has shape {tuple(value.shape)}, its parameter {tuple(expected)}: "
                "the parameters are in another order or of another model"
            )
    return {key: value.to(p.device, torch.float32, copy=True) for key, value in saved.items()}
