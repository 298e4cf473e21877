"""Time, FLOPs, memory and quality of our optimizers, compared with the released algorithm and with other packages.

For each shape all variants alternate in this process, in a new order each round; ratios are taken within a round. Every
direction is compared with exact arithmetic on each input. The result starts with the numbers that the project promises.
Takes about twenty minutes on two cores with the defaults, which produced the pages in docs/benchmarks.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_optimizers_figures import all_figures
from bench_optimizers_inputs import Shape, captured, default_shapes, make_inputs, matrix_shapes, parse_shapes
from bench_optimizers_measure import Oracle, PeakMemory, Quality, timed_rounds, worst
from bench_optimizers_report import SCHEMA_VERSION, Machine, Report, Result, Skipped, markdown
from bench_optimizers_variants import MUON, RELEASED, RELEASED_NATIVE, VARIANTS, Variant
from torch import Tensor

from eval.items import default_cache
from optimizers import flops, has_fast_bf16
from pretrain.config import identity_hash, load_config
from pretrain.files import replace_text
from pretrain.model.cost import flops_per_token
from pretrain.processes.exit_codes import DONE, STOPPED
from pretrain.run.manifest import environment

LARGE_CONFIG, SMALL_CONFIG = "configs/aurora-1.1b.yaml", "configs/quickstart.yaml"
CAPTURE_STEPS = 50
INPUTS = ("gaussian", "powerlaw", "captured")
QUICK_SHAPES: list[Shape] = [(48, 16), (16, 48), (16, 16)]
FEWEST_ROUNDS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        report = run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: the run that provides the momentum failed: {shlex.join(error.cmd)}", file=sys.stderr)
        return 1
    text = markdown(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.json, json.dumps(report, indent=1))
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.markdown, text)
    else:
        print(text)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench_optimizers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", help="for example 8192x2048,256x256 (default: those of the 1.1B and the quickstart, and 5632x2048)")
    add("--inputs", help=f"some of {','.join(INPUTS)} (default: all)")
    add(
        "--captured",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help=f"whose momentum is the captured input (default: {CAPTURE_STEPS} steps of the quickstart, cached)",
    )
    add("--rounds", type=positive, help="timed rounds (default: 7)")
    add("--budget", type=float, default=60.0, help="seconds per shape, after the first three rounds (default: 60)")
    add("--threads", type=positive, default=2, help="of torch (default: 2)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--all-variants", action="store_true", help="also on large shapes, which takes hours")
    add("--quick", action="store_true", help="tiny shapes, two rounds, no captured momentum: to try the script")
    add("--json", type=Path, metavar="FILE", help="where the JSON goes (default: nowhere)")
    add("--markdown", type=Path, metavar="FILE", help="where the tables go (default: standard output)")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    options.command = shlex.join(["python", "scripts/bench_optimizers.py", *(arguments or sys.argv[1:])])
    return options


def positive(text: str) -> int:
    """Parse an argument that must be a positive integer."""
    value = int(text)
    if value < 1:
        raise ValueError("expected at least 1")
    return value


def run(options: argparse.Namespace) -> Report:
    """Measure everything.

    Raises:
        ValueError: invalid shapes or inputs, a run without momentum, or a device that does not exist.
        subprocess.CalledProcessError: the quickstart could not be trained.
    """
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; use --device cpu")
    names = chosen_inputs(options)
    shapes = chosen_shapes(options)
    rounds = options.rounds or (2 if options.quick else 7)
    momenta = captured(options.captured or trained_run()) if "captured" in names else {}
    results: list[Result] = []
    skipped: list[Skipped] = []
    baseline: dict[str, str] = {}
    for shape in shapes:
        inputs = {key: u.to(options.device) for key, u in make_inputs(shape, names, momenta).items()}
        if inputs:
            base = one_shape(shape, inputs, rounds, options, results, skipped)
            baseline |= {"x".join(map(str, shape)): base} if base else {}
    large = load_config(LARGE_CONFIG)
    machine = describe_machine(options)
    return Report(
        schema_version=SCHEMA_VERSION,
        machine=machine,
        rounds=rounds,
        baseline=baseline,
        results=results,
        skipped=skipped,
        figures=all_figures(
            results,
            matrix_shapes(large),
            step_operations=flops_per_token(large.model, large.sequence_length) * large.train.global_batch_tokens,
            device=options.device,
            has_amx=machine["amx_bf16"],
        ),
    )


def chosen_shapes(options: argparse.Namespace) -> list[Shape]:
    """Return the shapes to be measured; by default those of the models, largest first.

    Raises:
        ValueError: the text is not a list of shapes.
    """
    if options.shapes:
        return parse_shapes(options.shapes)
    return QUICK_SHAPES if options.quick else default_shapes(LARGE_CONFIG, SMALL_CONFIG)


def chosen_inputs(options: argparse.Namespace) -> list[str]:
    """Return the names of the inputs.

    Raises:
        ValueError: an input is unknown.
    """
    if options.inputs:
        names = options.inputs.split(",")
        if unknown := [name for name in names if name not in INPUTS]:
            raise ValueError(f"input {unknown[0]!r}: expected some of {', '.join(INPUTS)}")
        return names
    return [name for name in INPUTS if name != "captured" or not options.quick or options.captured]


def trained_run() -> Path:
    """Return a run folder of the quickstart with `CAPTURE_STEPS` steps; train it first if it is not in the cache."""
    config = load_config(SMALL_CONFIG)
    root = default_cache() / "bench-optimizers"
    name = f"quickstart-{identity_hash(config.keys_of('result', 'numerics'))[:12]}"
    command = [sys.executable, "-m", "pretrain", "train", SMALL_CONFIG, f"run.root={root}", f"run.name={name}"]
    command += ["--stop-at", str(CAPTURE_STEPS)]
    # The run prints to standard error, like this script's progress: standard output is for the result.
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode not in (DONE, STOPPED):
        raise subprocess.CalledProcessError(done.returncode, command)
    return root / name


def one_shape(
    shape: Shape,
    inputs: dict[str, Tensor],
    rounds: int,
    options: argparse.Namespace,
    results: list[Result],
    skipped: list[Skipped],
) -> str | None:
    """Measure all variants on a shape, append the results, and return the name of the baseline, if any."""
    started = time.monotonic()
    first = next(iter(inputs.values()))[:1]
    running: list[Variant] = []
    for variant in VARIANTS:
        if why := variant.skipped(first, everything=options.all_variants):
            skipped.append(Skipped(shape=list(shape), variant=variant.name, input=None, why=why))
        else:
            running.append(variant)
    progress(shape, started, f"{len(running)} variants on {', '.join(inputs)}")
    counts = {}
    quality: dict[str, dict[str, Quality]] = {variant.name: {} for variant in running}
    for key, u in inputs.items():
        oracles = [Oracle(matrix) for matrix in u]
        for variant in running:
            stack = None
            if variant.name not in counts:
                operations, peak, stack = observed(variant, first)
                counts[variant.name] = operations, peak
            if why := variant.skipped(u, everything=options.all_variants):
                skipped.append(Skipped(shape=list(shape), variant=variant.name, input=key, why=why))
            elif variant.judged:
                found = stack if stack is not None and len(u) == 1 else variant.direction(u)
                judged = [oracle.judge(d, variant.options) for oracle, d in zip(oracles, found, strict=True)]
                quality[variant.name][key] = worst(judged)
        progress(shape, started, f"judged on {key}")
    took = timed_rounds(
        {variant.name: lambda variant=variant: variant.call(first) for variant in running},  # type: ignore[misc]
        options.device,
        rounds=rounds,
        at_least=min(rounds, FEWEST_ROUNDS),
        budget=options.budget,
    )
    progress(shape, started, f"{len(took[running[0].name])} rounds timed")
    base = baseline_of(took, options.device)
    results += [
        result_of(shape, variant, *counts[variant.name], took, base, quality[variant.name]) for variant in running
    ]
    return base


def result_of(
    shape: Shape,
    variant: Variant,
    operations: int,
    peak: int,
    took: dict[str, list[float]],
    base: str | None,
    quality: dict[str, Quality],
) -> Result:
    """Return the row of a variant; `took` has the times of all variants on the shape, `base` names the baseline."""
    return Result(
        shape=list(shape),
        variant=variant.name,
        timed=variant.timed,
        options=variant.given,
        note=variant.note,
        flops=operations,
        peak_bytes=peak,
        seconds=took[variant.name],
        median_seconds=statistics.median(took[variant.name]),
        muon_ratio=paired(took, variant.name, MUON),
        released_speedup=paired(took, base, variant.name),
        quality=quality,
    )


def baseline_of(took: dict[str, list[float]], device: torch.device) -> str | None:
    """Return the baseline, the released algorithm: in true bf16 where that is fast, else with fp32 products."""
    name = RELEASED_NATIVE if has_fast_bf16(device) else RELEASED
    return name if name in took else None


def observed(variant: Variant, u: Tensor) -> tuple[int, int, Tensor | None]:
    """Return the FLOPs and peak bytes of one call, and its direction if it computes one."""
    call = variant.call(u)
    with flops.counter() as counter, PeakMemory() as memory:
        d = call()
    return int(counter.get_total_flops()), memory.peak, d


def paired(took: dict[str, list[float]], over: str | None, under: str | None) -> float | None:
    """Return the median over the rounds of the ratio of two times; None if one was not timed."""
    if over not in took or under not in took:
        return None
    return statistics.median(a / b for a, b in zip(took[over], took[under], strict=True))


def describe_machine(options: argparse.Namespace) -> Machine:
    """Describe the machine, the code and the command that produced the figures."""
    found: dict[str, Any] = environment()
    has = torch.cpu.get_capabilities()
    device = options.device
    return Machine(
        processor=found["hardware"]["processor"],
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        cores=found["hardware"]["cores"],
        threads=torch.get_num_threads(),
        amx_bf16=bool(has.get("amx_bf16", False)),
        amx_fp16=bool(has.get("amx_fp16", False)),
        avx512_bf16=bool(has.get("avx512_bf16", False)),
        fast_bf16=has_fast_bf16(device),
        torch=torch.__version__,
        python=found["python"],
        git_commit=found["git_commit"],
        time=found["time"],
        command=options.command,
    )


def progress(shape: Shape, started: float, what: str) -> None:
    """Print a line to standard error."""
    print(f"{shape[0]} x {shape[1]}: {what} ({time.monotonic() - started:.1f} s)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
