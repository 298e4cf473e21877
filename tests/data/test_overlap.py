"""Overlap of evaluation items with the training text: the same as comparing every n-gram with every other."""

import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pretrain.cli import main
from pretrain.config.data import DataConfig, SourceConfig
from pretrain.data import make_catalog
from pretrain.data.order import is_validation
from pretrain.data.overlap import NgramIndex, Overlap, Place, measure_overlap
from tests.conftest import TINY, merged
from tests.data.corpus import write_jsonl, write_parquet

WORDS = ["the", "whale", "sea", "ship", "crew", "Naïve", "鯨", "a", "Ahab", "don't", "of", "and", "harpoon", "7"]
MARKS = (" ", " ", " ", ", ", ".\n", " - ", "_")


def prose(chooser: random.Random, count: int) -> str:
    return "".join(chooser.choice(WORDS) + chooser.choice(MARKS) for _ in range(count))


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    found = re.findall(r"[^\W_]+", text.lower())
    return {tuple(found[at : at + n]) for at in range(len(found) - n + 1)}


def measure(paths: Sequence[Path], tasks: dict[str, list[str]], fraction: float = 0.0, **options: Any) -> Overlap:
    config = DataConfig(
        sources=tuple(SourceConfig(path=str(path), split_units=2) for path in paths),
        lanes=1,
        validation_fraction=fraction,
    )
    return measure_overlap(config, make_catalog(config), tasks, **options)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_it_finds_what_comparing_everything_finds(n: int, tmp_path: Path) -> None:
    chooser = random.Random(n)
    texts = [prose(chooser, chooser.randint(0, 60)) for _ in range(60)]
    items = [prose(chooser, chooser.randint(0, 14)) for _ in range(50)] + ["Zebra " * 20, "whale"]
    write_parquet(tmp_path / "a.parquet", texts[:40], 7)
    write_jsonl(tmp_path / "b.jsonl.gz", texts[40:])
    found = measure([tmp_path / "a.parquet", tmp_path / "b.jsonl.gz"], {"task": items, "none": []}, ngram=n)
    text = set().union(*(ngrams(text, n) for text in texts))
    task = found.tasks["task"]
    expected = {
        index: (len(ngrams(item, n)), len(shared))
        for index, item in enumerate(items)
        if (shared := ngrams(item, n) & text)
    }
    assert {one.item: (one.ngrams, one.found) for one in task.overlapping} == expected
    assert task.items == len(items)
    assert task.too_short == sum(not ngrams(item, n) for item in items)
    assert task.ngrams == sum(len(ngrams(item, n)) for item in items)
    assert task.found == sum(count for _, count in expected.values())
    assert found.tasks["none"].items == 0
    assert found.coverage.documents == sum(map(bool, texts))
    assert "all of it" in str(found.coverage)
    for one in task.overlapping:
        path, group, row = one.place
        there = texts[7 * group + row] if group is not None else texts[40 + row]
        assert Path(path).name.startswith("b" if group is None else "a")
        assert ngrams(there, n) & ngrams(items[one.item], n)


def test_case_and_punctuation_do_not_matter_but_order_does(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["And so: the OLD whale-man -- said, “go” to the ship! Then he slept."])
    same, other = "the old whale man said go to the ship then he slept", "the ship to go said man whale old the then he"
    task = measure([tmp_path / "a.jsonl"], {"task": [same, other]}, ngram=12).tasks["task"]
    assert [one.item for one in task.overlapping] == [0]
    assert task.too_short == 1


def test_a_long_document_is_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No n-gram is lost or made up where a document is divided."""
    monkeypatch.setattr("pretrain.data.overlap._PART", 50)
    chooser = random.Random(4)
    text = prose(chooser, 400)
    items = [" ".join(gram) for gram in sorted(ngrams(text, 4))] + [prose(chooser, 4) for _ in range(100)]
    index = NgramIndex({"task": items}, 4)
    index.look(text, Place("a", None, 0))
    expected = [number for number, item in enumerate(items) if ngrams(item, 4) & ngrams(text, 4)]
    assert [one.item for one in index.report()["task"].overlapping] == expected


def test_the_validation_split_is_not_training_text(tmp_path: Path) -> None:
    chooser = random.Random(9)
    texts = [prose(chooser, 30) for _ in range(80)]
    write_parquet(tmp_path / "a.parquet", texts, 16)
    found = measure([tmp_path], {"task": texts}, fraction=0.5, ngram=13)
    trained = [index for index, text in enumerate(texts) if not is_validation(text.encode(), 0.5)]
    complete = [one.item for one in found.tasks["task"].overlapping if one.found == one.ngrams]
    assert complete == trained
    assert found.coverage.documents == len(trained) < len(texts)


def test_bounded_coverage_is_spread_and_admitted(tmp_path: Path) -> None:
    chooser = random.Random(2)
    texts = [prose(chooser, 40) for _ in range(3000)]
    for part in range(30):
        write_jsonl(tmp_path / f"{part:02}.jsonl", texts[100 * part : 100 * part + 100])
    size = sum(len(text.encode()) for text in texts)
    found = measure([tmp_path], {"task": texts[::100]}, ngram=13, max_bytes=size // 10)
    coverage = found.coverage
    assert size // 10 <= coverage.text_bytes < size // 8
    assert 26 <= coverage.units <= 30
    assert coverage.complete_units == 0
    said = f"0 of 30 files or row groups in full, the beginning of {coverage.units} others"
    assert said in str(coverage)
    assert len(found.tasks["task"].overlapping) == coverage.units  # the first document of each
    everything = measure([tmp_path], {"task": []}, max_bytes=2 * size).coverage
    assert (everything.text_bytes, everything.complete_units) == (size, 30)


def test_the_verb_reports_items_with_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    write_jsonl(tmp_path / "a.jsonl", ["nothing here", f"Well. {secret.upper()}!"])
    config = tmp_path / "config.yaml"
    changes = {"data.sources": [{"path": str(tmp_path / "a.jsonl")}], "data.lanes": 1, "data.validation_fraction": 0.0}
    config.write_text(yaml.safe_dump(merged(TINY, changes)))
    asked: list[Any] = []

    def items(tasks: list[str], **options: Any) -> dict[str, list[str]]:
        asked.append((tasks, options))
        return {"quiz": ["too short", secret, "the quick brown fox jumps over the lazy dog and runs far away again"]}

    monkeypatch.setitem(sys.modules, "eval.item_texts", SimpleNamespace(item_texts=items))  # takes seconds to import
    out = tmp_path / "new" / "overlap.json"
    arguments = ["data", "overlap", str(config), "--tasks", "quiz, other", "--items", "hub", "--out", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert asked == [(["quiz", "other"], {"items": "hub"})]
    assert "quiz: 1 of 2 items (50.00%) share a 13-gram" in shown
    assert "1 items are too short" in shown
    assert f"item 1: 2 of 2 n-grams, first in {tmp_path / 'a.jsonl'}, row 1" in shown
    report = json.loads(out.read_text())
    assert report["coverage"]["complete"] is True
    [item] = report["tasks"]["quiz"]["overlapping"]
    place = {"path": str(tmp_path / "a.jsonl"), "row_group": None, "row": 1}
    assert item == {"item": 1, "ngrams": 2, "found": 2, "place": place}
