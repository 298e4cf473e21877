"""The command line: help, exit codes, and messages instead of tracebacks."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.store import CheckpointReader
from pretrain.cli import main
from pretrain.cli.command import build_parser
from pretrain.cli.reference import PAGE, page, verb_parsers
from pretrain.config import Config

MakeConfig = Callable[..., Config]
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def config_file(tiny_config: MakeConfig, tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(tiny_config({"train.total_tokens": 4 * 768, "schedule.warmup_tokens": 0}).to_yaml())
    return file


VERBS = (
    *("check", "config", "data", "train", "status", "checkpoint", "slurm"),
    *("plan", "sweep", "export", "eval", "result", "compare", "compare-page", "report"),
)


@pytest.mark.parametrize("arguments", [("--help",), *((verb, "--help") for verb in VERBS)])
def test_help_loads_no_heavy_library(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        "from pretrain.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print('loaded:', *sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    shown, loaded = done.stdout.split("loaded:")
    assert {"torch", "numpy", "pydantic", "yaml", "accelerate", "optimizers"}.isdisjoint(loaded.split())
    assert "pretrain" in loaded.split()
    for verb in VERBS if arguments == ("--help",) else ():
        assert re.search(rf"\n    {verb}\s", shown)


def test_every_argument_of_every_verb_has_help() -> None:
    verbs = dict(verb_parsers(build_parser()))
    assert tuple(dict.fromkeys(name.partition(" ")[0] for name in verbs)) == VERBS
    for name, (verb, _) in verbs.items():
        assert verb.description, name
        for action in verb._actions:
            assert action.help, (name, action.dest)
            default = action.default not in (None, False, argparse.SUPPRESS, [])
            assert not default or "%(default)s" in action.help, (name, action.dest)


def test_the_page_of_the_command_line_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails: ``python -m pretrain.cli.reference``."""
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert PAGE.read_text(encoding="utf-8") == page()
    for verb in dict(verb_parsers(build_parser())):
        assert f"\n## aurora {verb}\n" in page()
    assert "--local" not in page()


@pytest.mark.parametrize("spelling", ["--local_rank=1", "--local-rank=1"])
def test_the_local_rank_of_deepspeeds_launcher_is_accepted(spelling: str, config_file: Path) -> None:
    options = build_parser().parse_args([spelling, "train", str(config_file), "run.seed=7"])
    assert (options.config, options.overrides) == (str(config_file), ["run.seed=7"])


@pytest.mark.parametrize("name", ["quickstart", "aurora-1.1b", "aurora-340m", "speedrun-3175"])
def test_check_shows_what_a_shipped_config_amounts_to(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["check", f"configs/{name}.yaml"]) == 0
    out = capsys.readouterr().out
    tall = "up_proj" if name == "speedrun-3175" else "gate_proj"
    for part in (f"model.layers.0.mlp.{tall}.weight", "tall", "wide", "square", "aurora", "adamw", "lr scale"):
        assert part in out
    for part in ("parameters", "steps", "tokens", "FLOPs", "per token"):
        assert part in out
    if name == "aurora-1.1b":
        assert "not checked: hf://datasets/allenai/dolma3_mix-150B-1025@" in out
        assert "not checked: the tokenizer" in out
        assert "8192 x 2048" in out
        assert "190,735 steps" in out
    if name == "aurora-340m":
        assert "339,776,640 without embeddings" in out
        assert "16,384 steps" in out
    if name == "speedrun-3175":
        assert "162,354,816 parameters" in out
        assert "3,200 steps" in out
        assert "decay over the last 1,174,405,120 tokens (2,240 steps)" in out


