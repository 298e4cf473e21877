"""`aurora eval` of suites, config files and several models: what is asked for, what is refused, what is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from eval.config import EvalConfig, ModelSection, load_eval_config
from eval.errors import EvalError
from eval.harness import evaluation
from eval.models import DType
from eval.results import read_result
from eval.score_cache import ScoreCache
from eval.scoring import Score
from eval.sharing import Team
from eval.suites import SUITES, TaskChoice, choose, suite
from eval.tasks import check_tasks
from pretrain.cli.command import main
from pretrain.config import ConfigError
from pretrain.shipped import shipped
from tests.eval.conftest import cache_with_items, export_model, small_llama

# --- suites -------------------------------------------------------------------------------------


def test_suites_name_tasks_shots_and_metrics() -> None:
    assert suite("core") == (TaskChoice("hellaswag", 0, "acc_norm"), TaskChoice("winogrande", 0, "acc"))
    assert suite("leaderboard") == (TaskChoice("hellaswag", 10, "acc_norm"), TaskChoice("winogrande", 5, "acc"))
    assert [task.name for task in suite("standard")][:2] == ["hellaswag", "winogrande"]
    assert {"arc_easy", "arc_challenge", "piqa", "openbookqa", "boolq", "sciq", "lambada_openai"} <= {
        task.name for task in suite("standard")
    }
    assert suite("mmlu")[0].shots == 5
    assert all(task.metric for tasks in SUITES.values() for task in tasks)
    with pytest.raises(EvalError, match="unknown suite 'cor'; did you mean core"):
        suite("cor")


def test_all_suites_but_the_one_with_training_splits_have_packaged_items() -> None:
    for name in ("core", "standard", "mmlu"):
        check_tasks(suite(name), "packaged")
    with pytest.raises(EvalError) as caught:
        check_tasks(suite("leaderboard"), "packaged")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["task hellaswag", "task winogrande"]
    assert all("pass --items hub" in line for line in lines)
    check_tasks(suite("leaderboard"), "hub")


def test_shots_of_the_command_line_replace_those_of_the_suite() -> None:
    assert choose(suite("mmlu"), 0) == [TaskChoice("mmlu", 0, "acc")]


# --- config files -------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_configs_are_valid() -> None:
    files = sorted(shipped("configs/eval").glob("*.yaml"))
    assert {"core.yaml", "paper.yaml"} <= {file.name for file in files}
    for file in files:
        config = load_eval_config(file)
        check_tasks(choose(config.choices()), config.items or "packaged")
        names = [model.name for model in config.models]
        assert len(names) == len(set(names)) > 0
    config = load_eval_config(shipped("configs/eval/core.yaml"))
    assert [model.name for model in config.models] == ["quickstart", "smollm2-135m"]
    assert config.choices() == list(SUITES["core"])


def test_a_config_names_models_tasks_and_settings(tmp_path: Path) -> None:
    text = """
models:
  - runs/a
  - {model: org/name, revision: v1.0, dtype: bfloat16, trust_remote_code: true, label: other}
