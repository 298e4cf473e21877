"""Remote sources are listed once, into a lock; what is read afterwards is what the lock says."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import DataError, DocumentEncoder, TokenStream, check, fingerprint, make_catalog, survey
from pretrain.data.catalog import resolve_sources
from pretrain.data.described import CatalogFile
from pretrain.data.lock import Lock, load_lock, locked_source, locked_sources, save_lock, unresolved
from tests.data.corpus import Setting, drain, rows, write_jsonl, write_parquet
from tests.data.store import COMMIT, LINES, PARQUET, TEXTS, Store, remote_config


def read(data: DataConfig, tokenizer: TokenizerConfig, locked: dict[str, Any]) -> list[Any]:
    stream = TokenStream(data, tokenizer, 7, epochs=1, catalog=make_catalog(data, locked))
    try:
        return rows(drain(stream, 3))
    finally:
        stream.close()


def test_a_lock_holds_files_versions_row_groups_and_the_commit(store: Store, tmp_path: Path) -> None:
    lock = resolve_sources(remote_config(PARQUET, LINES))
    save_lock(lock, tmp_path / "deep" / "x.lock.json")
    found = load_lock(tmp_path / "deep" / "x.lock.json")
    assert found == lock
    assert found.digest == lock.digest
    tables, lines = found.sources[PARQUET], found.sources[LINES]
    assert tables.pinned == f"hf://datasets/org/tables@{COMMIT}/data/*.parquet"
    assert (tables.revision, tables.licences) == (COMMIT, ("odc-by",))
    assert [file.row_groups for file in tables.files] == [(5, 5, 5, 5)] * 3
    assert [file.row_groups for file in lines.files] == [None, None]
    assert lines.files[1].path == f"hf://datasets/org/lines@{COMMIT}/part-1/x.jsonl.zst"
    assert lines.files[1].digest == f"sha256:{store.sha256(store.path(lines.files[1].path))}"
    assert lines.bytes == sum(store.path(file.path).stat().st_size for file in lines.files)


def test_with_a_lock_nothing_is_listed_or_opened_until_a_unit_is_read(store: Store, tokenizer: TokenizerConfig) -> None:
    data = remote_config(PARQUET, LINES)
    locked = locked_sources(resolve_sources(data), data, "lock")
    store.listed.clear(), store.opened.clear()
    catalog, problems = survey(data, locked)
    assert (problems, store.listed, store.opened) == ([], {}, {})
    stream = TokenStream(data, tokenizer, 7, epochs=1, catalog=pickle.loads(pickle.dumps(catalog)))
    assert (store.listed, store.opened) == ({}, {})
    assert len(drain(stream, 3)) > 3
    assert store.listed == {}
    assert set(store.opened.values()) == {1, 4}  # once for each row group or file of lines


def test_the_remote_stream_is_that_of_the_same_files_on_disk(store: Store, tokenizer: TokenizerConfig) -> None:
    data = remote_config(PARQUET, LINES)
    local = remote_config(*(str(store.folder / "org" / name) for name in ("tables", "lines")))
    expected = rows(drain(Setting(local, tokenizer, epochs=1).open(), 3))
    assert read(data, tokenizer, locked_sources(resolve_sources(data), data, "lock")) == expected


@pytest.mark.parametrize("change", ["source", "revision"])
def test_a_config_that_the_lock_does_not_cover_names_the_source_and_the_cure(store: Store, change: str) -> None:
    lock = resolve_sources(remote_config(PARQUET))
    paths = {"source": (PARQUET, LINES), "revision": (PARQUET.replace("main", "v2"),)}[change]
    with pytest.raises(DataError, match=r"my\.lock: does not hold the source .*aurora data resolve") as error:
        locked_sources(lock, remote_config(*paths), "my.lock")
    assert paths[-1] in str(error.value)
    # The commit that was found, and a source fewer, are no contradiction.
    pinned = PARQUET.replace("main", COMMIT)
    [source] = locked_sources(lock, remote_config(pinned), "my.lock").values()
    assert (source.path, source.files) == (pinned, lock.sources[PARQUET].files)


def test_a_file_that_is_no_longer_that_of_the_lock_is_named(store: Store, tokenizer: TokenizerConfig) -> None:
    data = remote_config(LINES)
    locked = locked_sources(resolve_sources(data), data, "lock")
    victim = locked[LINES].files[1]
    write_jsonl(store.path(victim.path), ["other", "text"])
    with pytest.raises(DataError, match=r"part-1/x\.jsonl\.zst.*no longer"):
        read(data, tokenizer, locked)


def test_the_identity_follows_the_contents_and_not_the_names(store: Store, tmp_path: Path) -> None:
    from pretrain.run.identity import _contents

    def identity(path: str) -> str:
        data = remote_config(path)
        return _contents(fingerprint(data, make_catalog(data))["sources"][0])

    before = identity(PARQUET)
    store.commit = "f" * 40
    assert identity(PARQUET.replace("main", "v2")) == before
    changed = store.folder / "org/tables/data/1.parquet"
    changed.write_bytes(b"PAR1 " + changed.read_bytes()[5:])  # of the same size
    assert identity(PARQUET) != before


def test_the_fingerprint_of_a_remote_source_has_a_fixed_size(store: Store) -> None:
    data = remote_config(PARQUET, LINES)
    first, second = fingerprint(data)["sources"]
    assert "files" not in first
    assert first["locked"]["files"] == 3
    assert first["locked"]["rows"] == 60
    assert second["locked"]["rows"] is None
    assert first["locked"]["revision"] == COMMIT
    assert first["licences"] == ["odc-by"]


def test_an_interrupted_resolve_reads_only_the_footers_that_are_missing(store: Store, tmp_path: Path) -> None:
    data, journal = remote_config(PARQUET, LINES), tmp_path / "x.partial"
    store.fail_after = 2
    with pytest.raises(DataError, match="does not answer"):
        resolve_sources(data, journal)
    assert len(store.opened) == 2
    journal.write_bytes(journal.read_bytes() + b'["torn')
    changed, kept = store.opened
    write_parquet(store.path(changed), TEXTS[:10], 2)
    store.fail_after = None
    store.opened.clear()
    lock = resolve_sources(data, journal)
    assert kept not in store.opened
    assert len(store.opened) == 3  # two of the three footers, and the first row of the JSON lines
    assert [sum(file.row_groups or ()) for file in lock.sources[PARQUET].files].count(10) == 1


def test_all_unreadable_files_are_reported_together(store: Store) -> None:
    for index in range(2):
        (store.folder / f"org/tables/data/{index}.parquet").write_bytes(b"PAR1 truncated")
    with pytest.raises(DataError) as error:
        resolve_sources(remote_config(PARQUET, "hf://datasets/org/none@main/x"))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert all(part in str(error.value) for part in ("0.parquet", "1.parquet", "org/none"))


def test_a_wrong_text_field_is_found_when_resolving(store: Store) -> None:
    with pytest.raises(DataError, match="body"):
        resolve_sources(DataConfig(sources=[{"path": LINES, "text_field": "body"}], lanes=1))
    wrong = DataConfig(sources=[{"path": LINES, "text_field": "body"}], lanes=1, max_bad_rows=10**9)
    write_jsonl(store.folder / "org/lines/part-0/x.jsonl.zst", TEXTS * 3)
    with pytest.raises(DataError, match="body"):  # and not after all of the file
        resolve_sources(wrong)


def test_a_source_may_begin_with_bad_rows_that_the_config_allows(store: Store) -> None:
    bad = '{"text": null}\n' * 3 + '{"text": "good"}\n' + '{"text": 1}\n' * 9
    (store.folder / "org/lines/part-0/x.jsonl.zst").write_bytes(zstandard.compress(bad.encode()))
    assert resolve_sources(remote_config(LINES, max_bad_rows=3)).files
    with pytest.raises(DataError, match=r"line 1: .*holds NoneType"):
        resolve_sources(remote_config(LINES, max_bad_rows=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("sha256:", "sha256:0", 1), "digest does not fit"),
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: text.replace('"format":1', '"format":9'), "format 9, expected 1"),
        (lambda text: "[]", "damaged"),
        (lambda text: '{"format":1,"digest":"","sources":[{"path":3}]}', "damaged"),
    ],
)
def test_a_damaged_lock_is_refused(store: Store, tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "x.lock.json"
    save_lock(resolve_sources(remote_config(LINES)), path)
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=f"{path}.*{message}.*aurora data resolve"):
        load_lock(path)
    path.unlink()
    with pytest.raises(DataError, match="no such lock file"):
        load_lock(path)


@pytest.mark.parametrize("source", [LINES, PARQUET])
def test_a_condition_that_no_row_meets_does_not_read_all_of_a_remote_source(
    store: Store, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(check, "_TRIED_ROWS", 20)
    monkeypatch.setattr(check, "_TRIED_UNITS", 5)
    data = DataConfig(sources=[{"path": source, "where": "id == 'none'"}], lanes=1)
    locked = locked_sources(resolve_sources(data), data, "lock")
    store.opened.clear()
    _, problems = survey(data, locked, DocumentEncoder.load(tokenizer))
    assert problems == []
    assert store.opened.total() == (1 if source == LINES else 5)  # of 2 files with 30 rows, and of 12 row groups


def test_unresolved_sources_are_not_checked(store: Store) -> None:
    data = remote_config(PARQUET, lanes=50)
    assert survey(data, unresolved(data))[1] == []
    assert store.listed == {}
    assert "lanes is 50" in survey(data)[1][0]


def test_a_lock_of_many_files_is_compact(tmp_path: Path) -> None:
    """100,000 files: their load, hand-over and read units are measured in docs/benchmarks; here they are counted."""
    digest = "sha256:" + "0" * 64
    base = f"hf://datasets/org/name@{COMMIT}/"
    files = [CatalogFile(f"{base}{index // 500:04}/{index:06}.jsonl.zst", index, None, digest) for index in range(2000)]
    data = remote_config(LINES)
    lock = Lock({LINES: locked_source(LINES, LINES, files, COMMIT, ())})
    save_lock(lock, tmp_path / "lock")
    assert (tmp_path / "lock").stat().st_size < 130 * 2000
    catalog = make_catalog(data, locked_sources(load_lock(tmp_path / "lock"), data, "lock"))
    assert len(catalog.units(data)[0]) == 2000
    assert len(pickle.dumps(catalog)) < 250 * 2000
