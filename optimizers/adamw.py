"""AdamW for the tensors that are not matrices, with torch's own kernels.

torch.optim's functional form does the arithmetic (Loshchilov & Hutter, arXiv 1711.05101). What is added here: the
moments are fp32 whatever the dtype of the weight, and nothing changes if a gradient anywhere is not finite.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .fields import Declared, option
from .update import commit_


@dataclass(frozen=True)
class AdamWOptions(Declared):
    """The options of an adamw group."""

    lr: float | Tensor = option(
        3e-3,
        "Peak learning rate; the schedule multiplies it. About ten times smaller than that of the matrices: if it is "
        "too large, the embeddings diverge within the first hundred steps.",
        group="main",
        acts="step",
    )
    betas: tuple[float, float] = option(
        (0.9, 0.95),
        "Averaging factors of the gradient and of its square, each in [0, 1). A second factor above 0.99 averages over "
        "more steps than a short run has.",
        group="main",
        acts="step",
        high=1.0,
    )
    eps: float = option(
        1e-8,
        "Added to the root of the second moment; large values turn the update towards plain momentum.",
        acts="step",
    )
    weight_decay: float = option(
        0.0,
        "Decoupled weight decay per step, times the learning rate. It acts on weights of two and more dimensions: norm "
        "gains and biases never decay.",
        group="main",
        acts="step",
    )
    fused: bool = option(
        False, "One kernel for all tensors: faster on a GPU, equal up to rounding.", acts="step", numerics=True
    )


@dataclass(frozen=True)
class AdamwTensor:
    """A weight with its gradient and state. `step` is a float scalar on the weight's device."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def adamw_step(tensors: Sequence[AdamwTensor], options: Mapping[str, Any], finite: Tensor) -> None:
    """One AdamW step in place on weights, moments and step counts; no change at all where `finite` is False.

    Args:
        tensors: what to step. Gradients are not changed.
        options: `lr` (a float or a scalar tensor), `betas`, `eps`, `weight_decay`, `fused`, and perhaps `maximize`.
        finite: a scalar bool tensor.
    """
    if options["fused"]:
        _fused(tensors, options, finite)
    else:
        for tensor in tensors:
            _plain(tensor, options, finite)


def _plain(tensor: AdamwTensor, options: Mapping[str, Any], finite: Tensor) -> None:
    """Steps copies of one tensor and its state, and keeps them if the gradients are finite."""
    dtype = torch.promote_types(tensor.weight.dtype, torch.float32)
    own = (tensor.weight, tensor.exp_avg, tensor.exp_avg_sq)
    weight, exp_avg, exp_avg_sq = (t.detach().to(dtype, copy=True) for t in own)
    step = tensor.step.clone()
    _adamw([weight], [tensor.grad.to(dtype)], [exp_avg], [exp_avg_sq], [step], options)
    for target, value in zip((*own, tensor.step), (weight, exp_avg, exp_avg_sq, step), strict=True):
        commit_(target, value, finite)


def _fused(tensors: Sequence[AdamwTensor], options: Mapping[str, Any], finite: Tensor) -> None:
    """All tensors in one kernel, which reads the flag itself."""
    if not tensors:
        return
    weights = [t.weight.detach().float() for t in tensors]
    _adamw(
        weights,
        [t.grad.float() for t in tensors],
        [t.exp_avg for t in tensors],
        [t.exp_avg_sq for t in tensors],
        [t.step for t in tensors],
        options,
        found_inf=(~finite).float(),
    )
    for tensor, weight in zip(tensors, weights, strict=True):
        if tensor.weight.dtype != torch.float32:
            commit_(tensor.weight, weight, finite)


def _adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    options: Mapping[str, Any],
    *,
    found_inf: Tensor | None = None,
) -> None:
    beta1, beta2 = options["betas"]
    adamw(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=False,
        fused=options["fused"],
        # Without it torch's plain kernel reads the step count on the host, which would wait for a GPU.
        capturable=not options["fused"] and steps[0].is_cuda,
        found_inf=found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        maximize=options.get("maximize", False),
    )
