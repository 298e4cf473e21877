"""Runs on remote sources: which lock they read, what they keep, and what is the same run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.cli import main
from pretrain.config import load_config, parse_config
from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import TokenStream
from pretrain.data.lock import load_lock
from pretrain.data.prepared.prepare import prepare
from pretrain.data.validation_sample import ValidationSample, sample_validation
from pretrain.launch import train
from pretrain.run.json_lines import JsonLines
from tests.conftest import SMALL_VOCABULARY, TINY, merged
from tests.data.corpus import make_texts, write_jsonl, write_parquet
from tests.data.store import COMMIT, LINES, PARQUET, Store, fill
from tests.distributed.ranks import run_ranks

CHANGES = SMALL_VOCABULARY | {
    "data": {"sources": [{"path": PARQUET}, {"path": LINES}], "lanes": 2, "validation_fraction": 0.1},
    "train.total_tokens": 4 * 768,
    "schedule.warmup_tokens": 768,
    "validation.max_tokens": 1000,
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    fill(tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    return Store(tmp_path / "hub", monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "conf" / "small.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(merged(TINY, {"run.root": str(tmp_path / "runs"), **CHANGES})))
    return path


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in JsonLines(folder / "metrics.jsonl").read()]


def test_the_three_commands(store: Store, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resolve, train from the lock, and the same run from a mirror without the store."""
    assert main(["data", "resolve", str(config)]) == 0
    assert load_lock(config.parent / "small.lock.json").sources[PARQUET].revision == COMMIT
    assert not list(config.parent.glob("*.partial"))
    assert load_config(config).data.lock == str(config.parent / "small.lock.json")

    store.listed.clear()
    assert main(["train", str(config), "--stop-at", "2"]) == 75
    assert store.listed == {}
    run = tmp_path / "runs/tiny"
    assert load_lock(run / "data.lock.json") == load_lock(config.parent / "small.lock.json")

    assert main(["data", "fetch", str(config), "--to", "mirror"]) == 0
    assert main(["data", "fetch", str(config), "--to", "mirror"]) == 0
    assert "0 of 5 files copied" in capsys.readouterr().out
    store.opened.clear()
    assert main(["train", str(config), "data.mirror=mirror"]) == 0
    assert store.opened == {}

    assert main(["train", str(config), "run.name=whole", "data.cache_dir=cache"]) == 0
    assert losses(tmp_path / "runs/whole") == losses(run)
    manifest = json.loads((run / "manifest.json").read_text())
    [tables, _] = manifest["data"]["sources"]
    assert (tables["locked"]["revision"], tables["locked"]["files"], tables["licences"]) == (COMMIT, 3, ["odc-by"])


def test_without_a_lock_the_first_start_resolves_and_a_resume_does_not(
    store: Store, config: Path, tmp_path: Path
) -> None:
    assert main(["train", str(config), "--stop-at", "2"]) == 75
    assert sum(store.listed.values()) == 2
    run = tmp_path / "runs/tiny"
    assert load_lock(run / "data.lock.json").sources[LINES].revision == COMMIT
    assert not list(run.glob("*.partial"))
    store.commit = "f" * 40  # the branch moves on: the run stays with its commit
    store.listed.clear()
    store.opened.clear()
    assert main(["train", str(config)]) == 0
    assert store.listed == {}
    assert all(f"@{COMMIT}/" in path for path in store.opened)


def test_another_lock_is_another_run(
    store: Store, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--stop-at", "1"]) == 75
    write_parquet(store.folder / "org/tables/data/0.parquet", make_texts(1, 20), 5)
    assert main(["data", "resolve", str(config)]) == 0
    assert main(["train", str(config)]) == 2
    assert "data.sources.0 contents" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["changed", "missing source", "damaged", "mirror"])
def test_what_cannot_be_read_is_one_clear_error(
    kind: str, store: Store, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "resolve", str(config)]) == 0
    overrides, expected = [], ""
    if kind == "changed":
        for index in range(2):
            write_jsonl(store.folder / f"org/lines/part-{index}/x.jsonl.zst", ["another text"] * 9)
        expected = "x.jsonl.zst: is no longer"
    elif kind == "missing source":
        overrides, expected = [f"data.sources.1.path={LINES.replace('main', 'v3')}"], "aurora data resolve"
    elif kind == "damaged":
        (config.parent / "small.lock.json").write_text("{")
        expected = "small.lock.json: not a lock"
    else:
        overrides, expected = ["data.mirror=elsewhere"], "the mirror lacks 5 of 5 files"
    assert main(["train", str(config), *overrides]) == 2
    assert expected in capsys.readouterr().err


