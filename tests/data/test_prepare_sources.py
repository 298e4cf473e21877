"""Preparation reads what the lock says, records it, and counts bad rows over all sources together."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.cli import main
from pretrain.config.data import TokenizerConfig
from pretrain.data import DataError
from pretrain.data.catalog import resolve_sources
from pretrain.data.errors import DataUnavailableError
from pretrain.data.lock import load_lock, locked_sources, save_lock
from pretrain.data.mirror import fetch
from pretrain.data.prepared import plan
from pretrain.data.prepared.layout import load_index
from pretrain.data.prepared.plan import LOCK_FILE
from pretrain.data.prepared.prepare import prepare
from pretrain.data.sources.retries import patient
from tests.conftest import TINY, merged
from tests.data.corpus import make_setting, make_texts, write_jsonl
from tests.data.hub_server import hub_server
from tests.data.store import COMMIT, LINES, PARQUET, Store, remote_config
from tests.data.test_prepared import contents

pytestmark = pytest.mark.usefixtures("warm")


def config_file(folder: Path, tokenizer: TokenizerConfig, *paths: str, **data: Any) -> Path:
    section = {"sources": [{"path": path} for path in paths], "lanes": 2, "mixture": None, **data}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(merged(TINY, {"data": section, "tokenizer": tokenizer.model_dump()})))
    return path


def test_the_lock_beside_the_config_decides_what_is_prepared(
    store: Store, tokenizer: TokenizerConfig, tmp_path: Path
) -> None:
    config = config_file(tmp_path, tokenizer, PARQUET, LINES)
    lock = resolve_sources(remote_config(PARQUET, LINES))
    save_lock(lock, tmp_path / "run.lock.json")
    store.listed.clear()
    store.commit = "f" * 40  # the branch moves
    assert main(["data", "prepare", str(config), "--to", str(tmp_path / "to")]) == 0
    assert store.listed == {}
    origins = [load_index(str(tmp_path / "to" / name)).origin for name in ("tables", "lines")]
    assert [(one.path, one.revision, one.licences, one.files) for one in origins] == [
        (PARQUET, COMMIT, ("odc-by",), 3),
        (LINES, COMMIT, ("odc-by",), 2),
    ]
    assert origins[0].pinned == f"hf://datasets/org/tables@{COMMIT}/data/*.parquet"
    assert origins[1].sha256 == lock.sources[LINES].contents
    assert load_lock(tmp_path / "to" / LOCK_FILE) == lock
    # The mirror gives the same bytes without the store.
    fetch(lock.files, tmp_path / "mirror")
    store.remove()
    overrides = [f"data.mirror={tmp_path / 'mirror'}"]
    assert main(["data", "prepare", str(config), *overrides, "--to", str(tmp_path / "again"), "--workers", "2"]) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "to")


def test_a_mirror_that_lacks_files_is_an_error_before_the_start(
    store: Store, tokenizer: TokenizerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(tmp_path, tokenizer, LINES, mirror=str(tmp_path / "mirror"))
    save_lock(resolve_sources(remote_config(LINES)), tmp_path / "run.lock.json")
    assert main(["data", "prepare", str(config), "--to", str(tmp_path / "to")]) == 2
    assert "the mirror lacks 2 of 2 files" in capsys.readouterr().err


def test_without_a_lock_an_interrupted_preparation_continues_with_the_files_that_it_began_with(
    store: Store, tokenizer: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PART_BYTES", 1)
    config = config_file(tmp_path, tokenizer, PARQUET, LINES)
    command = ["data", "prepare", str(config), "--to", str(tmp_path / "to")]
    with monkeypatch.context() as ends:
        ends.setattr("pretrain.data.prepared.prepare._assemble", lambda *_: 1 / 0)
        assert main(command) == 1
    store.commit = "f" * 40
    store.listed.clear()
    assert main(command) == 0
    assert store.listed == {}
    assert load_index(str(tmp_path / "to" / "lines")).origin.revision == COMMIT
    assert main(command) == 0  # complete


def with_bad_rows(path: Path, places: dict[int, bytes]) -> Path:
    good = [json.dumps({"text": text}).encode() for text in make_texts(4, 30) if text]
    for place, row in places.items():
        good.insert(place, row)
    path.write_bytes(b"\n".join(good) + b"\n")
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_rows_are_counted_over_all_sources_and_listed_per_file(
    tmp_path: Path, tokenizer: TokenizerConfig, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PART_BYTES", 1)
    null, broken = b'{"text": null}', b'{"text"'
    paths = [
        with_bad_rows(tmp_path / "a.jsonl", {3: null, 5: broken}),
        write_jsonl(tmp_path / "b.jsonl", make_texts(1, 20)),
        with_bad_rows(tmp_path / "c.jsonl", {0: broken, 1: broken, 9: null}),
    ]
    setting = make_setting(tokenizer, *paths)
    clean = [with_bad_rows(tmp_path / name, {}) for name in ("clean-a.jsonl", "clean-c.jsonl")]
    expected = prepare(make_setting(tokenizer, *clean).config, tokenizer, tmp_path / "clean")
    for limit in (0, 1, 4) if workers == 1 else (4,):  # 4 is enough for each file, but not for both
        with pytest.raises(DataError, match=rf"bad rows? so far, more than the {limit} of data\.max_bad_rows"):
            prepare(setting.changed(max_bad_rows=limit).config, tokenizer, tmp_path / "to", workers=workers)
        assert not (tmp_path / "to" / "a" / "index.json").exists()
    done = prepare(setting.changed(max_bad_rows=5).config, tokenizer, tmp_path / "to")
    assert [dict(one.index.bad_rows) for one in done] == [{str(paths[0]): 2}, {}, {str(paths[2]): 3}]
    assert [one.index.origin.bad_rows for one in done] == [2, 0, 3]
    assert ["line 4" in str(row) for row in done[0].skipped] == [True, False]
    for dirty, good in zip((done[0], done[2]), expected, strict=True):
        assert dirty.index.shards[0].tokens_sha256 == good.index.shards[0].tokens_sha256


def test_too_many_bad_rows_end_the_work_early(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PART_BYTES", 1)
    paths = [with_bad_rows(tmp_path / f"{number}.jsonl", {0: b"[]"}) for number in range(6)]
    config = make_setting(tokenizer, *paths).changed(max_bad_rows=2).config
    with pytest.raises(DataError, match=r"2\.jsonl.*3 bad rows so far, more than the 2"):
        prepare(config, tokenizer, tmp_path / "to")
    assert len(list((tmp_path / "to" / "parts").glob("*.npz"))) == 2


def test_the_command_reports_bad_rows(
    tmp_path: Path, tokenizer: TokenizerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_bad_rows(tmp_path / "a.jsonl", {3: b"[]"})
    config = config_file(tmp_path, tokenizer, str(path), max_bad_rows=1)
    assert main(["data", "prepare", str(config), "--to", str(tmp_path / "to")]) == 0
    assert f"{path}: 1 bad row skipped, the first: {path}" in capsys.readouterr().out


def test_workers_read_from_servers_and_wait_as_long_as_the_config_says(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PART_BYTES", 1)
    names = [f"{number}.jsonl" for number in range(2)]
    texts = {name: write_jsonl(tmp_path / name, make_texts(int(name[0]), 20)).read_bytes() for name in names}
    with hub_server(texts) as hub, patient(first_wait_seconds=0.01, longest_wait_seconds=0.05):
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        config = remote_config(hub.path(), retry_minutes=0.002)
        locked = locked_sources(resolve_sources(config), config, "lock")
        hub.dead = True
        with pytest.raises(DataUnavailableError, match=r"unavailable for 0\.002 minutes"):
            prepare(config, tokenizer, tmp_path / "to", locked=locked, workers=2)
        hub.dead = False
        [remote] = prepare(config, tokenizer, tmp_path / "to", locked=locked)
    [local] = prepare(make_setting(tokenizer, tmp_path / "*.jsonl").config, tokenizer, tmp_path / "local")
    assert remote.index.shards == local.index.shards


def test_a_source_may_be_called_as_the_folder_of_the_parts(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    (tmp_path / "parts").mkdir()
    paths = [write_jsonl(tmp_path / "parts" / "0.jsonl", make_texts(1, 20)), write_jsonl(tmp_path / "b.jsonl", ["b"])]
    setting = make_setting(tokenizer, paths[0].parent, paths[1])
    assert setting.config.names == ("parts", "b")
    for _ in range(2):  # a repeated command finds all complete
        done = prepare(setting.config, tokenizer, tmp_path / "to")
        assert [one.folder.name for one in done] == ["parts", "b"]
        assert [one.index.documents for one in done] == [len([text for text in make_texts(1, 20) if text]), 1]
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["b", "parts", "plan.json"]
