"""The result of the optimizer benchmark: the JSON, key by key, and its tables.

Times are seconds, memory is bytes, FLOPs are operations of one call. A value that was not measured is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict

from bench_optimizers_measure import Quality

SCHEMA_VERSION = 1


class Machine(TypedDict):
    """Where the figures come from."""

    processor: str
    # "cpu", or the name of the GPU.
    device: str
    cores: int
    # Threads that torch used.
    threads: int
    # Instructions of the processor that decide how fast its bf16 and fp16 products are.
    amx_bf16: bool
    amx_fp16: bool
    avx512_bf16: bool
    # Whether optimizers.has_fast_bf16 says that a bf16 product is the faster one here.
    fast_bf16: bool
    torch: str
    python: str
    # Of the code; "+changes" if the working tree differs. Null outside git.
    git_commit: str | None
    # UTC, ISO 8601.
    time: str
    # The command line that repeats it.
    command: str


class Result(TypedDict):
    """One variant on one shape."""

    shape: list[int]
    variant: str
    # "direction" alone, or the whole "step" of an optimizer: momentum, direction, weights.
    timed: Literal["direction", "step"]
    # Options of our matrix group that are not defaults, or for others' optimizers what they approximate.
    options: dict[str, Any]
    # What else to know of the variant; may be empty.
    note: str
    # Counted while it ran: torch's counter with the formulas of optimizers.flops.
    flops: int
    # Peak bytes of live tensors above those before the call, including its result. For a step, weights, gradients and
    # fresh momentum exist before and are not counted, unless the optimizer creates its state in step().
    peak_bytes: int
    # Seconds in each round, on the first input (the values of a matrix do not change the time).
    seconds: list[float]
    # Median of `seconds`.
    median_seconds: float
    # Medians of the rounds' ratios. muon_ratio: time over that of "muon". released_speedup: time of the released
    # algorithm (see `baseline`) over this one's. Null where the other was not timed.
    muon_ratio: float | None
    released_speedup: float | None
    # By input. Empty where another row has it (our own steps).
    quality: dict[str, Quality]


class Skipped(TypedDict):
    """A variant that did not run on a shape, or on one of its inputs."""

    shape: list[int]
    variant: str
    # Null: on none.
    input: str | None
    why: str


class Figure(TypedDict):
    """One of the numbers that this project promises."""

    # "1" to "4".
    number: str
    what: str
    # Null if what it takes was not measured in this run.
    value: float | None
    # "at least 4", "at most 0.3", or "" for a figure that is only reported.
    bound: str
    verdict: Literal["met", "not met", "not measured", "reported"]
    # False where this machine does not decide it; `why` says what does.
    decided: bool
    why: str


class Report(TypedDict):
    """The JSON file."""

    schema_version: int
    machine: Machine
    # Rounds asked for; large shapes may have fewer (see the length of `seconds`).
    rounds: int
    # By shape ("8192x2048"): which row represents the released algorithm in `released_speedup`.
    baseline: dict[str, str]
    results: list[Result]
    skipped: list[Skipped]
    figures: list[Figure]


def markdown(report: Report) -> str:
    """The whole report as one document."""
    machine = report["machine"]
    instructions = [name for name in ("amx_bf16", "amx_fp16", "avx512_bf16") if machine[name]]
    lines = [
        "# Optimizers: time, operations, memory and quality",
        "",
        f"- Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"device {machine['device']}, bf16 instructions: {', '.join(instructions) or 'none'}",
        f"- {machine['time']}, torch {machine['torch']}, Python {machine['python']}, commit {machine['git_commit']}",
        f"- Command: `{machine['command']}`",
        "",
        "## Numbers",
        "",
        *table(("number", "what", "value", "bound", "verdict"), map(_figure_cells, report["figures"])),
        "",
    ]
    for shape in dict.fromkeys(tuple(result["shape"]) for result in report["results"]):
        lines += _shape_section(report, shape)
    variants = {result["variant"]: result for result in report["results"]}
    cells = [[name, _options(result["options"]), result["note"]] for name, result in variants.items()]
    lines += ["## Variants", "", *table(("variant", "options", "note"), cells), ""]
    return "\n".join([*lines, _LEGEND])


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())


def _figure_cells(figure: Figure) -> list[str]:
    verdict: str = figure["verdict"]
    if not figure["decided"]:
        verdict = f"not decided on this machine ({figure['why']}); here: {verdict}"
    elif figure["why"]:
        verdict += f" ({figure['why']})"
    return [figure["number"], figure["what"], _number(figure["value"]), figure["bound"], verdict]


def _shape_section(report: Report, shape: tuple[int, ...]) -> list[str]:
    results = [result for result in report["results"] if tuple(result["shape"]) == shape]
    name = "x".join(map(str, shape))
    header = ("variant", "timed", "ms", "x muon", "released / it", "GFLOP", "GFLOP/s", "peak MiB", "rounds")
    lines = [f"## {shape[0]} x {shape[1]}", "", *table(header, map(_time_cells, results)), ""]
    lines += (
        [f"`released / it` is against the row *{report['baseline'][name]}*.", ""] if name in report["baseline"] else []
    )
    for key in dict.fromkeys(key for result in results for key in result["quality"]):
        judged = [(result["variant"], result["quality"][key]) for result in results if key in result["quality"]]
        columns = ("variant", "max |sigma-1|", "row variation", "rows within 1 %", "error to exact", "alignment")
        lines += [f"Quality on *{key}*:", "", *table(columns, [_quality_cells(*pair) for pair in judged]), ""]
    skipped = [skip for skip in report["skipped"] if tuple(skip["shape"]) == shape]
    for why in dict.fromkeys(skip["why"] for skip in skipped):
        names = [
            skip["variant"] + (f" on {skip['input']}" if skip["input"] else "")
            for skip in skipped
            if skip["why"] == why
        ]
        lines.append(f"- Not run ({why}): {', '.join(names)}")
    return [*lines, ""] if skipped else lines


def _time_cells(result: Result) -> list[str]:
    median = result["median_seconds"]
    return [
        result["variant"],
        result["timed"],
        f"{1e3 * median:.4g}",
        _number(result["muon_ratio"]),
        _number(result["released_speedup"]),
        f"{result['flops'] / 1e9:.4g}",
        f"{result['flops'] / 1e9 / median:.3g}",
        f"{result['peak_bytes'] / 2**20:.4g}",
        str(len(result["seconds"])),
    ]


def _quality_cells(variant: str, quality: Quality) -> list[str]:
    return [
        variant,
        f"{quality['orthogonality_error']:.2g}",
        f"{quality['row_variation']:.3%}",
        f"{quality['rows_within_1_percent']:.1%}",
        "" if quality["direction_error"] is None else f"{quality['direction_error']:.2g}",
        f"{quality['alignment']:.4f}",
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table, padded to be read as it is."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


_LEGEND = """\
Times are medians of rounds in which all variants take turns within one process, in a new order each round; ratios are
medians of the ratios within a round. A *step* is the whole step of an optimizer with one weight, a *direction* what it
spends most of it on. FLOPs are counted while the variant runs: products by torch's counter, n^3/3 for a Cholesky factor
or a triangular inverse, m n^2 for a triangular solve. Peak memory is that of tensors, beyond those before the call and
with its result.

Quality is against exact arithmetic in fp64. max |sigma-1| is taken along the singular vectors of what is orthogonalised
(D u for aurora, with D as the exact rule finds it) whose singular values are above 2^-11 of its Frobenius norm. Row
variation is deviation over mean of the row norms, of a wide matrix that of its columns. *error to exact* is
|d - d*|_F / |d*|_F against the same algorithm in exact arithmetic, *alignment* <u, d>/|u|_*. Of several matrices the
worst is given.

The released algorithm multiplies in bf16. On a machine without instructions for that, native bf16 products run some
hundred times slower than fp32: the row *released* then rounds to bf16 and multiplies in fp32.
"""
