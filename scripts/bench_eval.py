"""`aurora eval` against the `lm_eval` command: the same model, items and settings, one after the other.

    python scripts/bench_eval.py [FOLDER] [--tasks hellaswag=500,winogrande] [--rounds 3] [--page]

FOLDER is a Hugging Face folder (default: the real one that scripts/smollm2.py makes); a task stands with a number of
items, or with all of them. Each task has a command of its own. In float32 both commands alternate over the rounds, in
an order that changes, and the medians of their wall times are compared; every outcome, metric and standard error must
be equal but for the listed items, and log-likelihoods differ by at most 2e-5 a token, or by more where it is lm_eval's
that is farther than this from the model in float64.
A sample of items is compared with a float64 softmax of the plain model's logits. In bfloat16 one run each is compared
with lm_eval's default and with its `softmax_dtype=float32`, and the items that flip are listed. Exits with 1 if the
float32 results are not the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bench_data_page import describe_machine
from bench_eval_page import write_page
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.items import fetch_items, write_task_definitions
from eval.results import read_result

BOUND = 2e-5
"""Of a difference of log-likelihoods, per scored token (float32)."""
Outcomes = dict[str, dict[int, dict[str, Any]]]
"""By task and doc_id: acc, acc_norm if there is one, log_likelihoods, and the number of tokens of each choice."""


class Commands:
    """The two commands, run in new processes of the same interpreter, in a folder of their own."""

    def __init__(self, model: Path, tasks: list[str], scratch: Path, batch_size: int) -> None:
        self.model, self.tasks, self.scratch, self.batch_size = model, tasks, scratch, batch_size
        self.definitions = scratch / "tasks"
        self.definitions.mkdir()
        write_task_definitions(fetch_items(tasks=tasks), tasks, self.definitions)

    def ours(self, limit: int | None, dtype: str) -> tuple[float, dict[str, Any]]:
        """Return the seconds of `aurora eval`, and its result."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            command = ["-m", "pretrain", "eval", str(self.model), "--tasks", ",".join(self.tasks), "--dtype", dtype]
            command += ["--out", name, "--device", "cpu", "--no-cache", *(["--limit", str(limit)] if limit else [])]
            return run(command), dict(read_result(Path(name)))

    def theirs(self, limit: int | None, dtype: str, softmax: str | None = None) -> tuple[float, dict[str, Any]]:
        """Return the seconds of `lm_eval`, and the contents of its files."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            settings = f"pretrained={self.model},dtype={dtype}" + (f",softmax_dtype={softmax}" if softmax else "")
            command = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", settings, "--device", "cpu"]
            command += ["--tasks", ",".join(self.tasks), "--include_path", str(self.definitions), "--num_fewshot", "0"]
            command += ["--batch_size", str(self.batch_size), "--output_path", name, "--log_samples"]
            seconds = run(command + (["--limit", str(limit)] if limit else []))
            (results,) = Path(name).rglob("results_*.json")
            found = json.loads(results.read_text())["results"]
            for task in self.tasks:
                (samples,) = Path(name).rglob(f"samples_{task}_*.jsonl")
                found[task]["samples"] = [json.loads(line) for line in samples.read_text().splitlines()]
            return seconds, found


def run(arguments: list[str]) -> float:
    """Run a command of this interpreter; return its wall time in seconds."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} exited with {done.returncode}:\n{done.stderr[-4000:]}")
    return time.perf_counter() - started


def outcomes_of_ours(result: dict[str, Any]) -> Outcomes:
    """Return the outcomes of a result of ours."""
    return {name: {item["doc_id"]: dict(item) for item in task["items"]} for name, task in result["tasks"].items()}


def outcomes_of_theirs(found: dict[str, Any], tokenizer: Any) -> Outcomes:
    """Return the outcomes of lm_eval's samples, with the number of scored tokens of each choice."""

    def tokens(request: dict[str, str]) -> int:
        context, continuation = request["arg_0"], request["arg_1"]
        space = len(context) - len(context.rstrip())
        start = context[: len(context) - space]
        return len(tokenizer.encode(context + continuation)) - len(tokenizer.encode(start))

    outcomes: Outcomes = {}
    for task, figures in found.items():
        outcomes[task] = {}
        for sample in figures["samples"]:
            outcomes[task][sample["doc_id"]] = {
                "doc_hash": sample["doc_hash"],
                "log_likelihoods": [float(value) for value, _ in sample["filtered_resps"]],
                "tokens": [tokens(request) for request in sample["arguments"].values()],
                **{metric: int(sample[metric]) for metric in ("acc", "acc_norm") if metric in sample},
            }
    return outcomes


