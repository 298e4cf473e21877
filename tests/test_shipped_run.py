"""configs/aurora-1.1b.yaml against a loopback copy of the layout of its sources."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pretrain.config import load_config
from pretrain.data.lock import load_lock
from tests.conftest import REPOSITORY
from tests.data.corpus import make_texts
from tests.data.hub_server import Hub, hub_server

CONFIG = "configs/aurora-1.1b.yaml"
# Small enough for a CPU, with everything else as shipped; the second stage begins after the third step.
REDUCED = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.context_length=64",
    "train.global_batch_tokens=512",
    "train.total_tokens=2560",
    "train.micro_batch_sequences=2",
    "train.loss_chunk_tokens=null",
    "schedule.warmup_tokens=512",
    "data.stages.0.until_tokens=1536",
    "data.lanes=4",
    "data.workers=1",
    "data.validation_fraction=0.1",
    "validation={max_tokens: 2000}",
    "engine={kind: plain}",
    "telemetry={}",
    "samples={}",
    "checkpoint={}",
]


def compressed(rows: list[dict[str, Any]]) -> bytes:
    return zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The mix, whose rows repeat an id and are sometimes empty, and Dolmino, whose folders differ in their fields."""
    texts = make_texts(5, 120, 60)
    mix = {
        f"data/{topic}/{topic}-{part:04}.jsonl.zst": compressed(
            [{"id": str(i // 2), "text": text, "metadata": {"n": i}} for i, text in enumerate(["", *texts[part::4]])]
        )
        for topic in ("common_crawl-art", "wiki")
        for part in range(2)
    }
    dolmino = {
        f"data/ingredient{folder}/part-{part}.jsonl.zst": compressed(
            [{"text": text, **({} if folder else {"id": i})} for i, text in enumerate(texts[folder + part :: 5])]
        )
        for folder in range(3)
        for part in range(2)
    }
    config = load_config(REPOSITORY / CONFIG)
    [first, second] = [source.path for source in config.data.sources]
    with hub_server({}, repository="*", page=3) as server:
        for url, files in ((first, mix), (second, dolmino)):
            server.commits[_commit(url)] = {"README.md": b"# A data set", ".gitattributes": b"", **files}
        tokenizer = (REPOSITORY / "assets/tokenizer/tokenizer.json").read_bytes()
        server.commits[_commit(config.tokenizer.path)] = {"tokenizer.json": tokenizer}
        yield server


def _commit(url: str) -> str:
    found = re.search(r"@([0-9a-f]{40})", url)
    assert found
    return found[1]


def aurora(folder: Path, hub: Hub, *arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder with no configs of its own, as with an installed wheel."""
    endpoint = "http://127.0.0.1:9" if offline else hub.endpoint  # the discard port: nobody listens
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pretrain", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.long
def test_check_resolve_and_five_steps_on_two_ranks(hub: Hub, tmp_path: Path) -> None:
    checked = aurora(tmp_path, hub, "check", CONFIG, offline=True)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count("not checked: ") == 3
    assert not hub.requests

    resolved = aurora(tmp_path, hub, "data", "resolve", CONFIG)
    assert resolved.returncode == 0, resolved.stderr
    lock = load_lock(tmp_path / "configs" / "aurora-1.1b.lock.json")
    mix, dolmino, tokenizer = lock.sources.values()
    assert [len(mix.files), len(dolmino.files), len(tokenizer.files)] == [4, 6, 1]
    assert mix.licences == ("odc-by",)

    hub.requests.clear()
    trained = aurora(tmp_path, hub, "train", CONFIG, *REDUCED, "--processes", "2")
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert not [path for path, _ in hub.requests if path.startswith("/api/")]  # nothing was listed
    run = tmp_path / "runs" / "aurora-1.1b"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    manifest = json.loads((run / "manifest.json").read_text())
    assert [source["locked"]["files"] for source in manifest["data"]["sources"]] == [4, 6]
    assert list(load_lock(run / "data.lock.json").sources.values()) == [mix, dolmino]
    assert manifest["tokenizer"]["path"] == tokenizer.path