def test_train_export_and_load(config_file: Path, tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Fault of a famous trainer: rotary layout changed by the export. Logits must be equal to the bit."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pretrain.export.run import open_checkpoint
    from pretrain.model.build import build_model

    config = tiny_config()
    assert main(["train", str(config_file), "model.rope_theta=50000"]) == 0
    out = tmp_path / "export"
    assert main(["export", str(config.run_folder), str(out)]) == 0
    assert main(["export", str(config.run_folder), str(out)]) == 0  # an earlier export is replaced

    trained = build_model(tiny_config({"model.rope_theta": 5e4}).model, seed=0)
    trained.load_state_dict(open_checkpoint(config.run_folder).weights(), strict=False)
    trained.tie_weights()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.randint(8192, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, trained(tokens).logits)

    raw = Tokenizer.from_file(str(out / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    for text in ("Call me Ishmael.", " two  spaces\n\n", "naïve 日本 🐳"):
        assert tokenizer(text).input_ids == raw.encode(text).ids
    card = (out / "README.md").read_text()
    assert "CC0-1.0" in card
    assert "moby_dick" in card
    assert json.loads((out / "aurora.json").read_text())["step"] == 4


def test_report_of_a_run_that_is_not_finished(
    config_file: Path, tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config_file), "--stop-at", "2"]) == 75
    capsys.readouterr()
    folder = tiny_config().run_folder
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert "Training loss" in (folder / "report.html").read_text()
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert json.loads((tmp_path / "page.json").read_text())["jobs"][0]["step"] == 2


def test_an_export_needs_only_the_run_folder(config_file: Path, tiny_config: MakeConfig, tmp_path: Path) -> None:
    import shutil

    assert main(["train", str(config_file), "--stop-at", "2"]) == 75
    moved = tmp_path / "elsewhere"
    shutil.move(tiny_config().run_folder, moved)
    assert main(["export", str(moved / "checkpoints" / "step-00000002"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["export", "nowhere", "out"], "neither a checkpoint nor a run"),
        (["train", "nowhere.yaml"], "no such config file"),
        (["check", "nowhere.yaml"], "no such config file"),
        (["report", "nowhere"], "no such folder"),
        (["report", "."], "neither a run nor a sweep"),
        (["eval", "nowhere", "--tasks", "helaswag", "--out", "out"], "hellaswag"),
    ],
)
def test_bad_input_exits_2_with_a_message(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train"], ["train", "x.yaml", "--stop-at", "0"], ["check", "x.yaml", "--fast"]]
)
def test_a_wrong_command_line_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_overrides_may_stand_behind_options(config_file: Path, tiny_config: MakeConfig) -> None:
    assert main(["train", str(config_file), "run.seed=7", "--stop-at", "1", "optimizer.lr=0.5"]) == 75
    resolved = (tiny_config().run_folder / "config.yaml").read_text()
    assert "seed: 7" in resolved
    assert "lr: 0.5" in resolved


BAD_DATA: dict[str, tuple[str, bytes | None, str]] = {
    "missing file": ("gone.jsonl", None, "gone.jsonl"),
    "invalid UTF-8": ("text.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "UTF-8"),
    "invalid JSON": ("text.jsonl", b'{"text": "fine"}\n{"text": \n', "JSON"),
    "empty file": ("text.jsonl", b"", "text.jsonl"),
    "damaged parquet": ("text.parquet", b"PAR1 but not really", "text.parquet"),
    "no text key": ("text.jsonl", b'{"body": "fine"}\n', "text"),
    "unknown kind of file": ("text.docx", b"x", "text.docx"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_before_training(
    name: str, config_file: Path, tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, content, part = BAD_DATA[name]
    if content is not None:
        (tmp_path / file).write_bytes(content)
    sources = f"data.sources=[{{path: {json.dumps(str(tmp_path / file))}, split_units: 4}}]"
    for verb in ("check", "train"):
        assert main([verb, str(config_file), sources]) == 2
        error = capsys.readouterr().err
        assert part in error
        assert "Traceback" not in error
    assert not tiny_config().run_folder.exists()


def aurora(*arguments: str, command: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    full = [sys.executable, *command, "-m", "pretrain", *arguments]
    return subprocess.run(full, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=240)


@pytest.mark.long
def test_several_processes_train_stop_and_continue_with_our_exit_codes(
    config_file: Path, tiny_config: MakeConfig
) -> None:
    stopped = aurora("train", str(config_file), "--processes", "2", "--stop-at", "2")
    assert stopped.returncode == 75, stopped.stderr
    assert "2 ranks" in stopped.stdout
    assert stopped.stdout.count("saved ") == 1  # rank 0 alone speaks
    refused = aurora("train", str(config_file), "--processes", "2", "optimizer.lr=0.5", "model.rope_theta=5")
    assert refused.returncode == 2
    assert refused.stderr.count("optimizer.lr: 0.02 in the run, 0.5 now") == 1
    for done in (stopped, refused):
        assert "Traceback" not in done.stderr

    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = aurora("train", str(config_file), command=launcher)
    assert done.returncode == 0, done.stderr
    index = CheckpointReader(tiny_config().run_folder / "checkpoints" / "step-00000004").index
    assert index["world_size"] == 2
