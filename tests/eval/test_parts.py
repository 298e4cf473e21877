"""Controls, contaminated items and subsets: scores that say how far a score can be trusted."""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from lm_eval.tasks import TaskManager

from eval.compare import compare
from eval.compare_tables import render
from eval.controls import write_controls
from eval.errors import EvalError
from eval.harness import evaluate
from eval.identities import item_identities
from eval.item_identity import ItemIdentity
from eval.item_texts import item_texts
from eval.overlap_report import read_overlap_report, text_hash
from eval.parts import add_subset, mark_overlap
from eval.result_table import format_table
from eval.results import read_result
from eval.schema import EvalResult
from eval.subsets import read_subset
from tests.data.hub_server import hub_server
from tests.eval.conftest import NUM_ITEMS, made_up_items
from tests.eval.results import a_result, write

TASKS = ["hellaswag", "hellaswag_no_context", "winogrande"]


@pytest.fixture(scope="module")
def scored(model_folder: Path, fetched: dict[str, Any]) -> EvalResult:
    return evaluate(model_folder, TASKS, **fetched)


@pytest.fixture
def result(scored: EvalResult) -> EvalResult:
    copied: EvalResult = json.loads(json.dumps(scored))
    return copied


@pytest.fixture(scope="module")
def identities(fetched: dict[str, Any]) -> dict[str, list[ItemIdentity]]:
    return item_identities(["hellaswag", "winogrande"], **fetched)


# --- the control --------------------------------------------------------------------------------


