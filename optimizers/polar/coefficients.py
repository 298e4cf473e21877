"""The polynomials and rational functions of the polar iterations, derived.

An odd polynomial p applied to a matrix, X <- p(X), acts on its singular values and keeps its singular vectors. A polar
iteration is a chain of polynomials after which every singular value that started in [lower, 1] is near 1. Each
polynomial is the best one for what its predecessor leaves: if the values lie in [l, u], it is the p of its degree with
the smallest max |1 - p| on [l, u], after which they lie in [p(l), 2 - p(l)].
"""

import functools
import math
from typing import NamedTuple

import torch

# Relative width of [l, u] from which on the limit l = u of the best quintic is used: the equations of the exchange
# below are singular there, and the two differ by less than fp64 resolves.
NARROW = 5e-6
MOST_EXCHANGES = 100


class Quintic(NamedTuple):
    """p(x) = a x + b x^3 + c x^5."""

    a: float
    b: float
    c: float

    def __call__(self, x: float) -> float:
        """p(x)."""
        return x * (self.a + x * x * (self.b + x * x * self.c))

    def scaled(self, factor: float) -> "Quintic":
        """factor * p."""
        return Quintic(factor * self.a, factor * self.b, factor * self.c)

    def stretched(self, factor: float) -> "Quintic":
        """x -> p(x / factor)."""
        return Quintic(self.a / factor, self.b / factor**3, self.c / factor**5)


@functools.cache
def polar_express(steps: int, *, lower: float, cushion: float, safety: float) -> tuple[Quintic, ...]:
    """The quintics of Polar Express (Amsel, Persson, Musco & Gower, arXiv 2505.16932, algorithm 1).

    Args:
        steps: how many.
        lower: the smallest singular value that is to arrive near 1; the largest is 1.
        cushion: no step is made for an interval wider than [cushion * u, u]: beyond it the best polynomial dips so low
            in between that rounding errors are not lifted with the rest. It is centred on the true interval.
        safety: every polynomial but the last takes x / safety, so that values pushed above u by rounding still
            come down.

    With steps 8, lower 1e-3, cushion 0.02407327424182761 and safety 1 these are the coefficients that the paper's
    authors publish.
    """
    low, high = lower, 1.0
    chain = []
    for step in range(steps):
        p = best_quintic(max(low, cushion * high), high)
        if low < cushion * high:
            p = p.scaled(2 / (p(low) + p(high)))
        if step < steps - 1:
            p = p.stretched(safety)
        chain.append(p)
        low = p(low)
        high = 2 - low
    return tuple(chain)


def best_quintic(low: float, high: float) -> Quintic:
    """The odd quintic nearest to 1 on [low, high] in the maximum norm, by Remez' exchange.

    Its error takes its extreme value with alternating signs at four points (Chebyshev): both ends and the two
    extrema of p in between. Solve for coefficients and error with the points held, then move the points.
    """
    if 1 - low / high <= NARROW:
        return Quintic(15 / 8, -10 / 8, 3 / 8).stretched(high)
    inner = ((3 * low + high) / 4, (low + 3 * high) / 4)
    before = math.inf
    for _ in range(MOST_EXCHANGES):
        points = (low, *inner, high)
        rows = [[x, x**3, x**5, (-1.0) ** i] for i, x in enumerate(points)]
        a, b, c, error = torch.linalg.solve(
            torch.tensor(rows, dtype=torch.float64, device="cpu"), torch.ones(4, dtype=torch.float64, device="cpu")
        ).tolist()
        # p' = a + 3 b x^2 + 5 c x^4 vanishes at the extrema.
        root = math.sqrt(max(0.0, 9 * b * b - 20 * a * c))
        inner = (math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c)))
        if abs(error - before) < 1e-15:
            break
        before = error
    return Quintic(a, b, c)


