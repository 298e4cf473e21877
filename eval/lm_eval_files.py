"""A result as the files of the `lm_eval` command: results_*.json and samples_*.jsonl.

lm-eval itself writes them. It is given a model that repeats the log-likelihoods of the result instead of computing
them, so prompts, metrics and layout are lm-eval's own. What a result does not know is absent (the
tokenizer's special tokens, if the tokenizer is not on this machine) or says so (`pretty_env_info` lists the versions in
the result).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate as run_lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import add_tokenizer_info, get_git_commit_hash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eval.errors import EvalError
from eval.schema import EvalResult, ItemOutcome
from eval.suites import TaskChoice
from eval.tasks import loaded_tasks

_BOOTSTRAP_ITERATIONS = 100_000  # the command's default; metrics that are means do not need it


class _Recorded(LM):
    """A model that gives every request the score that a result has for it."""

    def __init__(self, result: EvalResult, items: Mapping[str, Sequence[ItemOutcome]]) -> None:
        super().__init__()
        self._items, self._result = items, result
        self.tokenizer = _tokenizer(result)
        self.max_length = result["model"]["context_length"]

    @property
    def eot_token_id(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.eos_token_id

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        scores = []
        for request in requests:
            # lm-eval numbers the documents that it goes through, and their requests.
            item = self._items[str(request.task_name)][request.doc_id]
            if request.idx >= len(item["log_likelihoods"]):
                raise EvalError(
                    f"item {item['doc_id']} of {request.task_name} has {len(item['log_likelihoods'])} log-likelihoods"
                    " in the result, and more choices; evaluate again"
                )
            scores.append((item["log_likelihoods"][request.idx], item["greedy"][request.idx]))
        return scores

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise EvalError("rolling log-likelihoods are not stored in results")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise EvalError("a result has no generated texts")

    def get_model_info(self) -> dict[str, Any]:
        model = self._result["model"]
        return {
            "model_num_parameters": model["parameters"],
            "model_dtype": f"torch.{self._result['dtype']}",
            "model_revision": model.get("revision", "main"),
            "model_sha": model.get("revision", ""),
        }


def write_lm_eval_files(
    result: EvalResult,
    folder: Path,
    **options: Any,
) -> list[Path]:
    """Write `folder`/<model>/results_<date>.json and one samples_<task>_<date>.jsonl per task; return their paths.

    Args:
        result: a result with log-likelihoods.
        folder: what `--output_path` is to the `lm_eval` command.
        options: as for `eval.tasks.loaded_tasks`, since the texts of the items are needed.

    Raises:
        EvalError: the items are not available or not those of the result, the result is of an earlier version that did
            not keep what the files need, or the folder cannot be written.
    """
    if not result["tasks"]:
        raise EvalError("the result has no tasks, and lm-eval has no files for anything else")
    _check_complete(result)
    items = {name: task["items"] for name, task in result["tasks"].items()}
    model = _Recorded(result, items)
    with loaded_tasks(_choices(result), items=result["items_source"]["kind"], **options) as loaded:
        loaded.restart()
        report = run_lm_eval(
            model,
            {"tasks": loaded.tasks, "groups": loaded.groups},
            samples={name: _places(own) for name, own in items.items()},
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
        )
    _check_same(result, report)
    report |= _circumstances(result, model)
    add_tokenizer_info(report, model)
    # lm-eval logs what goes wrong here and carries on.
    with _logged_as_error():
        return _write(result, report, folder)


def _choices(result: EvalResult) -> list[TaskChoice]:
    """What was asked for: groups, and tasks that are in none."""
    groups = result.get("groups", {})
    grouped = {name: group for group, found in groups.items() for name in found["tasks"]}
    shots = {grouped.get(name, name): task.get("num_fewshot", 0) for name, task in result["tasks"].items()}
    return [TaskChoice(name, number) for name, number in shots.items()]


def _places(items: Sequence[ItemOutcome]) -> Sequence[int]:
    """The doc_ids; a range if they are one, which lm-eval searches faster."""
    places = [item["doc_id"] for item in items]
    return range(len(places)) if places == list(range(len(places))) else places


def _check_complete(result: EvalResult) -> None:
    lacking = [
        name
        for name, task in result["tasks"].items()
        if any("log_likelihoods" not in item or "greedy" not in item for item in task["items"])
    ]
    if lacking:
        raise EvalError(
            f"the result has no log-likelihoods or no greedy choices for {', '.join(lacking)}, since an earlier version"
            " wrote it; evaluate again"
        )


def _check_same(result: EvalResult, report: Mapping[str, Any]) -> None:
    """Check that the items and tasks of this machine are those of the result."""
    for name, task in result["tasks"].items():
        if report["versions"].get(name) != task["version"]:
            raise EvalError(
                f"the result is of version {task['version']} of {name}, and this lm-eval ({lm_eval.__version__}) has"
                f" version {report['versions'].get(name)}"
            )
        other = sum(
            sample["doc_hash"] != item["doc_hash"]
            for sample, item in zip(report["samples"][name], task["items"], strict=True)
        )
        if other:
            raise EvalError(f"{other:,} of {len(task['items']):,} items of {name} are not those of the result")


def _circumstances(result: EvalResult, model: _Recorded) -> dict[str, Any]:
    """The keys that the command adds to what the evaluation itself returns."""
    identity = result["model"]
    arguments = {"pretrained": identity["name"], "dtype": result["dtype"]}
    if "revision" in identity:
        arguments["revision"] = identity["revision"]
    versions = result["versions"]
    return {
        "config": {
            "model": "hf",
            "model_args": arguments,
            **model.get_model_info(),
            "batch_size": result["batch_size"],
            "batch_sizes": [],
            "device": result["device"],
            "use_cache": None,
            "limit": None if result["limit"] is None else float(result["limit"]),
            "bootstrap_iters": _BOOTSTRAP_ITERATIONS,
            "gen_kwargs": {},
            # The command's defaults. Scoring draws no random number.
            "random_seed": DEFAULT_RANDOM_SEED,
            "numpy_seed": DEFAULT_OTHER_SEED,
            "torch_seed": DEFAULT_OTHER_SEED,
            "fewshot_seed": DEFAULT_OTHER_SEED,
        },
        "git_hash": get_git_commit_hash(),
        "date": datetime.fromisoformat(result["date"]).timestamp(),
        "pretty_env_info": "\n".join(f"{name}: {number}" for name, number in versions.items()),
        "transformers_version": versions.get("transformers", "unknown"),
        "lm_eval_version": versions.get("lm_eval", "unknown"),
        "upper_git_hash": None,
    }


def _write(result: EvalResult, report: dict[str, Any], folder: Path) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvalError(f"cannot write to {folder}: {error}") from error
    tracker = EvaluationTracker(output_path=str(folder))
    facts = tracker.general_config_tracker
    facts.log_experiment_args("hf", report["config"]["model_args"], None, None, None)
    facts.start_time = time.perf_counter() - result["seconds"]
    samples = report.pop("samples")
    before = set(folder.rglob("*"))
    tracker.save_results_aggregated(results=report, samples=samples)
    for name in result["tasks"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    written = sorted(path for path in set(folder.rglob("*")) - before if path.is_file())
    if len(written) != 1 + len(result["tasks"]):
        raise EvalError(f"lm-eval could not write its files to {folder}; see its message above")
    return written


def _tokenizer(result: EvalResult) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer if it is on this machine, for its special tokens; no code of it runs."""
    name, revision = result["model"]["name"], result["model"].get("revision", "main")
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except Exception:  # loaders of tokenizers raise anything
        return None


@contextmanager
def _logged_as_error() -> Iterator[None]:
    """Show what lm-eval logs as a warning or an error, and nothing else."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