def test_the_control_sees_the_endings_alone(
    result: EvalResult, model_folder: Path, fetched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    def note(self: Any, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        seen.extend(request.args for request in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr("eval.scoring.ContinuationScorer.loglikelihood", note)
    evaluate(model_folder, ["hellaswag_no_context"], **fetched)
    assert {context for context, _ in seen} == {""}
    assert len(seen) == 4 * NUM_ITEMS
    whole, control = result["tasks"]["hellaswag"], result["tasks"]["hellaswag_no_context"]
    assert [item["doc_hash"] for item in whole["items"]] == [item["doc_hash"] for item in control["items"]]
    assert [item["source"] for item in whole["items"]] == [item["source"] for item in control["items"]]
    assert [item["log_likelihoods"] for item in whole["items"]] != [
        item["log_likelihoods"] for item in control["items"]
    ]
    assert "hellaswag_no_context: a control" in format_table(result)


def test_the_items_of_the_control_are_not_kept_twice(result: EvalResult, fetched: dict[str, Any]) -> None:
    assert not list(Path(fetched["cache"]).rglob("*no_context*"))


# --- overlap ------------------------------------------------------------------------------------


def a_report(folder: Path, fetched: dict[str, Any], overlapping: list[int], **changes: Any) -> Path:
    texts = item_texts(["hellaswag"], **fetched)["hellaswag"]
    task = {
        "items": len(texts),
        "too_short": 3,
        "ngrams": 100,
        "found": 5,
        "overlapping": [{"item": place, "ngrams": 9, "found": 5, "place": {}} for place in overlapping],
        "item_hashes": [text_hash(text) for text in texts],
    }
    report = {"ngram": 13, "coverage": {"complete": False, "text_bytes": 999}, "tasks": {"hellaswag": task | changes}}
    file = folder / "overlap.json"
    file.write_text(json.dumps(report))
    return file


def test_items_that_overlap_are_marked_and_scored_apart(
    tmp_path: Path, result: EvalResult, fetched: dict[str, Any], identities: dict[str, list[ItemIdentity]]
) -> None:
    places = [2, 3, 5, 8, 13]
    notes = mark_overlap(result, read_overlap_report(a_report(tmp_path, fetched, places)), identities)
    assert notes == ["winogrande is not marked: the report is not about it"]
    assert "overlap" not in result["tasks"]["winogrande"]
    for name in TASKS[:2]:  # the control has the same items
        task = result["tasks"][name]
        assert [item["doc_id"] for item in task["items"] if item["overlap"]] == places
        overlap = task["overlap"]
        for part, chosen in (
            (overlap["overlapping"], [item for item in task["items"] if item["doc_id"] in places]),
            (overlap["without"], [item for item in task["items"] if item["doc_id"] not in places]),
        ):
            values = [item["acc_norm"] for item in chosen]
            mean = sum(values) / len(values)
            assert part["num_items"] == len(values)
            assert part["acc_norm"] == pytest.approx(mean)
            spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
            assert part["acc_norm_stderr"] == pytest.approx(spread / math.sqrt(len(values)))
        assert (overlap["complete"], overlap["ngram"], overlap["too_short_in_split"]) == (False, 13, 3)
    table = format_table(result)
    assert re.search(rf"\n  without overlap +{NUM_ITEMS - 5} .*\n  overlapping +5 ", table)
    assert "more items may occur in it" in table
    assert read_result(write(tmp_path / "out", result)) == result


def test_a_report_of_other_items_is_refused(
    tmp_path: Path, result: EvalResult, fetched: dict[str, Any], identities: dict[str, list[ItemIdentity]]
) -> None:
    before = json.dumps(result)
    hashes = [text_hash(text) for text in item_texts(["hellaswag"], **fetched)["hellaswag"]]
    for changes, message in (
        (
            {"item_hashes": [*hashes[:-2], hashes[-1], hashes[-2]]},
            "2 of the 23 items of the report",
        ),
        ({"item_hashes": hashes[:-1]}, "is about 22 items, and the split has 23"),
        ({"item_hashes": []}, "has no hashes"),
    ):
        with pytest.raises(EvalError, match=message):
            mark_overlap(result, read_overlap_report(a_report(tmp_path, fetched, [1], **changes)), identities)
    report = read_overlap_report(a_report(tmp_path, fetched, [1]))
    with pytest.raises(EvalError, match="is about piqa, and the result has hellaswag"):
        mark_overlap(result, report._replace(tasks={"piqa": report.tasks["hellaswag"]}), identities)
    assert json.dumps(result) == before
    result["tasks"]["hellaswag"]["items"][4]["doc_hash"] = "0" * 64
    with pytest.raises(EvalError, match="1 of the 23 items of the result"):
        mark_overlap(result, report, identities)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"ngram": true}', '{"ngram": 13, "coverage": {}, "tasks": {}}'])
def test_what_is_not_a_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(EvalError, match="is not a report of `aurora data overlap`"):
        read_overlap_report(tmp_path / "a.json")
    with pytest.raises(EvalError, match="cannot read"):
        read_overlap_report(tmp_path / "missing.json")


# --- subsets ------------------------------------------------------------------------------------


def as_rows(places: list[int]) -> list[dict[str, Any]]:
    return [made_up_items()["hellaswag"][place] for place in places]


def as_text(folder: Path, places: list[int], identities: dict[str, list[ItemIdentity]]) -> Path:
    (folder / "a.txt").write_text("".join(f"{place}\n" for place in places))
    return folder / "a.txt"


def as_hashes(folder: Path, places: list[int], identities: dict[str, list[ItemIdentity]]) -> Path:
    (folder / "h.txt").write_text("".join(f"{identities['hellaswag'][place].doc_hash}\n\n" for place in places))
    return folder / "h.txt"


def as_json(folder: Path, places: list[int], identities: dict[str, list[ItemIdentity]]) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_rows(places)))
    return folder / "a.jsonl"


