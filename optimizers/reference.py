"""The optimizers again, for reading: one matrix at a time, in fp64, every formula as on paper.

This module shares no arithmetic with the fast code. It is the oracle of the tests, and the place to learn what each
optimizer computes, from the top: momentum, polar factor, directions, step.

Conventions. A weight w is [m, n]: m rows, one per output neuron. Tall: m > n. g is its gradient, b the momentum buffer,
u the input of a direction. Every function takes real tensors of any floating dtype, computes in fp64, returns new fp64
tensors and does not change its arguments.

For every direction: zero gives zero; a matrix with a NaN or an infinity gives NaNs; and, unless a docstring says
otherwise, d(c u) = d(u) for c > 0. fp64 needs no care for that; fp32 does (see `optimizers.polar.prescale`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .reference_parts import as_matrix, centred, live_rows, nan_or_zero, require, with_rows_of_norm


def blend(g: Tensor, b: Tensor, mu: float, nesterov: bool) -> tuple[Tensor, Tensor]:
    """The new momentum b <- mu b + (1 - mu) g, and u = g + mu (b - g), or u = b without Nesterov."""
    g, b = g.double(), b.double()
    b = mu * b + (1 - mu) * g
    return b, (g + mu * (b - g)) if nesterov else b.clone()


def polar(x: Tensor) -> Tensor:
    """polar(X) = U V^T over the nonzero singular values of X [m, n].

    For full rank it is the nearest matrix with orthonormal columns (tall) or rows (wide), otherwise a partial isometry:
    a completed basis would be arbitrary. Singular values up to max(m, n) 2^-52 sigma_1 count as zero.
    """
    x = as_matrix(x)
    if (known := nan_or_zero(x)) is not None:
        return known
    left, sigma, right = torch.linalg.svd(x, full_matrices=False)
    kept = sigma > max(x.shape) * 2.0**-52 * sigma[0]
    # Exact zeros: an SVD may leave 1e-17 in rows and columns of zeros, which dividing by the row norm would make 1.
    return torch.where(live_rows(x)[:, None] & live_rows(x.T), left[:, kept] @ right[kept, :], 0.0)


def leverage_scores(x: Tensor) -> Tensor:
    """l_i = x_i (X^T X)^+ x_i^T, [m]: the squared row norms of polar(X). In [0, 1], and their sum is the rank."""
    return polar(x).square().sum(dim=1)


def muon(u: Tensor) -> Tensor:
    """Muon: polar(u)."""
    return polar(u)


def normuon(u: Tensor, v: Tensor, *, beta2: float = 0.95, target: str = "graft") -> tuple[Tensor, Tensor]:
    """NorMuon (arXiv 2510.05491): rows divided by a running root mean square v [m]. Returns d and the new v.

        P = polar(u);  v <- beta2 v + (1 - beta2) rowmean(P^2);  P_i / (sqrt(v_i) + 1e-10)

    Then `target` "graft" rescales the result to |P|_F; "unit" makes every row norm 1, a step sqrt(m/n) times larger. v
    starts at zeros. For m <= n a polar factor of full rank already has unit rows: the direction is muon(u), v stays.
    """
    require("target", target, ("graft", "unit"))
    P, v = polar(u), v.double().clone()
    if P.shape[0] <= P.shape[1]:
        return P, v
    v = beta2 * v + (1 - beta2) * P.square().mean(dim=1)
    d = P / (v.sqrt() + 1e-10)[:, None]
    if target == "unit":
        return with_rows_of_norm(d, 1.0), v
    return (d * (P.norm() / d.norm()) if d.any() else d), v


def u_normuon(u: Tensor) -> Tensor:
    """U-NorMuon without state: every row of polar(u) scaled to norm sqrt(n/m). For m <= n it is muon(u)."""
    P = polar(u)
    m, n = P.shape
    return with_rows_of_norm(P, math.sqrt(n / m)) if m > n else P


def u_normuon_running(u: Tensor, v: Tensor, *, beta2: float = 0.95) -> tuple[Tensor, Tensor]:
    """U-NorMuon by NorMuon's running v [m]: d_i = P_i sqrt(n/m) / (sqrt(n) (sqrt(v_i) + 1e-10)), and the new v.

    A row's v starts at its first mean square, so the row starts with norm sqrt(n/m) and has no bias to correct. For
    m <= n the direction is muon(u), and v stays.
    """
    P, v = polar(u), v.double().clone()
    m, n = P.shape
    if m <= n:
        return P, v
    mean_square = P.square().mean(dim=1)
    v = torch.where(v == 0, mean_square, beta2 * v + (1 - beta2) * mean_square)
    return P * math.sqrt(n / m) / (math.sqrt(n) * (v.sqrt() + 1e-10))[:, None], v


def row_scale(
    u: Tensor, *, iterations: int, beta: float, balance_rule: str, eps_mode: str, tolerance: float | None
) -> tuple[Tensor, int]:
    """The diagonal D [m] for which polar(D u) has even rows, for a tall u, and how often the odds rule fell back.

    D starts at 1/|u_i|, 0 on zero rows, and is updated `iterations` - 1 times from the leverage scores l of D u.
    With t the mean of l over the rows that are not zero:

        tyler:  D_i <- D_i (t / l_i)^beta, the fixed-point iteration of Tyler's M-estimator
        odds:   D_i <- D_i sqrt(t/(1-t) (1-l_i)/l_i), l clamped to [1e-6, 1 - 1e-6]

    By Sherman and Morrison, l_i/(1-l_i) is linear in D_i^2 while the other rows are fixed, so the odds rule sets each
    row exactly. Both rules have the same fixed point, l_i = t. For t > 0.999 there is no freedom left, and D stays.

    An odds step that raises the spread of the row norms (deviation over mean) by more than 2^-8 is undone and replaced
    by a tyler step with beta = 0.5. This shows at the next evaluation of l, so the last step is never checked. With a
    `tolerance`, the first evaluation with |sqrt(l_i/t) - 1| <= tolerance for all live rows is the last.

    eps_mode "relative" floors row norms at 1e-7 of the largest. "absolute", that of the released code, floors them at
    1e-7 (so it depends on the scale of u), takes t = n/m and has no rule for t > 0.999.
    """
    u, (m, n) = as_matrix(u), u.shape
    relative, live, norms = eps_mode == "relative", live_rows(u), u.norm(dim=1)

    def target(scores: Tensor) -> float:
        return float(scores[live].mean()) if relative else n / m

    def spread(scores: Tensor) -> float:
        lengths = scores[live].sqrt()
        return float(lengths.std(correction=0) / lengths.mean())

    D = torch.where(live, 1 / norms.clamp(min=1e-7 * float(norms.max()) if relative else 1e-7), 0.0)
    fallbacks, before = 0, None
    for _ in range(iterations - 1):
        scores, rule, power = leverage_scores(D[:, None] * u), balance_rule, beta
        if tolerance is not None and ((scores[live] / scores[live].mean()).sqrt() - 1).abs().max() <= tolerance:
            break
        if rule == "odds" and before is not None and spread(scores) > spread(before[1]) + 2.0**-8:
            D, scores = before
            fallbacks, rule, power = fallbacks + 1, "tyler", 0.5
        before, t = (D, scores), target(scores)
        if relative and t > 0.999:
            break
        if rule == "tyler":
            D = D * (t / scores.clamp(min=1e-14)) ** power
        else:
            inside = scores.clamp(1e-6, 1 - 1e-6)
            D = D * (t / (1 - t) * (1 - inside) / inside).sqrt()
    return D, fallbacks


def aurora(
    u: Tensor,
    *,
    iterations: int = 2,
    beta: float = 0.5,
    balance_rule: str = "odds",
    scope: str = "tall",
    eps_mode: str = "relative",
    tolerance: float | None = None,
) -> Tensor:
    """Aurora (arXiv 2606.27715): d = polar(D u), near u, with orthonormal columns and rows near norm sqrt(n/m).

    `iterations` K counts the polar factors, including that of d. Since D starts at 1/|u_i|, d does not change under
    positive scaling of single rows of u, for any K. It is a feasible point of both constraints and maximises
    Tr((D u)^T d), not Tr(u^T d). If more than m/n rows share a direction, no even scaling exists.

    `scope` says which shapes are balanced: "tall", "wide" (transposed, treated, transposed back) or "all". The others,
    and every square matrix, get muon(u), and so does one with a side less than 3 % longer than the other unless
    `eps_mode` is "absolute". The remaining options are those of `row_scale`.
    """
    require("balance_rule", balance_rule, ("odds", "tyler"))
    require("eps_mode", eps_mode, ("relative", "absolute"))
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: expected at least 1")

    def balanced(tall: Tensor) -> Tensor:
        if len(tall) < 1.03 * tall.shape[1] and eps_mode == "relative":
            return polar(tall)
        D, _ = row_scale(
            tall, iterations=iterations, beta=beta, balance_rule=balance_rule, eps_mode=eps_mode, tolerance=tolerance
        )
        return polar(D[:, None] * tall)

    return _in_scope(u, scope, balanced)


def aurora_carried(u: Tensor, log_D: Tensor, *, polished: bool = False) -> tuple[Tensor, Tensor]:
    """Aurora with a D that is kept from step to step: d = polar(D u) and the new log D [m], which starts at zeros.

    With l_i = |d_i|^2 and t the mean of l over the rows that are not zero, D takes one odds step for the next call:

        log D_i <- log D_i + e_i,   e_i = (logit(t) - logit(l_i)) / 2,   l clamped to [2^-20, 1 - 2^-7]

    `polished` lets e act on d, too: d <- y (I - E/2 + 3 E^2/8), E = y^T y - I, y_i = exp(e_i) d_i, |e_i| at most 0.2.
    Then the mean of log D over the rows that are not zero, which the polar factor does not see, is subtracted, and D is
    clamped to [2^-10, 2^10]. Rows that are zero keep their D; all do if t > 0.999. Where m < 1.03 n the direction is
    muon(u), and D stays. d changes if single rows of u are scaled.
    """
    u, log_D = as_matrix(u), log_D.double().clone()
    if len(u) < 1.03 * u.shape[1]:
        return polar(u), log_D
    d, live = polar(log_D.exp()[:, None] * u), live_rows(u)
    scores = d.square().sum(dim=1)
    if not live.any() or not scores[live].mean() <= 0.999:
        return d, log_D
    wanted, present = (torch.logit(x.clamp(2.0**-20, 1 - 2.0**-7)) for x in (scores[live].mean(), scores))
    e = torch.where(live, (wanted - present) / 2, 0.0)
    log_D[live] = ((log_D + e)[live] - (log_D + e)[live].mean()).clamp(-10 * math.log(2), 10 * math.log(2))
    y = e.clamp(-0.2, 0.2).exp()[:, None] * d
    E = y.T @ y - torch.eye(y.shape[1], dtype=torch.float64)
    return (y - y @ (E / 2 - 0.375 * E @ E) if polished else d), log_D


def riemannian_aurora(u: Tensor, *, riemannian: str = "exact", outer_steps: int = 3, scope: str = "tall") -> Tensor:
    """Ascends Tr(u^T U) over the U with orthonormal columns and even rows, from U = polar(u), by `outer_steps`.

    Each step projects u onto the tangent space, U <- U + 0.1 Z, and retracts: twice rows to norm sqrt(n/m), then
    polar. The normal space at U is {U S' + diag(lam) U}, S' symmetric, so the projection is

        Z = u - U (S - U^T diag(lam) U) - diag(lam) U,   S = sym(U^T u),   M lam = q,
        q_i = <u_i, U_i> - <(U S)_i, U_i>,   P = U U^T,   M = diag(|U_i|^2) - P.P  (entrywise square)

    P is a projection, so sum_j P_ij^2 = P_ii: M is the Laplacian of the graph with weights P_ij^2, positive
    semi-definite with the constants as kernel.

    `riemannian` "exact" is the above, with u first scaled to |u|_F = sqrt(n). "released", the released code's, has
    no such scaling (so it depends on the scale of u) and M = r I - P.P with r = n/m, shifted up by
    max(0, max_i |U_i|^4 - r + 1e-3). `scope` is that of `aurora`.
    """
    require("riemannian", riemannian, ("exact", "released"))
    if outer_steps < 0:
        raise ValueError(f"outer_steps is {outer_steps}: expected at least 0")

    def ascended(tall: Tensor) -> Tensor:
        if riemannian == "exact":
            tall = tall * (math.sqrt(tall.shape[1]) / tall.norm())
        U = polar(tall)
        for _ in range(outer_steps):
            Z = tangent(tall, U, riemannian=riemannian)
            if not Z.isfinite().all():
                break
            U = U + 0.1 * Z
            for _ in range(2):
                U = polar(with_rows_of_norm(U, math.sqrt(U.shape[1] / U.shape[0])))
        return U

    return _in_scope(u, scope, ascended)


def tangent(u: Tensor, U: Tensor, *, riemannian: str = "exact") -> Tensor:
    """The projection Z of u on the tangent space at U, both [m, n]; see `riemannian_aurora`."""
    S = U.T @ u
    S = (S + S.T) / 2
    q = (u * U).sum(dim=1) - ((U @ S) * U).sum(dim=1)
    lam = conjugate_gradient(multiplier_matrix(U, riemannian=riemannian), centred(q, live_rows(U)))
    lam = centred(lam, live_rows(U)) if lam.isfinite().all() else torch.zeros_like(lam)
    return u - U @ (S - U.T @ (lam[:, None] * U)) - lam[:, None] * U


def multiplier_matrix(U: Tensor, *, riemannian: str = "exact") -> Tensor:
    """M of `riemannian_aurora`, [m, m]."""
    squares = (U @ U.T).square()
    if riemannian == "exact":
        return torch.diag(U.square().sum(dim=1)) - squares
    m, n = U.shape
    r = n / m
    r = r + max(0.0, float(squares.diagonal().max()) - r + 1e-3)
    return r * torch.eye(m, dtype=torch.float64) - squares


def conjugate_gradient(M: Tensor, q: Tensor, *, steps: int = 20) -> Tensor:
    """An x [m] with M x = q for a positive semi-definite M [m, m], from x = 0 (Hestenes and Stiefel, 1952).

    At most `steps` products; stops at a residual of 1e-8 |q|, and where p^T M p < 1e-30: p is in the kernel.
    """
    x, residual, p = torch.zeros_like(q), q.clone(), q.clone()
    for _ in range(steps):
        Mp = M @ p
        curvature = p @ Mp
        if residual.norm() <= 1e-8 * q.norm() or curvature < 1e-30:
            break
        length = residual @ residual
        x = x + length / curvature * p
        residual = residual - length / curvature * Mp
        p = residual + (residual @ residual) / length * p
    return x


def contra(d: Tensor, u: Tensor, strength: float) -> Tensor:
    """d - strength u / sigma_1(u), rescaled to |d|_F.

    sigma_1 by 5 power iterations v <- u^T (u v), normalised, from a constant vector, on u with a largest entry of 1;
    at least the largest row norm, which bounds it where the constant vector meets nothing.
    """
    d, u = d.double(), u.double()
    if not d.any():
        return d.clone()
    u = u / u.abs().max()
    v = torch.ones(u.shape[1], dtype=torch.float64)
    for _ in range(5):
        v = u.T @ (u @ v)
        v = v / v.norm().clamp(min=1e-8)
    sigma = max(float((u @ v).norm()), float(u.norm(dim=1).max()))
    turned = d - strength * u / sigma
    return turned * (d.norm() / turned.norm().clamp(min=1e-8))


def lr_scale(kind: str, m: int, n: int) -> float:
    """s(m, n): "aspect" sqrt(max(1, m/n)), "rms" 0.2 sqrt(max(m, n)), "spectral" sqrt(m/n)."""
    require("lr_scale", kind, ("aspect", "rms", "spectral"))
    if kind == "aspect":
        return math.sqrt(max(1.0, m / n))
    return 0.2 * math.sqrt(max(m, n)) if kind == "rms" else math.sqrt(m / n)


def uw_floor(step: Tensor, w: Tensor, floor: float) -> Tensor:
    """The step s d, lengthened to floor |w|_F if it is shorter; w before this step's decay. Zero stays zero."""
    step, w = step.double(), w.double()
    return step * max(1.0, float(floor * w.norm() / step.norm().clamp(min=1e-8)))


def decayed(w: Tensor, step: Tensor, *, lr: float, weight_decay: float, cautious: bool = False) -> Tensor:
    """w - lr weight_decay w, decoupled from gradient and s(m, n); with `cautious` only where step * w >= 0."""
    w = w.double()
    shrinks = (step.double() * w >= 0) if cautious else torch.ones_like(w, dtype=torch.bool)
    return torch.where(shrinks, w - lr * weight_decay * w, w)


def direction(u: Tensor, options: Mapping[str, Any], v: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The direction that the keys of a matrix group of `Aurora` name, and the new v (None or zeros at first).

    v is the second moment of the rows of normuon, or the log D of `aurora_carried`.
    """
    name = options["direction"]
    require("direction", name, ("muon", "normuon", "u_normuon", "aurora", "riemannian_aurora"))
    before = torch.zeros(u.shape[0], dtype=torch.float64) if v is None else v
    if name == "normuon":
        return normuon(u, before, beta2=options["beta2"], target=options["normuon_target"])
    if name == "u_normuon" and options["running_norms"]:
        return u_normuon_running(u, before, beta2=options["beta2"])
    if name == "aurora" and (how := options.get("row_balance")) in ("carried", "polished"):
        return aurora_carried(u, before, polished=how == "polished")
    if name == "aurora":
        keys = ("iterations", "beta", "balance_rule", "scope", "eps_mode", "tolerance")
        return aurora(u, **{key: options[key] for key in keys}), v
    if name == "riemannian_aurora":
        return riemannian_aurora(u, **{key: options[key] for key in ("riemannian", "outer_steps", "scope")}), v
    return (u_normuon(u) if name == "u_normuon" else muon(u)), v


def step(
    w: Tensor, g: Tensor, b: Tensor, options: Mapping[str, Any], v: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One whole step of a weight w with gradient g and momentum b, all [m, n]: the new w, b and v.

    b is zeros before the first step; v [m] is the second moment of the directions that have one, see `direction`.
    `options` are all keys of a matrix group of `Aurora`. A gradient with a NaN or an infinity changes nothing.
    A fused weight (q/k/v in one, or heads) is stepped block by block, each as a weight of its own.
    """
    w, b, v = w.double().clone(), b.double().clone(), None if v is None else v.double().clone()
    if not g.isfinite().all():
        return w, b, v
    b, u = blend(g, b, options["momentum"], options["nesterov"])
    d, v = direction(u, options, v)
    if options["contra"]:
        d = contra(d, u, options["contra"])
    d = lr_scale(options["lr_scale"], *w.shape) * d
    if options["uw_floor"]:
        d = uw_floor(d, w, options["uw_floor"])
    lr = float(options["lr"])
    return decayed(w, d, lr=lr, weight_decay=options["weight_decay"], cautious=options["cautious"]) - lr * d, b, v


def adamw_step(
    w: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, count: int, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW (arXiv 1711.05101), step number `count` (from 1), by lr, betas, eps and weight_decay of the options.

    Takes tensors of any shape and returns the new w, exp_avg and exp_avg_sq.
    """
    w, g, exp_avg, exp_avg_sq = (x.double().clone() for x in (w, g, exp_avg, exp_avg_sq))
    if not g.isfinite().all():
        return w, exp_avg, exp_avg_sq
    beta1, beta2 = options["betas"]
    exp_avg = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g.square()
    unbiased, unbiased_sq = exp_avg / (1 - beta1**count), exp_avg_sq / (1 - beta2**count)
    w = decayed(w, g, lr=float(options["lr"]), weight_decay=options["weight_decay"])
    return w - float(options["lr"]) * unbiased / (unbiased_sq.sqrt() + options["eps"]), exp_avg, exp_avg_sq


def _in_scope(u: Tensor, scope: str, treat: Callable[[Tensor], Tensor]) -> Tensor:
    """`treat` on a tall u or the transpose of a wide one, if the scope has that form; muon(u) otherwise."""
    require("scope", scope, ("tall", "all", "wide"))
    u = as_matrix(u)
    if (known := nan_or_zero(u)) is not None:
        return known
    m, n = u.shape
    if m > n and scope in ("tall", "all"):
        return treat(u)
    if m < n and scope in ("wide", "all"):
        return treat(u.T).T
    return muon(u)