def test_check_is_offline_and_says_what_it_did_not_look_at(
    store: Store, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(config)]) == 0
    out = capsys.readouterr().out
    assert f"not checked: {PARQUET} has no lock" in out
    assert (store.listed, store.opened) == ({}, {})
    assert main(["check", str(config), "--online"]) == 0
    assert f"tables@{COMMIT}/data/*.parquet: 3 files" in capsys.readouterr().out
    assert sum(store.listed.values()) == 2
    assert not (tmp_path / "runs").exists()
    assert [path.name for path in config.parent.iterdir()] == ["small.yaml"]
    assert main(["data", "resolve", str(config)]) == 0
    store.listed.clear()
    assert main(["check", str(config)]) == 0
    assert "3 files" in capsys.readouterr().out
    assert store.listed == {}


def test_local_configs_need_no_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "local.yaml"
    path.write_text(yaml.safe_dump(merged(TINY, {"run.root": str(tmp_path / "runs")})))
    for verb in (["resolve", str(path)], ["fetch", str(path), "--to", str(tmp_path / "mirror")]):
        assert main(["data", *verb]) == 0
        assert "all sources are local" in capsys.readouterr().out
    assert main(["check", str(path), "data.mirror=x"]) == 2
    assert "data.mirror: has no effect: all sources are local" in capsys.readouterr().err


