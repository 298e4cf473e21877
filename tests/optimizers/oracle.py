"""The mathematics once more, in fp64 numpy, one matrix and one row at a time: what the tests compare with."""

import numpy as np
import torch
from torch import Tensor


def polar_oracle(x: Tensor) -> np.ndarray:
    """U V^T over the singular values that are not zero, by numpy's SVD."""
    a = x.double().numpy()
    u, sigma, vt = np.linalg.svd(a, full_matrices=False)
    rank = int((sigma > max(a.shape) * np.finfo(np.float64).eps * sigma.max(initial=0.0)).sum())
    return u[:, :rank] @ vt[:rank]


def leverage_oracle(a: np.ndarray) -> np.ndarray:
    """The diagonal of a a^+ : leverage scores by the pseudo-inverse, not by a polar factor."""
    return np.diag(a @ np.linalg.pinv(a)).copy()


def aurora_oracle(x: Tensor, *, iterations: int = 2, rule: str = "odds", beta: float = 0.5) -> np.ndarray:
    """Aurora's direction for one tall matrix."""
    a = x.double().numpy()
    if not a.any():
        return np.zeros_like(a)
    a = a / np.abs(a).max()
    norms = np.linalg.norm(a, axis=1)
    live = [i for i in range(len(a)) if norms[i] > 0]
    D = np.zeros(len(a))
    for i in live:
        D[i] = 1 / max(norms[i], 1e-7 * norms.max())
    for _ in range(iterations - 1):
        leverage = leverage_oracle(D[:, None] * a)
        t = float(np.mean(leverage[live]))
        if t > 0.999:
            break
        for i in live:
            if rule == "tyler":
                D[i] *= (t / leverage[i]) ** beta
            else:
                inside = min(max(leverage[i], 1e-6), 1 - 1e-6)
                D[i] *= np.sqrt(t / (1 - t) * (1 - inside) / inside)
    return polar_oracle(torch.from_numpy(D[:, None] * a))


def error(got: Tensor, wanted: np.ndarray) -> float:
    """|got - wanted|_F / |wanted|_F, absolute where wanted is zero."""
    size = np.linalg.norm(wanted)
    return float(np.linalg.norm(got.double().numpy() - wanted) / (size if size > 0 else 1.0))


def row_spread(d: Tensor) -> float:
    """Deviation over mean of the norms of the rows that are not zero."""
    norms = d.double().norm(dim=-1)
    norms = norms[norms > 0]
    return float(norms.std(correction=0) / norms.mean())


def with_condition(m: int, n: int, condition: float, seed: int = 0) -> Tensor:
    """A random m x n matrix in fp64 whose singular values run from 1 to 1/condition, evenly in the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    sigma = condition ** (-torch.arange(k, dtype=torch.float64) / max(1, k - 1))
    return (u * sigma) @ v.T


def low_rank(m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    """An fp32 matrix of small whole numbers and of exactly this rank."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-3, 4, (m, rank), generator=generator)
    right = torch.randint(-3, 4, (rank, n), generator=generator)
    x = (left @ right).float()
    assert int(torch.linalg.matrix_rank(x.double())) == rank
    return x