def as_parquet(folder: Path, places: list[int], identities: dict[str, list[ItemIdentity]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(as_rows(places)), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize("form", [as_text, as_hashes, as_json, as_parquet])
def test_a_subset_is_scored_from_the_whole(
    tmp_path: Path,
    result: EvalResult,
    identities: dict[str, list[ItemIdentity]],
    form: Callable[[Path, list[int], dict[str, list[ItemIdentity]]], Path],
) -> None:
    places = [20, 1, 7, 7, 11]
    subset = read_subset(f"clean={form(tmp_path, places, identities)}")
    result["tasks"]["hellaswag"]["items"] = result["tasks"]["hellaswag"]["items"][:12]  # as with a limit
    add_subset(result, subset, identities)
    for name, doc_ids in (("hellaswag", [1, 7, 11]), ("hellaswag_no_context", [1, 7, 11, 20])):
        task = result["tasks"][name]
        entry = task["subsets"]["clean"]
        assert (entry["doc_ids"], entry["num_items"], entry["num_items_in_split"]) == (doc_ids, len(doc_ids), 4)
        assert entry["acc"] == sum(task["items"][place]["acc"] for place in doc_ids) / len(doc_ids)
        assert entry["origin"] == "file"
    digests = {task["subsets"]["clean"]["sha256"] for task in result["tasks"].values() if "subsets" in task}
    assert len(digests) == 1
    assert "  clean" in format_table(result)
    assert "3 of 4" in format_table(result)


@pytest.mark.parametrize(
    ("request_text", "content", "message"),
    [
        ("goldenswagg", None, "unknown subset 'goldenswagg'; did you mean goldenswag\\?"),
        ("a={}/a.txt", "one\n", "expected one doc_id"),
        ("a={}/a.txt", "9" * 5000, "expected one doc_id"),
        ("a={}/a.txt", "", "no items"),
        ("a={}/a.txt", "1\n" + "a" * 64, "mixes doc_hash and doc_id"),
        ("a={}/a.csv", "1", "ends in .txt, .jsonl or .parquet"),
        ("a={}/a.jsonl", "[", "line 1: not JSON"),
        ("a={}/a.jsonl", '{"ind": 1}', "none of doc_hash, doc_id, ind and source_id"),
        ("piqa:a={}/a.jsonl", '{"ind": 1}', "none of doc_hash, doc_id, which identify an item of piqa"),
        ("a={}/a.parquet", "x", "cannot read"),
        ("a/b={}/a.txt", "1", "cannot be called"),
        ("a={}/missing.txt", None, "cannot read"),
    ],
)
def test_bad_subsets_are_refused(tmp_path: Path, request_text: str, content: str | None, message: str) -> None:
    request = request_text.format(tmp_path)
    if content is not None:
        Path(request.partition("=")[2]).write_text(content)
    with pytest.raises(EvalError, match=message):
        read_subset(request)


def test_a_subset_of_other_items_is_refused(
    tmp_path: Path, result: EvalResult, identities: dict[str, list[ItemIdentity]]
) -> None:
    (tmp_path / "a.txt").write_text("3\n23\n")
    with pytest.raises(EvalError, match="1 of its 2 are not among the 23 of hellaswag, for example 23"):
        add_subset(result, read_subset(f"a={tmp_path}/a.txt"), identities)
    (tmp_path / "a.txt").write_text("3\n")
    with pytest.raises(EvalError, match="the subset a is of piqa, and the result has hellaswag"):
        add_subset(result, read_subset(f"piqa:a={tmp_path}/a.txt"), identities)


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """GoldenSwag on a Hub of our own, with three made-up items."""
    file = as_parquet(tmp_path, [4, 9, 16], {}).read_bytes()
    with hub_server({"data/validation-00000-of-00001.parquet": file, "README.md": b"x"}, "PleIAs/GoldenSwag") as hub:
        monkeypatch.setattr("eval.subsets.snapshot_download", _client(hub.endpoint, tmp_path / "hub"))
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in (("ENDPOINT", hub.endpoint), ("HUGGINGFACE_CO_URL_TEMPLATE", template)):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("eval.hub._PAUSES", (0.01, 0.01))
        yield hub


def _client(endpoint: str, cache: Path) -> Callable[..., str]:
    """The real client; its endpoint is otherwise read when it is imported."""
    from huggingface_hub import snapshot_download

    def download(*arguments: Any, **options: Any) -> str:
        return str(snapshot_download(*arguments, endpoint=endpoint, cache_dir=cache, **options))

    return download


def test_goldenswag_comes_from_the_hub(
    golden: Any, result: EvalResult, identities: dict[str, list[ItemIdentity]]
) -> None:
    subset = read_subset("goldenswag")
    add_subset(result, subset, identities)
    entry = result["tasks"]["hellaswag"]["subsets"]["goldenswag"]
    assert entry["doc_ids"] == [4, 9, 16]
    assert entry["origin"] == "PleIAs/GoldenSwag"
    assert entry["revision"] in golden.commits


def test_a_hub_without_goldenswag_names_the_way_out(golden: Any) -> None:
    golden.push({"README.md": b"x"})
    with pytest.raises(EvalError, match="has no file data/validation"):
        read_subset("goldenswag")
    golden.dead = True
    with pytest.raises(EvalError, match="--subset goldenswag=FILE"):
        read_subset("goldenswag")


@pytest.mark.parametrize("stalls", [False, True])
def test_a_hub_that_fails_is_named_without_its_secrets_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, stalls: bool
) -> None:
    ended = threading.Event()

    def fail(*_: object, **__: object) -> str:
        if stalls:
            ended.wait(60)
        raise OSError("403 for https://me:hunter2@cdn.example/file?X-Amz-Signature=abcdef\nRequest ID: 7")

    monkeypatch.setattr("eval.subsets.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://me:hunter2@hub.example")
    monkeypatch.setattr("eval.subsets._DOWNLOAD_SECONDS", 0.05 if stalls else 60)
    monkeypatch.setattr("eval.subsets.silence_about", lambda _: "")  # it has answered before
    with pytest.raises(EvalError, match=r"at https://hub\.example: .*--subset goldenswag=FILE") as caught:
        read_subset("goldenswag")
    ended.set()
    assert ("TimeoutError" in str(caught.value)) == stalls
    assert not any(secret in str(caught.value) for secret in ("hunter2", "abcdef", "Request ID"))


# --- comparisons --------------------------------------------------------------------------------


def marked(name: str, wins: list[int], overlapping: set[int], subset: list[int] | None = None) -> dict[str, Any]:
    result = a_result({"winogrande": wins}, name)
    task = result["tasks"]["winogrande"]
    for item in task["items"]:
        item["overlap"] = item["doc_id"] in overlapping
    if subset is not None:
        part = {"num_items": len(subset), "acc": 0.5, "acc_stderr": None}
        task["subsets"] = {
            "clean": {**part, "origin": "file", "sha256": "0", "num_items_in_split": 9, "doc_ids": subset}
        }
    return result


def test_a_comparison_leaves_out_what_either_model_may_have_seen(tmp_path: Path) -> None:
    one = write(tmp_path / "one", marked("one", [0] * 30 + [1] * 30, set(range(5)), list(range(10))))
    two = write(tmp_path / "two", marked("two", [1] * 30 + [1] * 30, set(range(3, 12))))
    found = compare([one, two])
    [row] = found["comparisons"]
    assert (row["num_items"], row["won"]) == (60, 30)
    without, clean = found["parts"]
    assert (without["part"], without["num_items"], without["won"], without["lost"]) == ("without overlap", 48, 18, 0)
    assert (clean["part"], clean["num_items"], clean["won"]) == ("clean", 10, 10)
    assert without["better"] == "two"
    for form in ("text", "markdown", "latex", "csv"):
        shown = render(found, form)  # type: ignore[arg-type]
        assert "without overlap" in shown
        assert "clean" in shown
    plain = write(tmp_path / "plain", a_result({"winogrande": [1] * 60}, "plain"))
    assert "parts" not in compare([plain, plain])


def bits(name: str, figures: list[float], **changes: Any) -> dict[str, Any]:
    documents = [
        {"doc_hash": str(place), "bytes": 100, "tokens": 25, "bits": figure} for place, figure in enumerate(figures)
    ]
    text = {
        "bits_per_byte": sum(figures) / (100 * len(figures)),
        "stderr": 0.01,
        "bytes": 100 * len(figures),
        "tokens": 25 * len(figures),
        "documents": len(figures),
        "documents_in_text": len(figures),
        "context": 128,
        "stride": 64,
        "first_token": "<s>",
        "documents_changed_by_tokenizer": 0,
        "sha256": "0",
        "origin": "file",
        "per_document": documents,
        **changes,
    }
    return a_result({}, name, bits_per_byte={"sea": text})


def test_bits_per_byte_are_compared_by_document(tmp_path: Path) -> None:
    one = write(tmp_path / "one", bits("one", [100.0 + place % 7 for place in range(40)]))
    two = write(tmp_path / "two", bits("two", [98.0 + place % 5 for place in range(40)], context=64))
    found = compare([one, two])
    assert found["comparisons"] == []
    [row] = found["bits_per_byte"]
    assert row["difference"] == pytest.approx(row["score"] - row["baseline_score"])
    assert row["interval"] is not None
    assert row["interval"][0] < row["difference"] < row["interval"][1] < 0
    assert (row["outcome"], row["better"], row["num_documents"]) == ("different", "two", 40)
    assert row["won"] + row["lost"] < 40  # some need the same
    assert any("context and stride in tokens differ: one 128/64, two 64/64" in note for note in found["notes"])
    for form in ("text", "markdown", "latex"):
        assert "40 documents" in render(found, form)  # type: ignore[arg-type]
    assert "sea,bits_per_byte,one,two,40," in render(found, "csv")
    same = compare([one, one])["bits_per_byte"][0]
    assert (same["outcome"], same["difference"], same["difference_p"]) == ("undecided", 0.0, 1.0)
    few = compare([write(tmp_path / "a", bits("a", [1.0, 2.0])), write(tmp_path / "b", bits("b", [2.0, 2.5]))])
    assert few["bits_per_byte"][0]["interval"] is None
    assert "interval" in render(few, "json")


def test_bits_per_byte_of_other_texts_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one", bits("one", [100.0] * 12))
    other = bits("two", [100.0] * 12)
    other["bits_per_byte"]["sea"]["per_document"][3]["doc_hash"] = "another"
    with pytest.raises(EvalError, match="sea: one and two were measured on different texts"):
        compare([one, write(tmp_path / "two", other)])


def test_with_items_from_the_hub_the_control_is_lm_evals_task_without_the_prompt(tmp_path: Path) -> None:
    write_controls(["winogrande", "hellaswag_no_context"], tmp_path)
    [file] = tmp_path.iterdir()
    definition = yaml.safe_load(file.read_text())
    assert definition.keys() == {"include", "task", "doc_to_text", "tag"}
    included = yaml.load(Path(definition["include"]).read_text().replace("!function", ""), yaml.SafeLoader)
    assert (included["dataset_path"], included["doc_to_choice"]) == ("Rowan/hellaswag", "choices")
    assert (definition["task"], definition["doc_to_text"]) == ("hellaswag_no_context", "")


@pytest.mark.long
def test_lm_eval_knows_the_control_among_its_own_tasks(tmp_path: Path) -> None:
    write_controls(["hellaswag_no_context"], tmp_path)
    manager = TaskManager(include_path=str(tmp_path))
    assert {"hellaswag", "hellaswag_no_context"} <= set(manager.all_tasks)
    entry = manager.task_index["hellaswag_no_context"]
    assert str(entry.yaml_path).startswith(str(tmp_path))
