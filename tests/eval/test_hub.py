"""Models are named by Hub id: asked of `$HF_ENDPOINT`, here a server of our own on this machine."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import constants

from eval import hub as eval_hub
from eval.errors import EvalError
from eval.harness import evaluate
from eval.hub import find_snapshot
from eval.models import load_model
from eval.sources import check_model, locate_model
from pretrain.cli.command import main
from tests.eval.conftest import export_model, sha256, small_llama
from tests.eval.test_models import add_code

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# The endpoint is read when the library is imported, hence a process of its own.
CLIENT = """
import json, sys
from pathlib import Path
from eval.items import ItemPackage, PackagedTask
from eval.errors import EvalError
from eval.harness import evaluate

request = json.loads(sys.argv[1])
tasks = {name: PackagedTask(**task) for name, task in request["package"].pop("tasks").items()}
package = ItemPackage(**request["package"], tasks=tasks)
answers = []
for model in request["models"]:
    try:
        result = evaluate(
            model, ["winogrande"], limit=3, cache=Path(request["cache"]), package=package, progress=False
        )
        answers.append(result["model"] | {"acc": result["tasks"]["winogrande"]["acc"]})
    except EvalError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves one repository, made/tiny, from a folder; tests set how it misbehaves."""

    folder: Path
    asked: ClassVar[list[str]] = []
    status: ClassVar[list[int]] = []
    """Answers to the next requests, instead of the content."""
    gated = False
    blocked: threading.Event | None = None
    """What requests wait for."""
    blocks = ""
    """What is in the path of a request that waits."""
    disabled = False
    cuts = ""
    """The file of which half is sent."""
    says: bytes | None = None
    """The description of the model, instead of the right one."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        headers = {"X-Repo-Commit": COMMIT}
        if self.blocked and self.blocks in path:
            self.blocked.wait(30)
        if self.status:
            self.send_response(self.status.pop(0))
            self.finish_with({}, b"", body)
            return
        if self.disabled:
            self.send_response(403)
            self.finish_with({"X-Error-Message": "Access to this resource is disabled."}, b"", body)
            return
        if self.gated and "/resolve/" in path:
            self.send_response(403)
            self.finish_with({"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"", body)
            return
        if path in ("/api/models/made/tiny", *(f"/api/models/made/tiny/revision/{name}" for name in ("main", "v1"))):
            names = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            content = json.dumps({"id": "made/tiny", "modelId": "made/tiny", "sha": COMMIT, "siblings": names}).encode()
            content = content if self.says is None else self.says
            headers["Content-Type"] = "application/json"
        elif path.startswith("/made/tiny/resolve/") and (self.folder / Path(path).name).is_file():
            content = (self.folder / Path(path).name).read_bytes()
            headers["ETag"] = f'"{sha256(content)}"'
            if body and Path(path).name == self.cuts:
                content = content[: len(content) // 2]
        else:
            kind = "EntryNotFound" if "/resolve/" in path else "RevisionNotFound"
            headers["X-Error-Code"] = kind if "/made/tiny/" in path else "RepoNotFound"
            content = b""
            self.send_response(404)
            self.finish_with(headers, content, body)
            return
        self.send_response(200)
        self.finish_with(headers, content, body)

    def finish_with(self, headers: dict[str, str], content: bytes, body: bool) -> None:
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def hub(model_folder: Path) -> type[Hub]:
    return type("Handler", (Hub,), {"folder": model_folder, "asked": [], "status": []})


@pytest.fixture
def endpoint(hub: type[Hub]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def here(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let this process use the server, and a cache of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "secret" * 4)
    monkeypatch.setattr(eval_hub, "_PAUSES", (0.01, 0.01))
    return endpoint


def ask(models: list[str], fetched: dict[str, Any], home: Path, endpoint: str) -> list[Any]:
    """What `evaluate` says of each model: its identity and acc, or the error's message."""
    package = fetched["package"]
    fields = vars(package) | {"tasks": {name: vars(task) for name, task in package.tasks.items()}}
    request = {"models": models, "cache": str(fetched["cache"]), "package": fields}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    run = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(request)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    answers: list[Any] = json.loads(run.stdout)
    return answers


def test_models_are_found_on_the_hub_and_then_in_its_cache(
    tmp_path: Path, model_folder: Path, fetched: dict[str, Any], endpoint: str
) -> None:
    found, other = ask(["made/tiny", "made/other"], fetched, tmp_path, endpoint)
    assert (found["source"], found["name"], found["revision"]) == ("hub", "made/tiny", COMMIT)
    assert "weights_sha256" not in found
    folder_result = evaluate(model_folder, ["winogrande"], limit=3, **fetched)
    assert found["acc"] == folder_result["tasks"]["winogrande"]["acc"]
    assert other.startswith(f"made/other is neither a local folder nor a model on the Hub at {endpoint}")

    nobody = "http://127.0.0.1:9"  # the discard port: connections are refused
    again, other = ask(["made/tiny", "made/other"], fetched, tmp_path, nobody)
    assert again == found
    assert other.startswith("made/other is not a local folder, is not in the Hugging Face cache")
    assert f"the Hub at {nobody} cannot be reached" in other


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_revision_is_resolved_to_its_commit_and_found_again_without_the_hub(
    here: str, hub: type[Hub], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = locate_model("made/tiny@v1")
    options: dict[str, Any] = {"dtype": "auto", "device": torch.device("cpu"), "trust_remote_code": False}
    identity = load_model(source, **options)[2]
    assert identity["revision"] == COMMIT
    assert identity["sha256"] == load_model(locate_model(model_folder), **options)[2]["sha256"]
    asked = len(hub.asked)
    assert load_model(source, **options)[2] == identity
    assert not any("safetensors" in path for path in hub.asked[asked:])  # it is in the cache
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert load_model(source, **options)[2] == identity
    assert load_model(locate_model(f"made/tiny@{COMMIT}"), **options)[2] == identity
    with pytest.raises(EvalError, match="made/tiny@other is not a local folder, is not in the Hugging Face cache"):
        load_model(locate_model("made/tiny@other"), **options)


def test_only_what_an_evaluation_needs_is_downloaded(
    here: str, hub: type[Hub], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code only if it may run; and weights in one format."""
    folder = tmp_path / "served"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    small_llama().save_pretrained(folder, max_shard_size="600KB")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "picture.png").write_bytes(b"never read")
    marker = tmp_path / "marker"
    add_code(folder, marker)
    monkeypatch.setattr(hub, "folder", folder)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    options: dict[str, Any] = {"dtype": "auto", "device": torch.device("cpu")}
    with pytest.raises(EvalError, match=r"made/tiny can only be loaded.*none of it was run.*--trust-remote-code"):
        load_model(locate_model("made/tiny"), **options, trust_remote_code=False)
    snapshot = find_snapshot("made/tiny", None, with_code=False).folder
    pieces = {path.name for path in folder.glob("model*safetensors*")}
    assert len(pieces) > 2
    assert pieces <= names_in(snapshot)
    assert not names_in(snapshot) & {"modeling_odd.py", "pytorch_model.bin", "picture.png"}
    assert not marker.exists()
    load_model(locate_model("made/tiny"), **options, trust_remote_code=True)
    assert marker.exists()


def test_a_gated_model_says_how_to_get_access(here: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "gated", True)
    with pytest.raises(EvalError, match=f"made/tiny is gated: request access at {here}/made/tiny") as raised:
        find_snapshot("made/tiny", None, with_code=False)
    assert "secret" not in str(raised.value)
    with pytest.raises(EvalError, match="made/tiny is gated"):
        check_model(locate_model("made/tiny"))


def test_a_disabled_model_is_no_matter_of_the_token(here: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "disabled", True)
    with pytest.raises(EvalError, match=f"the Hub at {here} has disabled access to it") as raised:
        check_model(locate_model("made/tiny"))
    assert "HF_TOKEN" not in str(raised.value)


def test_a_file_that_arrives_in_part_is_called_incomplete(
    here: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "cuts", "model.safetensors")
    with pytest.raises(EvalError, match=f"cannot download made/tiny: the Hub at {here} sent an incomplete file"):
        find_snapshot("made/tiny", None, with_code=False)
    monkeypatch.setattr(hub, "cuts", "")
    assert (find_snapshot("made/tiny", None, with_code=False).folder / "model.safetensors").is_file()


def test_missing_models_and_revisions_are_told_apart(here: str) -> None:
    with pytest.raises(EvalError, match=f"made/other is neither a local folder nor a model on the Hub at {here}"):
        find_snapshot("made/other", None, with_code=False)
    with pytest.raises(EvalError, match="made/tiny has no revision 'v9'"):
        find_snapshot("made/tiny", "v9", with_code=False)


def test_a_model_without_weights_is_refused(
    here: str, hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_model(tmp_path / "bare", small_llama())
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(hub, "folder", folder)
    with pytest.raises(EvalError, match=r"made/tiny has no weights: none of model\.safetensors"):
        find_snapshot("made/tiny", None, with_code=False)
    (folder / "config.json").unlink()
    with pytest.raises(EvalError, match=r"has no config\.json"):
        find_snapshot("made/tiny", None, with_code=False)


@pytest.mark.parametrize(("status", "advice"), [(500, "try again later"), (401, "check the token in HF_TOKEN")])
def test_the_hubs_answer_is_in_the_message(here: str, hub: type[Hub], status: int, advice: str) -> None:
    hub.status[:] = [status] * 9
    with pytest.raises(EvalError, match=f"the Hub at {here} answered {status} .*{advice}"):
        find_snapshot("made/tiny", None, with_code=False)


def test_a_failing_hub_is_asked_again_and_then_its_cache(here: str, hub: type[Hub]) -> None:
    hub.status[:] = [503, 500]
    first = find_snapshot("made/tiny", None, with_code=False)
    assert first.note == ""
    hub.status[:] = [500] * 9
    second = find_snapshot("made/tiny", None, with_code=False)
    assert (second.folder, second.commit) == (first.folder, first.commit)
    assert f"the Hub at {here} answered 500" in second.note


def test_a_hub_is_waited_for_but_not_for_ever(here: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()
    monkeypatch.setattr(hub, "blocked", slow)
    threading.Timer(1.0, slow.set).start()
    assert find_snapshot("made/tiny", "v1", with_code=False).commit == COMMIT
    never = threading.Event()
    monkeypatch.setattr(hub, "blocked", never)
    monkeypatch.setattr(eval_hub, "ANSWER_SECONDS", 0.5)
    with pytest.raises(EvalError, match=r"did not answer within 0\.5 seconds"):
        find_snapshot("made/other", None, with_code=False)
    assert not never.is_set()
    never.set()


def test_a_hub_that_describes_a_model_and_does_not_send_it_is_waited_for_once(
    here: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(hub, "blocked", never)
    monkeypatch.setattr(hub, "blocks", "/resolve/")
    monkeypatch.setattr(eval_hub, "ANSWER_SECONDS", 0.5)
    with pytest.raises(
        EvalError, match=r"made/tiny is not .* in the .*cache, and .*did not answer within 0\.5 seconds"
    ):
        check_model(locate_model("made/tiny"))
    assert not never.is_set()
    never.set()
    monkeypatch.setattr(eval_hub, "ANSWER_SECONDS", 4.0)
    hub.status[:] = [503]
    check_model(locate_model("made/tiny"))
    find_snapshot("made/tiny", None, with_code=False)
    again = threading.Event()
    monkeypatch.setattr(hub, "blocked", again)
    monkeypatch.setattr(eval_hub, "ANSWER_SECONDS", 0.5)
    check_model(locate_model("made/tiny"))  # it is in the cache
    again.set()


@pytest.mark.parametrize("says", [b"", b"<html>Log in</html>", b"[]", b"{}", b"null", b'{"siblings": 3}'])
def test_an_answer_that_is_not_of_a_hub_is_called_invalid(
    here: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, says: bytes
) -> None:
    monkeypatch.setattr(hub, "says", says)
    with pytest.raises(EvalError, match=f"cache, and the Hub at {here} returned an invalid response"):
        find_snapshot("made/tiny", None, with_code=False)


@pytest.mark.parametrize("name", ["made--tiny", "made/ti..ny", "made/tiny.git", "m" * 97, "made/tiny-"])
def test_a_name_that_no_model_of_the_hub_can_have_is_refused_without_asking(
    here: str, hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["eval", name, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no model at {name}: neither a Hugging Face folder nor a valid Hub id" in line
    assert hub.asked == []


def test_a_name_that_cannot_be_looked_up_takes_no_longer(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name servers that do not answer block for half a minute, whatever the time limit of the connection."""
    answered = threading.Event()

    def hang(*_: object, **__: object) -> None:
        answered.wait(30)
        raise OSError("no such host")

    monkeypatch.setattr(eval_hub, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(EvalError, match=r"did not answer within 0\.5 seconds"):
        find_snapshot("made/tiny", None, with_code=False)
    assert not answered.is_set()
    answered.set()


def test_a_single_model_is_asked_for_before_anything_is_fetched(
    here: str, hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eval.tasks.fetch_items", lambda *_, **__: pytest.fail("the items were fetched first"))
    assert main(["eval", "made/other", "--tasks", "helaswag", "--out", str(tmp_path / "out")]) == 2
    assert "did you mean hellaswag?" in capsys.readouterr().err
    assert hub.asked == []
    for name, message in (
        ("made/other", f"made/other is neither a local folder nor a model on the Hub at {here}"),
        ("made/tiny@v9", "made/tiny has no revision 'v9'"),
    ):
        assert main(["eval", name, "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not any("safetensors" in path for path in hub.asked)


IMPORTED = """
import sys
from pretrain.cli import main
print([main(["eval", name, "--out", "out"]) for name in sys.argv[1:]])
print(sorted({"torch", "transformers", "datasets", "lm_eval"} & sys.modules.keys()))
"""


def test_a_single_model_is_asked_for_before_torch_and_lm_eval_are_imported(
    endpoint: str, hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take seconds: a model that is missing, gated or nowhere is reported without them."""
    monkeypatch.setattr(hub, "gated", True)
    config = tmp_path / "one.yaml"
    config.write_text("models: [{model: made/tiny, revision: v8}]\ntasks: [{name: piqa, shots: 0}]\n")
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, "made/other", "made/tiny", "made/tiny@v9", "no such folder", str(config)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["[2, 2, 2, 2, 2]", "[]"]
    missing, gated, revision, nowhere, in_file = done.stderr.splitlines()
    assert "made/other is neither a local folder nor a model" in missing
    assert "made/tiny is gated: request access" in gated
    assert "has no revision 'v9'" in revision
    assert "no model at no such folder" in nowhere
    assert "has no revision 'v8'" in in_file
    assert list(tmp_path.glob("out")) == []