suite: core
tasks: [piqa, {name: mmlu, shots: 5, metric: acc}]
limit: 20
selection: spread
items: hub
batch_size: auto
device: cpu
"""
    config = load_eval_config(write(tmp_path / "c.yaml", text))
    assert [(model.source, model.name) for model in config.models] == [("runs/a", "a"), ("org/name@v1.0", "other")]
    assert (config.models[1].dtype, config.models[1].trust_remote_code) == ("bfloat16", True)
    assert config.choices() == [*SUITES["core"], TaskChoice("piqa"), TaskChoice("mmlu", 5, "acc")]
    assert (config.limit, config.selection, config.items, config.batch_size) == (20, "spread", "hub", "auto")


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("modles: []", ["modles: unknown key; did you mean models?"]),
        ("models:\n  - {modell: a}", ["models.0.modell: unknown key; did you mean model?", "models.0.model: required"]),
        ("models:\n  - {model: a, label: ../b}", ["models.0.label: expected letters, digits"]),
        ("models:\n  - {model: a, dtype: bf16}", ["models.0.dtype: input should be 'auto', 'float32'"]),
        ("models:\n  - {model: a, trust_remote_code: 'yes'}", ["models.0.trust_remote_code: input should be a valid"]),
        ("models:\n  - 3", ["models.0: input should be"]),
        ("suite: cor", ["suite: expected one of core, leaderboard, mmlu, standard, got 'cor'"]),
        ("tasks: [{name: piqa, shots: -1}]", ["tasks.0.shots: input should be greater than or equal to 0, got -1"]),
        ("tasks: [{name: piqa, metric: f1}]", ["tasks.0.metric: input should be 'acc' or 'acc_norm'"]),
        ("limit: 0\nitems: disk", ["items: input should be 'packaged' or 'hub'", "limit: input should be greater"]),
        ("batch_size: many", ["batch_size: "]),
        ("limit: !!python/object/apply:os.system [id]", ["not valid YAML"]),
        ("limit: 1\nlimit: 2", ["limit: given twice"]),
        ("- a", ["expected sections"]),
    ],
)
def test_a_wrong_config_gets_a_line_for_each_problem(tmp_path: Path, text: str, problems: list[str]) -> None:
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_eval_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(problems)
    for line, problem in zip(sorted(lines), sorted(problems), strict=True):
        assert line.startswith(f"{path}: ")
        assert problem in line


def test_dtypes_of_configs_are_those_of_models() -> None:
    annotation = ModelSection.model_fields["dtype"].annotation
    assert set(get_args(annotation)) == set(get_args(DType))
    assert EvalConfig().choices() == []


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def made_up(fetched: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """`aurora eval` with made-up items and a cache of its own."""
    cache = cache_with_items(fetched, tmp_path / "cache")
    monkeypatch.setenv("AURORA_CACHE", str(cache))
    made_up = partial(evaluation, package=fetched["package"])
    monkeypatch.setattr("pretrain.cli.evaluation_run.evaluation", made_up)
    return {"cache": cache}


@pytest.mark.usefixtures("made_up")
def test_several_models_get_a_folder_each_and_one_table(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = export_model(tmp_path / "other", small_llama(seed=1))
    text = f"models: [{{model: {model_folder}, label: one}}, {other}]\nsuite: core\nlimit: 3\n"
    config, out = str(write(tmp_path / "c.yaml", text)), tmp_path / "out"
    scored: list[int] = []
    real = ScoreCache.add

    def add(self: ScoreCache, scores: Mapping[str, Score]) -> None:
        scored.append(len(scores))
        real(self, scores)

    monkeypatch.setattr(ScoreCache, "add", add)
    assert main(["eval", config, "--out", str(out)]) == 0
    results = {label: read_result(out / label) for label in ("one", "other")}
    assert [result["suite"] for result in results.values()] == ["core", "core"]
    assert [result["tasks"]["hellaswag"]["metric"] for result in results.values()] == ["acc_norm", "acc_norm"]
    captured = capsys.readouterr()
    assert "[1/2] one" in captured.err
    assert "1 of 2 models evaluated in" in captured.err
    table = captured.out.splitlines()[-3:]
    assert table[0].split() == ["model", "hellaswag", "acc_norm", "winogrande", "acc"]
    assert [line.split()[0] for line in table[1:]] == ["one", "other"]
    assert sum(scored) == 2 * 3 * 6

    # The comparison page takes the same config, and the folder of the results.
    assert main(["compare-page", config, str(out), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "comparison.md").read_text()
    assert "2 of 2 models run." in page
    assert "**other against one**" in page
    assert "the result is of" not in page  # another model than the config's
    assert page.count(f"| {results['one']['tasks']['winogrande']['acc']:.4f} ") > 0

    # The command line takes precedence, and the same scores serve it.
    assert main(["eval", config, "--tasks", "winogrande,", "--limit", "2", "--out", str(tmp_path / "less")]) == 0
    less = read_result(tmp_path / "less" / "one")
    assert (list(less["tasks"]), less["limit"]) == (["winogrande"], 2)
    assert "suite" not in less
    assert sum(scored) == 2 * 3 * 6
    assert main(["eval", config, "--no-cache", "--tasks", "winogrande", "--limit", "2", "--out", str(out / "x")]) == 0
    assert sum(scored) == 2 * 3 * 6


@pytest.mark.usefixtures("made_up")
def test_a_model_that_cannot_be_loaded_does_not_stop_the_others(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = export_model(tmp_path / "broken", small_llama())
    (broken / "model.safetensors").write_bytes(b"")
    command = ["eval", str(broken), str(model_folder), "--limit", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "error: broken: cannot load the model" in capsys.readouterr().err
    assert [path.parent.name for path in (tmp_path / "out").glob("*/results.json")] == ["out"]
    assert read_result(tmp_path / "out" / "out")["model"]["name"] == str(model_folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a/model", "b/model"], "several models have the label model"),
        (["a.yaml", "b.yaml"], "expected at most one YAML file"),
        (["none.yaml"], "none.yaml: no such config file"),
        (["org/name", "--suite", "cor"], "unknown suite 'cor'; did you mean core?"),
        (["org/name", "--suite", "leaderboard"], "pass --items hub"),
        (["org/name", "--tasks", "piqa", "--shots", "3"], "task piqa: the 3 solved examples"),
        (["no/such/model"], "no/such/model"),
        (["org/name", "--tasks", ","], "no task given"),
    ],
)
def test_a_wrong_command_is_refused(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_config_without_models_needs_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path / "c.yaml", "suite: core")
    assert main(["eval", str(config), "--out", str(tmp_path / "out")]) == 2
    assert f"{config}: models: it names none" in capsys.readouterr().err


def test_processes_get_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("pretrain.processes.torchrun.run_processes", lambda *arguments: started.append(arguments) or 75)
    words = [
        "org/name",
        "--tasks",
        "piqa,boolq",
        "--limit",
        "3",
        "--shots",
        "0",
        "--no-cache",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["eval", *words, "--processes", "3"]) == 75
    ((count, arguments),) = started
    assert count == 3
    asked: list[Any] = []

    @contextmanager
    def refuse(tasks: list[TaskChoice], **settings: Any) -> Iterator[Any]:
        asked.append((tasks, settings))
        raise EvalError("enough")
        yield

    monkeypatch.setattr("pretrain.cli.evaluation_run.evaluation", refuse)
    monkeypatch.setattr("eval.models.check_model", lambda _: None)  # asks the Hub
    assert "--shots" in arguments
    assert [main(arguments), main(["eval", *words])] == [2, 2]
    assert asked[0] == asked[1]
    assert [task.name for task in asked[0][0]] == ["piqa", "boolq"]
    assert asked[0][1]["keep_scores"] is False
    assert asked[0][1]["team"] == Team()
