"""The numbers that this project promises of its optimizers, computed from the benchmark's results."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from bench_optimizers_inputs import Shape
from bench_optimizers_measure import Quality
from bench_optimizers_report import Figure, Result
from bench_optimizers_variants import (
    AURORA,
    AURORA_3,
    AURORA_STEP,
    CARRIED,
    LOOSE,
    MUON,
    MUON_STEP,
    RELEASED,
    RELEASED_NATIVE,
    TORCH_STEP,
    VARIANTS,
)

from optimizers.flops import step_flops

WITHOUT_AMX = "no bf16 AMX"
# The MLP of the 1.1B, with its own width and with the usual one for its hidden size.
WIDEST, NARROWER = (8192, 2048), (5632, 2048)


class Results:
    """The rows of a run, by shape and variant."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._rows = {((row["shape"][0], row["shape"][1]), row["variant"]): row for row in results}

    def row(self, shape: Shape, variant: str) -> Result | None:
        """The row, if it was measured."""
        return self._rows.get((shape, variant))

    def seconds(self, shape: Shape, variant: str) -> float | None:
        """Median seconds; those of muon for a direction that leaves this form to muon."""
        if next(v for v in VARIANTS if v.name == variant).is_muon(*shape):
            variant = MUON
        row = self.row(shape, variant)
        return None if row is None else row["median_seconds"]

    def ratio(self, shape: Shape, slower: str, faster: str) -> float | None:
        """Return the median over the rounds of the ratio of two times."""
        first, second = self.row(shape, slower), self.row(shape, faster)
        if first is None or second is None:
            return None
        return statistics.median(a / b for a, b in zip(first["seconds"], second["seconds"], strict=True))

    def total_seconds(self, shapes: Mapping[Shape, int], variant: str) -> float | None:
        """For all of these matrices, one at a time; None unless each shape was timed."""
        parts = [(count, self.seconds(shape, variant)) for shape, count in shapes.items()]
        known = [count * seconds for count, seconds in parts if seconds is not None]
        return sum(known) if len(known) == len(parts) else None

    def qualities(self, variant: str, *, only: str | None = None) -> dict[tuple[Shape, str], Quality]:
        """By tall shape and input, or of that input `only`."""
        return {
            (shape, key): quality
            for (shape, name), row in self._rows.items()
            if name == variant and shape[0] > shape[1]
            for key, quality in row["quality"].items()
            if only in (None, key)
        }


def all_figures(
    results: Iterable[Result],
    shapes: Counter[Shape],
    *,
    step_operations: float,
    device: torch.device,
    has_amx: bool,
) -> list[Figure]:
    """All numbers.

    Args:
        results: of a run.
        shapes: of all matrices of the 1.1B model.
        step_operations: FLOPs of one training step of it, forward and backward, without the optimizer.
        device: what the run was on.
        has_amx: whether bf16 AMX instructions were there, without which the first number is not decided.
    """
    found = Results(results)
    return [
        *_against_released(found, has_amx),
        *_operations(shapes, device),
        *_over_muon(found, shapes, step_operations, device),
        *_evenness(found),
        *_carried(found, shapes, device),
        *_beside_torch(found),
    ]


def _against_released(found: Results, has_amx: bool) -> list[Figure]:
    why = "" if has_amx else WITHOUT_AMX
    figures = []
    for shape, bound in ((NARROWER, 4.0), (WIDEST, 5.0)):
        row = found.row(shape, AURORA)
        value = None if row is None else row["released_speedup"]
        name = f"{shape[0]} x {shape[1]}: released time / Aurora's"
        figures.append(_figure("1", name, value, "at least", bound, decided=has_amx, why=why))
    ours = found.qualities(AURORA)
    released = found.qualities(RELEASED) | found.qualities(RELEASED_NATIVE)
    errors = [quality["orthogonality_error"] for quality in ours.values()]
    value = max(errors, default=None)
    figures.append(_figure("1", "worst max |sigma - 1|", value, "at most", 1e-3, decided=has_amx, why=why))
    measures: tuple[tuple[Literal["row_variation", "direction_error"], str, float], ...] = (
        ("row_variation", "row-norm variation / the released one's, worst input", 0.5),
        ("direction_error", "error to exact / the released one's, worst input", 2.0),
    )
    for key, name, bound in measures:
        ratios = [
            mine / theirs
            for place, quality in ours.items()
            if place in released and (mine := quality[key]) is not None and (theirs := released[place][key])
        ]
        figures.append(_figure("1", name, max(ratios, default=None), "at most", bound, decided=has_amx, why=why))
    return figures


def _operations(shapes: Counter[Shape], device: torch.device) -> list[Figure]:
    """FLOPs do not depend on the machine, but for the dtype that "auto" stands for."""
    ours = {**_options(AURORA), "scope": "all"}
    released = step_flops(shapes.elements(), _options(RELEASED_NATIVE), device=device)
    figures = [_figure("2", "released, all matrices of the 1.1B: TFLOP", released / 1e12)]
    for name, options, bound in (
        ("as timed here", ours, 0.30),
        ("fp32 products", {**ours, "polar_dtype": "fp32"}, 0.25),
        ("bf16 products", {**ours, "polar_dtype": "bf16"}, 0.30),
    ):
        value = step_flops(shapes.elements(), options, device=device) / released
        figures.append(_figure("2", f"Aurora, scope all, {name}: share of the released", value, "at most", bound))
    return figures


