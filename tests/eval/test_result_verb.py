"""``aurora result``, and what ``aurora eval`` does besides scoring tasks."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval import identities, lm_eval_files
from eval.harness import evaluate
from eval.item_identity import ItemIdentity
from eval.item_texts import item_texts
from eval.overlap_report import text_hash
from eval.results import read_result, write_result
from pretrain.cli import held_out, main
from pretrain.cli.command import build_parser, parse
from pretrain.cli.evaluate import _arguments
from pretrain.cli.reference import verb_parsers
from pretrain.config import Config, parse_config
from pretrain.data.split import is_validation
from tests.conftest import TINY, merged
from tests.eval.results import a_result, write


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path, fetched: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A result, with its made-up items where the verbs look for them."""
    monkeypatch.setattr(identities, "item_identities", partial(identities.item_identities, **fetched))
    monkeypatch.setattr(lm_eval_files, "write_lm_eval_files", partial(lm_eval_files.write_lm_eval_files, **fetched))
    write_result(evaluate(model_folder, ["hellaswag"], limit=8, **fetched), tmp_path / "result")
    return tmp_path / "result"


def test_a_result_is_marked_in_place_or_elsewhere(
    tmp_path: Path, folder: Path, fetched: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "results.json").read_bytes()
    (tmp_path / "list.txt").write_text("1\n2\n9\n")
    hashes = [text_hash(text) for text in item_texts(["hellaswag"], **fetched)["hellaswag"]]
    task = {"too_short": 0, "overlapping": [{"item": 3}], "item_hashes": hashes}
    report = {"ngram": 13, "coverage": {"complete": True, "text_bytes": 5}, "tasks": {"hellaswag": task}}
    (tmp_path / "overlap.json").write_text(json.dumps(report))
    marks = ["--subset", f"mine={tmp_path}/list.txt", "--overlap", str(tmp_path / "overlap.json")]
    assert main(["result", str(folder), *marks, "--out", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    assert "  mine" in shown
    assert "2 of 3" in shown
    assert "  without overlap" in shown
    assert f"result in {tmp_path}/new/results.json" in shown
    assert (folder / "results.json").read_bytes() == before
    assert main(["result", str(folder / "results.json"), *marks]) == 0
    assert read_result(folder) == read_result(tmp_path / "new")
    assert main(["result", str(folder)]) == 0
    assert "  without overlap" in capsys.readouterr().out


def test_a_result_is_converted(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["result", str(folder), "--format", "lm-eval", "--out", str(tmp_path / "files")]) == 0
    [results] = (tmp_path / "files").rglob("results_*.json")
    assert f"wrote {results}" in capsys.readouterr().out
    assert len(list(results.parent.glob("samples_hellaswag_*.jsonl"))) == 1
    assert not (tmp_path / "files" / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no result given"),
        (["{}", "--format", "lm-eval"], "needs --out"),
        (["{}/missing"], "no result of an evaluation"),
        (["{}", "--overlap", "{}/missing"], "cannot read"),
        (["{}", "--subset", "silverswag"], "unknown subset 'silverswag'"),
    ],
)
def test_bad_requests_are_refused_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = (folder / "results.json").read_bytes()
    assert main(["result", *(word.format(folder) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert (folder / "results.json").read_bytes() == before


def test_eval_measures_bits_per_byte_alone(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sea.txt").write_text("The whale, the sea. " * 40)
    command = ["eval", str(model_folder), "--tasks", "", "--bits-per-byte", str(tmp_path / "sea.txt"), "--stride", "16"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    text = read_result(tmp_path / "out")["bits_per_byte"]["sea"]
    assert (text["documents"], text["stride"], text["bytes"]) == (1, 16, 800)
    assert "bits per byte" in capsys.readouterr().out
    for extra, message in (
        (["--bits-per-byte", "nowhere"], "no text 'nowhere'"),
        (["--bits-per-byte", "validation"], "is the validation split of a run, and the model is not one"),
        (["--subset", "silverswag"], "unknown subset 'silverswag'"),
        (["--overlap", str(tmp_path / "nowhere")], "cannot read"),
    ):
        assert main([*command, *extra, "--out", str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    lines = [json.dumps({"text": f"document {number} about the sea"}) for number in range(400)]
    for name, own in (("a", lines[:250]), ("b", lines[250:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(own) + "\n")
    sources = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl")}]
    changes = {"data.sources": sources, "data.lanes": 1, "data.validation_fraction": 0.2}
    return parse_config(merged(TINY, changes))


def run_of(config: Config, folder: Path) -> Callable[[Path], Any]:
    checkpoint = SimpleNamespace(index={"config": config.model_dump(mode="json")}, folder=folder / "run/checkpoints/1")
    return lambda path: checkpoint


def test_the_validation_split_of_a_run_is_a_text(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.export.run.open_checkpoint", run_of(config, tmp_path))
    (text,) = held_out.held_out_texts(["validation"], tmp_path / "run")
    expected = [f"document {number} about the sea" for number in range(400)]
    held = [document for document in expected if is_validation(document.encode(), 0.2)]
    assert sorted(text.documents) == sorted(held)
    assert 40 < len(held) < 120
    assert text.name == "validation"
    assert text.origin == f"validation split of {config.run.name}"
    few = config.model_copy(update={"validation": config.validation.model_copy(update={"max_tokens": 20})})
    monkeypatch.setattr("pretrain.export.run.open_checkpoint", run_of(few, tmp_path))
    (text,) = held_out.held_out_texts(["validation"], tmp_path / "run")
    assert sum(len(document) for document in text.documents) in range(100, 130)


def test_several_processes_get_the_same_command_line() -> None:
    words = ["--bits-per-byte", "lambada", "--bits-per-byte", "sea=a,b.txt", "--subset", "goldenswag", "--tasks", ""]
    words += ["--stride", "7", "--overlap", "report.json", "--format", "lm-eval", "--out", "out", "--overwrite"]
    options = parse(["eval", "one", "two", *words, "--processes", "2"])
    again = parse(["eval", *_arguments(options)])
    assert vars(again) | {"processes": 2} == vars(options)
    assert again.bits_per_byte == ["lambada", "sea=a,b.txt"]


def test_names_that_are_no_paths_in_a_file_are_refused(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = 'bits_per_byte: ["a\\0"]\noverlap: "b\\0"\nsubset: ["c=d\\0.txt", "e=f\\0.parquet"]'
    config = tmp_path / "c.yaml"
    config.write_text(f"models: [{model_folder}]\n{keys}")
    assert main(["eval", str(config), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: ") for line in lines)


def test_every_option_reaches_each_of_several_processes() -> None:
    """Whatever option is added: its values are those of the parser itself."""
    verb = dict(verb_parsers(build_parser()))["eval"][0]
    words = []
    for action in verb._actions:
        if action.option_strings and action.dest not in ("help", "processes"):
            value = str(next(iter(action.choices))) if action.choices else "3"
            for text in ("-3", value) if isinstance(action, argparse._AppendAction) else (value,):
                words += [action.option_strings[-1]] if action.nargs == 0 else [f"{action.option_strings[-1]}={text}"]
    options = parse(["eval", *words, "--processes", "2", "--", "-leading", "with blank", "c.yaml"])
    assert options.models == ["-leading", "with blank", "c.yaml"]
    unset = [name for name, value in vars(options).items() if value in (None, False) and name != "local_rank"]
    assert unset == []
    assert vars(parse(["eval", *_arguments(options)])) | {"processes": 2} == vars(options)


def test_a_marked_result_replaces_its_own_file_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = [ItemIdentity(f"hellaswag-{place}", "", ()) for place in range(3)]
    monkeypatch.setattr(identities, "item_identities", lambda *_, **__: {"hellaswag": hashes})
    mine, result = tmp_path / "mine.json", a_result({"hellaswag": [1, 0, 1]})
    mine.write_text(json.dumps(result))
    other = write(tmp_path, a_result({"hellaswag": [0, 0, 1]}, "other"))
    before = (other / "results.json").read_bytes()
    (tmp_path / "list.txt").write_text("1")

    def mark(*names: str, out: Path | None = None) -> int:
        subsets = [word for name in names for word in ("--subset", f"{name}={tmp_path}/list.txt")]
        return main(["result", str(mine), *subsets, *(["--out", str(out)] if out else [])])

    new = tmp_path / "new"
    assert [mark("one", "two", out=new), mark("one", "two", out=new)] == [0, 0]
    capsys.readouterr()
    assert mark("one", out=new) == 2
    assert f"{new}/results.json also has the subset two, which would be lost" in capsys.readouterr().err
    assert mark("one", out=tmp_path) == 2
    assert "holds another result, which would be lost; choose another --out" in capsys.readouterr().err
    assert mark("one") == 0
    assert f"result in {mine}" in capsys.readouterr().out
    assert list(read_result(mine)["tasks"]["hellaswag"]["subsets"]) == ["one"]
    assert (other / "results.json").read_bytes() == before


IMPORTED = """
import sys
from pretrain.cli import main
print(main(["result", sys.argv[1], "--subset", "goldenswag"]))
print(sorted({"torch", "datasets", "lm_eval"} & sys.modules.keys()))
"""


def test_a_subset_that_nobody_has_is_refused_before_lm_eval_is_imported(tmp_path: Path) -> None:
    made_up = write(tmp_path / "out", a_result({"hellaswag": [1, 0]}))
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    command = [sys.executable, "-c", IMPORTED, str(made_up)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines() == ["2", "[]"]
    (line,) = done.stderr.splitlines()
    assert "cannot fetch the subset goldenswag" in line