def compare(ours: Outcomes, theirs: Outcomes) -> dict[str, Any]:
    """Compare outcomes item by item."""
    report: dict[str, Any] = {}
    for task, expected in theirs.items():
        found, flips, worst = ours[task], [], 0.0
        apart: list[dict[str, Any]] = []
        if found.keys() != expected.keys():
            raise RuntimeError(f"{task}: the commands scored different items")
        for doc_id, item in expected.items():
            mine = found[doc_id]
            if mine["doc_hash"] != item["doc_hash"]:
                raise RuntimeError(f"{task}: item {doc_id} differs between the two commands")
            pairs = zip(mine["log_likelihoods"], item["log_likelihoods"], item["tokens"], strict=True)
            differences = [abs(a - b) / n for a, b, n in pairs]
            worst = max(worst, *differences)
            apart += [{"doc_id": doc_id, "choice": i} for i, value in enumerate(differences) if value > BOUND]
            # The difference of the two best choices, which a flip must have crossed.
            first, second, *_ = sorted(mine["log_likelihoods"], reverse=True)
            flips += [
                {"doc_id": doc_id, "metric": metric, "margin": first - second, "tokens": max(item["tokens"])}
                for metric in ("acc", "acc_norm")
                if metric in item and mine[metric] != item[metric]
            ]
        figures = {"items": len(expected), "largest_difference_per_token": worst, "flips": flips}
        report[task] = figures | {"apart": apart}
    return report