@functools.cache
def cans(lower: float, tolerance: float, *, cushion: float) -> tuple[Quintic, ...]:
    """Chebyshev-optimised Newton-Schulz (Grishina, Smirnov & Rakhuba, arXiv 2506.10935): best cubics, as many as
    bring [lower, 1] to within `tolerance` of 1.

    The best cubic has a closed form (their proposition 2): with s = l^2 + l u + u^2,
    p(x) = 2 (s x - x^3) / (2 (s/3)^(3/2) + l^2 u + l u^2). A Quintic with c = 0. As in `polar_express`, no step is
    made for an interval wider than [cushion * u, u]: it would send 1 to nearly 0, the difference of two numbers
    that are 1 / cushion times larger, and lose as much precision.
    """
    low, high = lower, 1.0
    chain: list[Quintic] = []
    while max(high - 1, 1 - low) > tolerance:
        end = max(low, cushion * high)
        s = end * end + end * high + high * high
        size = 2 / (2 * (s / 3) ** 1.5 + end * end * high + end * high * high)
        p = Quintic(size * s, -size, 0.0)
        chain.append(p)
        low, high = p(low), 2 - p(end)
    return tuple(chain)


class Rational(NamedTuple):
    """r(x) = scale x (1 + sum_j weights_j / (x^2 + shifts_j)), with positive weights and shifts."""

    scale: float
    shifts: tuple[float, ...]
    weights: tuple[float, ...]

    def __call__(self, x: float) -> float:
        """r(x)."""
        poles = zip(self.weights, self.shifts, strict=True)
        return self.scale * x * (1 + sum(weight / (x * x + shift) for weight, shift in poles))


@functools.cache
def zolotarev(poles: tuple[int, ...], *, lower: float, safety: float) -> tuple[Rational, ...]:
    """The rational functions nearest to a constant on [lower, 1] in turn, each on what its predecessor leaves.

    The values of the last function lie around 1.

    Args:
        poles: the number of poles of each function, which has the type (2 poles + 1, 2 poles).
        lower: the smallest singular value that is to arrive near 1; the largest is 1.
        safety: the largest value of every function but the last is 1 / safety, so that values pushed above it by
            rounding are still where the next one is near its constant.
    """
    low, chain = lower, []
    for step, count in enumerate(poles):
        r = _zolotarev(count, low)
        # It takes its extreme values in turn at 2 count + 2 points: the least at `low`, the greatest at 1.
        least, greatest = r(low), r(1.0)
        chain.append(r._replace(scale=1 / (safety * greatest) if step + 1 < len(poles) else 2 / (least + greatest)))
        low = least / (safety * greatest)
    return tuple(chain)


def _zolotarev(poles: int, low: float) -> Rational:
    """Zolotarev's function for [low, 1], of scale 1, in partial fractions.

    With c_i = low^2 (sn/cn)^2(i K / (2 poles + 1)) it is x times the product of (x^2 + c_2j) / (x^2 + c_2j-1); sn, cn
    and K are those of the modulus sqrt(1 - low^2). (Nakatsukasa & Freund, Computing fundamental matrix decompositions
    accurately via the matrix sign function in two iterations, SIAM Review 58, 2016, section 3.)
    """
    c = [(low * ratio) ** 2 for ratio in _sn_over_cn(low, 2 * poles + 1)]
    shifts, zeros = c[::2], c[1::2]
    weights = []
    for j, shift in enumerate(shifts):
        others = (shift - other for k, other in enumerate(shifts) if k != j)
        weights.append(-math.prod(shift - zero for zero in zeros) / math.prod(others))
    return Rational(1.0, tuple(shifts), tuple(weights))


def _sn_over_cn(low: float, parts: int) -> list[float]:
    """sn/cn of i K / parts for i = 1 ... parts - 1, modulus sqrt(1 - low^2), by arithmetic-geometric means.

    (Abramowitz & Stegun, Handbook of Mathematical Functions, 16.4 and 17.6.)
    """
    a, b = 1.0, low
    means, shares = [a], [0.0]
    while a - b > 1e-15 * a:
        a, b, c = (a + b) / 2, math.sqrt(a * b), (a - b) / 2
        means.append(a)
        shares.append(c / a)
    quarter = math.pi / (2 * means[-1])
    found = []
    for i in range(1, parts):
        angle = 2.0 ** (len(means) - 1) * means[-1] * quarter * i / parts
        for share in reversed(shares[1:]):
            angle = (angle + math.asin(share * math.sin(angle))) / 2
        found.append(math.tan(angle))
    return found