def _over_muon(found: Results, shapes: Counter[Shape], step_operations: float, device: torch.device) -> list[Figure]:
    def operations(variant: str, which: Iterable[Shape]) -> int:
        return step_flops(which, _options(variant), device=device)

    aurora, muon = (found.total_seconds(shapes, name) for name in (AURORA, MUON))
    in_time = None if aurora is None or muon is None else aurora / muon
    one = [WIDEST]
    everything = list(shapes.elements())
    extra = operations(AURORA, everything) - operations(MUON, everything)
    published = "published: 6 % more than Muon, set-up unknown, another quantity"
    return [
        _figure("3", "8192 x 2048: time / Muon's", found.ratio(WIDEST, AURORA, MUON), "at most", 1.5),
        _figure("3", "all matrices of the 1.1B: time / Muon's", in_time, "at most", 1.5, why=published),
        _figure("3", "8192 x 2048: FLOPs / Muon's", operations(AURORA, one) / operations(MUON, one), "at most", 1.2),
        _figure(
            "3",
            "all matrices of the 1.1B: FLOPs / Muon's",
            operations(AURORA, everything) / operations(MUON, everything),
            "at most",
            1.2,
        ),
        _figure("3", "FLOPs beyond Muon's, share of a 1.1B step", extra / step_operations, "at most", 0.0025),
        _figure("3", "all of Aurora's FLOPs, share of a 1.1B step", operations(AURORA, everything) / step_operations),
    ]


def _evenness(found: Results) -> list[Figure]:
    def worst(choose: Callable[[Iterable[float]], float], key: str, only: str) -> float | None:
        values = [quality[key] for quality in found.qualities(AURORA_3, only=only).values()]  # type: ignore[literal-required]
        return choose(values) if values else None

    captured = {shape for shape, _ in found.qualities(AURORA_3, only="captured")}
    ratios = [ratio for shape in captured if (ratio := found.ratio(shape, AURORA_3, AURORA)) is not None]
    return [
        _figure("4", "K = 3, captured: row-norm variation", worst(max, "row_variation", "captured"), "at most", 0.002),
        _figure(
            "4",
            "K = 3, captured: rows within 1 %",
            worst(min, "rows_within_1_percent", "captured"),
            "at least",
            0.99,
        ),
        _figure("4", "K = 3 / K = 2 in time, captured", max(ratios, default=None), "at most", 1.45),
        _figure("4", "8192 x 2048: K = 3 / K = 2 in time", found.ratio(WIDEST, AURORA_3, AURORA), "at most", 1.45),
        _figure("4", "K = 3, power law: row-norm variation", worst(max, "row_variation", "powerlaw"), "at most", 0.005),
    ]


def _carried(found: Results, shapes: Counter[Shape], device: torch.device) -> list[Figure]:
    carried, muon = (step_flops(shapes.elements(), _options(name), device=device) for name in (CARRIED, MUON))
    name = "carried row scales, all matrices of the 1.1B: FLOPs / Muon's"
    return [
        _figure("5", name, carried / muon, "at most", 1.01),
        *(
            _figure("5", f"carried, {m} x {n}: time / Muon's", found.ratio((m, n), CARRIED, MUON), "at most", 1.05)
            for m, n in (NARROWER, WIDEST)
        ),
    ]


def _beside_torch(found: Results) -> list[Figure]:
    """Whole steps beside those of torch.optim.Muon, and how orthogonal they are."""
    figures = []
    for shape in (NARROWER, WIDEST):
        for name, bound in ((MUON_STEP, 0.9), (AURORA_STEP, 1.5), (LOOSE, None)):
            value, what = found.ratio(shape, name, TORCH_STEP), f"{shape[0]} x {shape[1]}: {name} / torch.optim.Muon's"
            figures.append(_figure("6", what, value, None if bound is None else "at most", bound or 0.0))
        released = [found.ratio(shape, name, AURORA) for name in (RELEASED, RELEASED_NATIVE)]
        fastest = min((ratio for ratio in released if ratio is not None), default=None)
        what = f"{shape[0]} x {shape[1]}: released time, the fastest spelling / Aurora's"
        figures.append(_figure("6", what, fastest, "at least", 4.0))
    errors = {name: found.qualities(name) for name in (MUON, TORCH_STEP)}
    ratios = [
        errors[MUON][place]["orthogonality_error"] / quality["orthogonality_error"]
        for place, quality in errors[TORCH_STEP].items()
        if place in errors[MUON]
    ]
    figures.append(
        _figure("6", "max |sigma - 1| / torch.optim.Muon's, worst", max(ratios, default=None), "at most", 0.1)
    )
    return figures


def _options(variant: str) -> dict[str, object]:
    return next(v for v in VARIANTS if v.name == variant).options


def _figure(
    number: str,
    what: str,
    value: float | None,
    side: Literal["at least", "at most"] | None = None,
    bound: float = 0.0,
    *,
    decided: bool = True,
    why: str = "",
) -> Figure:
    verdict: Literal["met", "not met", "not measured", "reported"] = "reported"
    if value is None:
        verdict = "not measured"
    elif side is not None:
        # Written so that a NaN is not met.
        verdict = "met" if (value >= bound if side == "at least" else value <= bound) else "not met"
    text = "" if side is None else f"{side} {bound:g}"
    return Figure(number=number, what=what, value=value, bound=text, verdict=verdict, decided=decided, why=why)