def compare_metrics(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return each metric and standard error: ours, lm_eval's."""
    return {
        task: {
            name: [mine[name], theirs[task][f"{name},none"]]
            for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
            if name in mine
        }
        for task, mine in ours["tasks"].items()
    }


def against_float64(
    model_folder: Path, samples: dict[str, Any], sides: dict[str, Outcomes], count: int
) -> dict[str, float]:
    """Return each side's largest difference per token from a float64 softmax of the plain model's float32 logits."""
    exact = Exact(model_folder, torch.float32)
    worst = dict.fromkeys(sides, 0.0)
    for task, figures in samples.items():
        for sample in figures["samples"][:: max(1, len(figures["samples"]) // count)][:count]:
            for place, request in enumerate(sample["arguments"].values()):
                wanted, tokens = exact.log_likelihood(request)
                for side, outcomes in sides.items():
                    value = outcomes[task][sample["doc_id"]]["log_likelihoods"][place]
                    worst[side] = max(worst[side], abs(value - wanted) / tokens)
    return worst


class Exact:
    """The plain model, which scores one request at a time with a float64 softmax.

    Args:
        folder: of the model.
        dtype: in which the model computes.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def log_likelihood(self, request: dict[str, str]) -> tuple[float, int]:
        """Return the log-likelihood of a request of lm_eval, and how many tokens are scored."""
        context = self.tokenizer.encode(request["arg_0"].rstrip())
        whole = self.tokenizer.encode(request["arg_0"] + request["arg_1"])
        with torch.inference_mode():
            logits = self.model(torch.tensor([whole[:-1]])).logits[0, len(context) - 1 :].double()
        targets = torch.tensor(whole[len(context) :])
        return logits.log_softmax(-1).gather(1, targets[:, None]).sum().item(), len(targets)


def who_is_off(model_folder: Path, report: dict[str, Any], samples: dict[str, Any], sides: dict[str, Outcomes]) -> None:
    """Add to choices on which the sides differ by more than `BOUND` how far each is from the model in float64."""
    exact = None
    for task, figures in report.items():
        requests = {sample["doc_id"]: list(sample["arguments"].values()) for sample in samples[task]["samples"]}
        for found in figures["apart"]:
            exact = exact or Exact(model_folder, torch.float64)
            wanted, tokens = exact.log_likelihood(requests[found["doc_id"]][found["choice"]])
            for side, outcomes in sides.items():
                value = outcomes[task][found["doc_id"]]["log_likelihoods"][found["choice"]]
                found[side] = abs(value - wanted) / tokens


def measure(commands: Commands, limit: int | None, rounds: int, sample: int) -> dict[str, Any]:
    """Compare the commands in float32 and in bfloat16, on `limit` items of each task (None: all)."""
    tokenizer = AutoTokenizer.from_pretrained(commands.model)
    seconds: dict[str, list[float]] = {"aurora eval": [], "lm_eval": [], "aurora eval, start": [], "lm_eval, start": []}
    for index in range(rounds):
        sides = [("aurora eval", commands.ours), ("lm_eval", commands.theirs)]
        for name, command in sides if index % 2 == 0 else reversed(sides):
            seconds[f"{name}, start"].append(command(2, "float32")[0])
            taken, found = command(limit, "float32")
            seconds[name].append(taken)
            if name == "lm_eval":
                theirs = found
            else:
                ours = found
        line = {name: round(values[-1], 1) for name, values in seconds.items()}
        print(json.dumps({"tasks": commands.tasks} | line), file=sys.stderr, flush=True)
    one, other = outcomes_of_ours(ours), outcomes_of_theirs(theirs, tokenizer)
    report: dict[str, Any] = {
        "seconds": seconds,
        "speed": _ratio(seconds["lm_eval"], seconds["aurora eval"]),
        "speed_without_start": _ratio(
            [a - b for a, b in zip(seconds["lm_eval"], seconds["lm_eval, start"], strict=True)],
            [a - b for a, b in zip(seconds["aurora eval"], seconds["aurora eval, start"], strict=True)],
        ),
        "float32": compare(one, other),
        "metrics": compare_metrics(ours, theirs),
        "from_float64": against_float64(commands.model, theirs, {"aurora eval": one, "lm_eval": other}, sample),
        "model": ours["model"],
        "num_truncated_requests": {name: task["num_truncated_requests"] for name, task in ours["tasks"].items()},
    }
    narrow = outcomes_of_ours(commands.ours(limit, "bfloat16")[1])
    who_is_off(commands.model, report["float32"], theirs, {"aurora eval": one, "lm_eval": other})
    report["bfloat16"] = {
        str(softmax): compare(narrow, outcomes_of_theirs(commands.theirs(limit, "bfloat16", softmax)[1], tokenizer))
        for softmax in (None, "float32")
    }
    return report


def merge(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Join the reports of single tasks: times and speeds become a dictionary by task."""
    first, *others = reports.values()
    merged: dict[str, Any] = {
        name: {task: report[name] for task, report in reports.items()}
        for name in ("seconds", "speed", "speed_without_start")
    }
    for name in ("float32", "metrics", "num_truncated_requests"):
        merged[name] = {task: figures for report in reports.values() for task, figures in report[name].items()}
    merged["bfloat16"] = {
        softmax: {task: figures for report in reports.values() for task, figures in report["bfloat16"][softmax].items()}
        for softmax in first["bfloat16"]
    }
    merged["from_float64"] = {
        side: max(report["from_float64"][side] for report in reports.values()) for side in first["from_float64"]
    }
    if any(report["model"]["sha256"] != first["model"]["sha256"] for report in others):
        raise RuntimeError("the model changed between the tasks")
    return merged | {"model": first["model"]}


def _ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def problems(report: dict[str, Any]) -> list[str]:
    """Return what is not the same in float32."""
    found = []
    for task, figures in report["float32"].items():
        found += [
            f"{task}: choice {choice['choice']} of item {choice['doc_id']} is {choice['aurora eval']:.1e} a token from "
            f"the model in float64, lm_eval's {choice['lm_eval']:.1e}"
            for choice in figures["apart"]
            if choice["aurora eval"] > BOUND
        ]
        decisive = [flip for flip in figures["flips"] if flip["margin"] > 2 * BOUND * flip["tokens"]]
        found += [f"{task}: item {flip['doc_id']} flips with a margin of {flip['margin']:.1e}" for flip in decisive]
        if not figures["flips"]:
            found += [
                f"{task}: {name} is {mine}, lm_eval's {other}"
                for name, (mine, other) in report["metrics"][task].items()
                if abs(mine - other) > 1e-12
            ]
    return found


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--tasks", default="hellaswag=500,winogrande", metavar="NAME[=ITEMS],...", help="(default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="of lm_eval (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=20, metavar="N", help="items for float64 (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks/eval.md and eval.json")
    options = parser.parse_args()
    folder = (options.folder or smollm2()).resolve()
    limits = {name: int(items or 0) for name, _, items in (task.partition("=") for task in options.tasks.split(","))}
    reports = {}
    for task, limit in limits.items():
        with tempfile.TemporaryDirectory(prefix="bench-eval-") as scratch:
            commands = Commands(folder, [task], Path(scratch), options.batch_size)
            reports[task] = measure(commands, limit or None, options.rounds, options.sample)
    report = merge(reports)
    report["model"]["name"] = folder.name
    report |= {
        "date": datetime.now(UTC).strftime("%-d %B %Y"),
        "machine": describe_machine() | {"threads": torch.get_num_threads()},
        "limits": limits,
        "lm_eval_batch_size": options.batch_size,
        "sample": options.sample,
        "problems": problems(report),
    }
    if options.page:
        write_page(report, Path(__file__).parents[1] / "docs/benchmarks")
    print(json.dumps(report, indent=1))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
