"""The elementwise parts of a step.

None of them depends on the shape of a matrix, so they work on whole weights and on flat shards. A step is: check that
the gradients are finite, blend the momentum, find the directions (of whole matrices), update the weights. What ends in
`_` writes, and writes nothing if a gradient is not finite: it selects instead of multiplying, since 0 * NaN is NaN.
Nothing waits for the device. On a CPU, where looking is free, nothing is selected and the tensors are updated in place:
to get memory for a large tensor takes several times as long there as to fill it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def all_finite(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """One bool tensor on `device`: whether all gradients are finite. True if there are none."""
    # Both extremes are NaN if any entry is. They take one pass and no memory.
    extremes = [extreme.to(device, torch.float64) for grad in grads if grad.numel() for extreme in grad.aminmax()]
    if not extremes:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.stack(extremes).isfinite().all()


def is_certain(finite: Tensor) -> bool:
    """Whether it is known, without waiting for a device, that all gradients are finite."""
    return finite.device.type == "cpu" and bool(finite)


def blend_(momentum: Tensor, grad: Tensor, mu: float, nesterov: bool, finite: Tensor) -> Tensor:
    """Move the momentum b to b + (1 - mu)(g - b) and return the input u of the direction, a new fp32 tensor.

    u = g + mu (b - g) with Nesterov and the new b, else u = b. If the gradients are not finite, u = 0, so that no
    backend sees a NaN.
    """
    g = grad.float()
    if is_certain(finite):
        momentum.lerp_(g, 1 - mu)
        return torch.lerp(g, momentum, mu) if nesterov else momentum.clone()
    blended = torch.lerp(momentum, g, 1 - mu)
    commit_(momentum, blended, finite)
    return torch.where(finite.to(g.device), torch.lerp(g, blended, mu) if nesterov else blended, 0.0)


def update_(
    weight: Tensor, step: Tensor, finite: Tensor, *, lr: float | Tensor, weight_decay: float, cautious: bool = False
) -> None:
    """w - lr * weight_decay * w, then minus lr * step, in fp32 or the weight's precision if that is better.

    The decay is decoupled and uses the base lr; `step` is the direction times its learning-rate scale. With `cautious`,
    only entries decay whose step does not point away from zero (step * w >= 0).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    is_in_place = weight.dtype == dtype and is_certain(finite)
    w = weight if is_in_place else weight.to(dtype, copy=True)
    if cautious:
        w.copy_(torch.where(step * w >= 0, w * (1 - lr * weight_decay), w))
    elif weight_decay:
        w.mul_(1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        w.sub_(lr * step)
    else:
        w.add_(step, alpha=-lr)
    if not is_in_place:
        commit_(weight, w, finite)


def commit_(target: Tensor, value: Tensor, finite: Tensor) -> None:
    """Writes `value` into `target` if `finite` is true; otherwise `target` keeps its bits."""
    if is_certain(finite):
        target.copy_(value)
    else:
        target.copy_(torch.where(finite.to(target.device), value.to(target.dtype), target))
