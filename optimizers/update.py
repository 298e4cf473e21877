"""The elementwise parts of a step.

None of them depends on the shape of a matrix, so they work on whole weights and on flat shards. A step is: check that
the gradients are finite, blend the momentum, find the directions (of whole matrices), update the weights. Only
`commit_` writes, and it writes nothing if a gradient is not finite: it selects instead of multiplying, since 0 * NaN is
NaN. Nothing waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def all_finite(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """One bool tensor on `device`: whether all gradients are finite. True if there are none."""
    if not grads:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.stack([grad.isfinite().all().to(device) for grad in grads]).all()


def blend(grad: Tensor, momentum: Tensor, mu: float, nesterov: bool) -> tuple[Tensor, Tensor]:
    """The new momentum b + (1 - mu)(g - b) and the input u of the direction, both new fp32 tensors.

    u = g + mu (b - g) with Nesterov, else u = b; b is the new momentum.
    """
    g = grad.float()
    blended = torch.lerp(momentum, g, 1 - mu)
    return blended, torch.lerp(g, blended, mu) if nesterov else blended.clone()


def updated(weight: Tensor, step: Tensor, *, lr: float | Tensor, weight_decay: float, cautious: bool = False) -> Tensor:
    """w - lr * weight_decay * w, then minus lr * step, as a new tensor of the weight's precision or fp32.

    The decay is decoupled and uses the base lr; `step` is the direction times its learning-rate scale. With `cautious`,
    only entries decay whose step does not point away from zero (step * w >= 0).
    """
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    decayed = w * (1 - lr * weight_decay)
    if cautious:
        decayed = torch.where(step * w >= 0, decayed, w)
    if isinstance(lr, Tensor):
        return decayed - lr * step
    return torch.add(decayed, step, alpha=-lr)


def commit_(target: Tensor, value: Tensor, finite: Tensor) -> None:
    """Writes `value` into `target` if `finite` is true; otherwise `target` keeps its bits."""
    target.copy_(torch.where(finite.to(target.device), value.to(target.dtype), target))