def test_fetch_without_a_lock_names_the_cure(store: Store, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", str(config), "--to", "mirror"]) == 2
    assert "aurora data resolve" in capsys.readouterr().err


def test_a_lock_is_found_beside_a_config_that_was_moved_with_it(store: Store, config: Path, tmp_path: Path) -> None:
    assert main(["data", "resolve", str(config), "--out", str(tmp_path / "other" / "x.lock.json")]) == 0
    assert load_config(config).data.lock is None
    shutil.copy(config, tmp_path / "other" / "x.yaml")
    found: Any = load_config(tmp_path / "other" / "x.yaml").data.lock
    assert found == str(tmp_path / "other" / "x.lock.json")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[ValidationSample]:
    """The validation sets that are drawn."""
    found: list[ValidationSample] = []

    def draw(*args: Any, **options: Any) -> ValidationSample:
        found.append(sample_validation(*args, **options))
        return found[-1]

    monkeypatch.setattr("pretrain.training.validation_store.sample_validation", draw)
    return found


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def test_the_validation_set_is_drawn_once_for_all_starts(
    store: Store, config: Path, tmp_path: Path, drawn: list[ValidationSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no stream of the validation split is opened: at 100B tokens, it would read 500M of them."""
    opened: list[str] = []
    monkeypatch.setattr(
        "pretrain.launch.building.TokenStream",
        lambda *args, **options: opened.append(options.get("split", "train")) or TokenStream(*args, **options),
    )
    each = ["validation.every_steps=1"]
    assert main(["train", str(config), *each, "run.name=whole"]) == 0
    assert main(["train", str(config), *each, "--stop-at", "2"]) == 75
    assert len(drawn) == 2
    assert drawn[0].sha256 == drawn[1].sha256
    store.opened.clear()
    assert main(["train", str(config), *each]) == 0
    assert len(drawn) == 2
    assert set(opened) == {"train"}

    def measured(name: str) -> list[tuple[float, float]]:
        records = JsonLines(tmp_path / "runs" / name / "metrics.jsonl").read()
        return [(record["validation_loss"], record["validation_bits_per_byte"]) for record in records]

    assert measured("tiny") == measured("whole")
    # A longer run keeps the set; a damaged file is drawn again.
    longer = [*each, "run.name=whole", "train.total_tokens=3840"]
    assert main(["train", str(config), *longer, "--stop-at", "4"]) == 75
    assert len(drawn) == 2
    (tmp_path / "runs/whole/validation.npz").write_bytes(b"PK damaged")
    assert main(["train", str(config), *longer]) == 0
    assert [one.sha256 for one in drawn] == [drawn[0].sha256] * 3


def test_the_validation_set_is_part_of_the_identity(
    store: Store, config: Path, tmp_path: Path, drawn: list[ValidationSample], capfd: pytest.CaptureFixture[str]
) -> None:
    """A resume with another one warns; which documents are trained on does not depend on it."""
    assert main(["train", str(config), "--stop-at", "2"]) == 75
    run = tmp_path / "runs/tiny"
    key, sha256 = "validation contents", drawn[0].sha256
    manifest = manifest_of(run)
    assert manifest["identity"][key] == manifest["validation"]["sha256"] == sha256
    assert manifest["validation"]["tokens"] == int(drawn[0].lengths.sum())
    assert [source["name"] for source in manifest["validation"]["sources"]] == ["tables", "lines"]
    [checkpoint] = (run / "checkpoints").iterdir()
    assert json.loads((checkpoint / "index.json").read_text())["identity"][key] == sha256

    shutil.copytree(run, tmp_path / "runs/other")
    capfd.readouterr()
    assert main(["train", str(config)]) == 0
    assert "validation set is not that" not in "".join(capfd.readouterr())
    smaller = ["run.name=other", "validation.max_tokens=500"]
    assert main(["train", str(config), *smaller]) == 0
    assert "the validation set is not that of the earlier launches" in "".join(capfd.readouterr())
    assert manifest_of(tmp_path / "runs/other")["identity"][key] == drawn[1].sha256 != sha256
    assert losses(tmp_path / "runs/other") == losses(run)


def test_without_validation_nothing_is_drawn(store: Store, config: Path, drawn: list[ValidationSample]) -> None:
    text = yaml.safe_load(config.read_text())
    text["data"]["validation_fraction"] = 0
    del text["validation"]
    config.write_text(yaml.safe_dump(text))
    assert main(["train", str(config), "--stop-at", "1"]) == 75
    assert drawn == []


def test_local_text_is_validated_on_in_full(tmp_path: Path, drawn: list[ValidationSample]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(1, 400))
    changes = {**CHANGES, "run.root": str(tmp_path / "runs"), "train.total_tokens": 2304}
    changes["data"] = {"sources": [{"path": str(path)}], "lanes": 1, "validation_fraction": 0.1}
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(merged(TINY, changes)))
    assert main(["train", str(tmp_path / "local.yaml")]) == 0
    assert drawn == []
    assert not (tmp_path / "runs/tiny/validation.npz").exists()
    assert "validation" not in manifest_of(tmp_path / "runs/tiny")


def _train(config: dict[str, Any]) -> int:
    return train(parse_config(config))


def test_ranks_validate_on_one_set_that_rank_0_draws(tmp_path: Path, drawn: list[ValidationSample]) -> None:
    """Prepared data on two ranks: the same set, and nearly the same loss, as on one."""
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(1, 400))
    tokenizer = TokenizerConfig(path=SMALL_VOCABULARY["tokenizer.path"])
    prepare(DataConfig(sources=[{"path": str(path)}], lanes=1), tokenizer, tmp_path / "out")
    changes = {**CHANGES, "run.root": str(tmp_path / "runs"), "train.total_tokens": 2304}
    changes["data"] = {"sources": [{"path": str(tmp_path / "out")}], "lanes": 1, "validation_fraction": 0.1}
    one, two = (merged(TINY, {**changes, "run.name": name}) for name in ("one", "two"))
    assert _train(one) == 0
    assert len(drawn) == 1
    assert run_ranks(2, _train, two) == [0, 0]
    first, second = (manifest_of(tmp_path / "runs" / name) for name in ("one", "two"))
    assert first["validation"] == second["validation"]
    assert first["validation"]["sha256"] == drawn[0].sha256
    records = [JsonLines(tmp_path / "runs" / name / "metrics.jsonl").read()[-1] for name in ("one", "two")]
    assert records[0]["validation_loss"] == pytest.approx(records[1]["validation_loss"], rel=1e-3)


def test_the_set_of_another_run_in_the_same_folder_is_not_used(
    store: Store, config: Path, tmp_path: Path, drawn: list[ValidationSample]
) -> None:
    assert main(["train", str(config), "--stop-at", "1"]) == 75
    shutil.move(tmp_path / "runs/tiny/validation.npz", tmp_path / "kept.npz")
    shutil.rmtree(tmp_path / "runs/tiny")
    (tmp_path / "runs/tiny").mkdir()
    shutil.move(tmp_path / "kept.npz", tmp_path / "runs/tiny/validation.npz")
    assert main(["train", str(config), "--stop-at", "1", "data.validation_fraction=0.3"]) == 75
    assert len(drawn) == 2
    assert drawn[0].sha256 != drawn[1].sha256
