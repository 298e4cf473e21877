"""A file that ended a run, repaired: the run continues with the stream that the repaired file would have given."""

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pretrain.data import DataError
from pretrain.launch import train
from pretrain.run.folder import RunError, RunFolder
from tests.conftest import TINY

TEXTS = [f"{number} " + "time water people stone light river " * 20 for number in range(60)]
BAD = 35
Build = Callable[[Path, bool], None]


def jsonl(bad: bytes, pack: Callable[[bytes], bytes] = bytes, *, at: int = BAD, remove: bool = False) -> Build:
    """A bad row, which is replaced or removed."""

    def build(path: Path, repaired: bool) -> None:
        rows = [json.dumps({"text": text}).encode() for text in TEXTS]
        if not repaired:
            rows[at : at + (not remove)] = [bad]
        path.write_bytes(pack(b"\n".join(rows)))

    return build


def cut(pack: Callable[[bytes], bytes], share: float = 0.6, array: bool = False) -> Build:
    """The end is missing."""

    def build(path: Path, repaired: bool) -> None:
        rows = [json.dumps({"text": text}) for text in TEXTS]
        whole = pack((f"[{','.join(rows)}]" if array else "\n".join(rows)).encode())
        path.write_bytes(whole if repaired else whole[: int(len(whole) * share)])

    return build


def frames(content: bytes) -> bytes:
    return b"".join(zstandard.compress(content[at : at + 500]) for at in range(0, len(content), 500))


def parquet(at: int, remove: bool = False) -> Build:
    def build(path: Path, repaired: bool) -> None:
        texts: list[str | None] = list(TEXTS)
        if not repaired:
            texts[at : at + (not remove)] = [None]
        groups = [0, 20, 40 + (not repaired and remove and at < 40), len(texts)]
        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            for begin, end in pairwise(groups):
                writer.write_table(pa.table({"text": texts[begin:end]}))

    return build


KINDS: dict[str, tuple[str, Build]] = {
    "row in gz": ("a.jsonl.gz", jsonl(b'{"text": null}', gzip.compress)),
    "cut gz": ("a.jsonl.gz", cut(gzip.compress)),
    "last row": ("a.jsonl", jsonl(b'{"text": "\xff"}', at=59)),
    "removed": ("a.jsonl.zst", jsonl(b"{", zstandard.compress, remove=True)),
    "cut zst": ("a.ndjson.zst", cut(frames, 0.6)),
    "cut array": ("a.json", cut(bytes, 0.7, array=True)),
    "parquet": ("a.parquet", parquet(30)),
    "last of parquet": ("a.parquet", parquet(59)),
    "removed of parquet": ("a.parquet", parquet(30, remove=True)),
}
FAST = ("cut gz",)


def losses(config: Any) -> list[float]:
    path = RunFolder(config.run_folder).path / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []  # it may end before its first step
    return [row["loss"] for line in lines if "loss" in (row := json.loads(line))]


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_repaired_file_is_read_on(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, workers: int
) -> None:
    monkeypatch.setattr("pretrain.data.check.FULL_SCAN_BYTES", 0)
    monkeypatch.setattr("pretrain.data.check._SAMPLE_BYTES", 2000)
    monkeypatch.setattr("pretrain.data.json_lines.JsonText.last_texts", lambda *_: iter(()))
    monkeypatch.setattr("pretrain.data.parquet.ParquetText.last_texts", lambda *_: iter(()))
    monkeypatch.setattr("pretrain.data.reading.REFILL_BYTES", 1 << 13)
    name, build = KINDS[kind]
    path = tmp_path / name

    def config(run: str) -> Any:
        return tiny_config(
            {
                "run.name": run,
                "data": {"sources": [{"path": str(path)}], "lanes": 1, "workers": workers, "validation_fraction": 0.1},
                "checkpoint.save_every_steps": 1000,
                "train.total_tokens": TINY["train"]["global_batch_tokens"] * 20,
            }
        )

    build(path, False)
    with pytest.raises(DataError, match=name):
        train(config("mended"))
    before = len(losses(config("mended")))
    thorough = kind not in FAST or workers
    if thorough:
        with pytest.raises(DataError, match=name):  # a start without a repair fails again, and loses nothing
            train(config("mended"))
    build(path, True)
    if thorough:
        assert train(config("mended"), stop_at=before + 1) == 75
    assert train(config("mended")) == 0
    assert train(config("clean")) == 0
    assert before < len(losses(config("clean")))
    assert losses(config("mended")) == losses(config("clean"))


def test_what_did_not_end_the_run_may_not_change(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl.gz"
    KINDS["cut gz"][1](path, True)
    config = tiny_config({"data": {"sources": [{"path": str(path)}], "lanes": 1}})
    assert train(config, stop_at=1) == 75
    jsonl(b'{"text": "other"}', gzip.compress)(path, False)
    with pytest.raises(RunError, match=r"data\.sources\.0 contents"):
        train(config)
