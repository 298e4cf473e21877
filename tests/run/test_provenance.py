"""What a run records about the origin of its text: in every checkpoint, the manifest and the model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.config import Config
from pretrain.config.data import DataConfig
from pretrain.config.tokenizer import TokenizerConfig
from pretrain.data import TokenStream, fingerprint, state
from pretrain.data.order import ReadPlan
from pretrain.data.prepared.prepare import prepare
from pretrain.data.tokenizer import DocumentEncoder
from pretrain.export.run import export_checkpoint
from pretrain.launch import train
from pretrain.run.provenance import TOGETHER, as_table, datasets_of, source_records
from tests.conftest import REPOSITORY
from tests.data.corpus import drain, make_texts, write_jsonl
from tests.data.store import COMMIT, LINES, PARQUET, Store, fill

MakeConfig = Callable[..., Config]
CORPUS = REPOSITORY / "assets/corpus"
OLD_RUN = Path(__file__).parents[1] / "checkpoint/fb900ae/plain/run"


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    write_jsonl(tmp_path / "short.jsonl", make_texts(1, 100))
    return [
        {"path": str(CORPUS / "moby_dick.parquet")},
        {"path": str(tmp_path / "short.jsonl"), "licence": "MIT", "max_epochs": None},
    ]


def manifest_of(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.run_folder / "manifest.json").read_text())
    return found["provenance"]  # type: ignore[no-any-return]


def checkpoint_of(config: Config) -> dict[str, Any]:
    return dict(CheckpointReader(list_checkpoints(config.run_folder / "checkpoints")[-1]).index)


def read_so_far(config: Config, steps: int) -> dict[str, Any]:
    """What a stream of its own counts after so many steps."""
    stream = TokenStream(config.data, config.tokenizer, config.sequence_length)
    for _ in range(steps):
        stream.next_batch(config.train.global_batch_tokens // config.sequence_length)
    progress = {name: (one.documents, one.tokens, one.epochs) for name, one in stream.progress().items()}
    stream.close()
    return progress


def counts(record: dict[str, Any]) -> tuple[Any, Any, Any]:
    return record["documents"], record["tokens"], record["completed_epochs"]


def test_every_source_of_a_mixture_has_counts_of_its_own(
    tiny_config: MakeConfig, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    """In the manifest, the checkpoint and the model card alike, and counted on over a resume."""
    data = {"sources": sources, "mixture": {"moby_dick": 1, "short": 3}, "lanes": 2}
    config = tiny_config({"data": data, "train.total_tokens": 14 * 768})
    assert train(config, stop_at=3) == 75
    assert manifest_of(config)["step"] == 3
    assert {one["name"]: counts(one) for one in manifest_of(config)["sources"]} == read_so_far(config, 3)
    assert train(config) == 0
    whale, short = manifest_of(config)["sources"]
    assert {one["name"]: counts(one) for one in (whale, short)} == read_so_far(config, 14)
    assert whale["tokens"] + short["tokens"] == 14 * 768
    assert short["completed_epochs"] >= 1
    assert short["epochs"] == pytest.approx(short["completed_epochs"], abs=1)
    assert (whale["licences"], short["licences"]) == (["CC0-1.0"], ["MIT"])
    assert (short["files"], short["bytes"]) == (1, (tmp_path / "short.jsonl").stat().st_size)
    index = checkpoint_of(config)
    assert index["provenance"]["sources"] == [whale, short]

    export_checkpoint(config.run_folder, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    [row] = [line for line in card.splitlines() if line.startswith("| short |")]
    assert all(f"| {short[key]:,} |" in row for key in ("files", "bytes", "documents", "tokens"))
    assert f"| {short['epochs']} |" in row
    assert "| MIT |" in row


@pytest.mark.parametrize("packing", [pytest.param("concatenate", marks=pytest.mark.long), "best_fit"])
def test_sources_that_are_read_as_one_have_counts_of_their_own(
    packing: str, tiny_config: MakeConfig, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    data = {"sources": sources, "lanes": 4, "packing": packing}
    config = tiny_config({"data": data, "train.total_tokens": 5 * 768})
    assert train(config, stop_at=3) == 75
    assert train(config) == 0
    whale, short = manifest_of(config)["sources"]
    [(documents, tokens, epochs)] = read_so_far(config, 5).values()
    assert (whale["documents"] + short["documents"], whale["tokens"] + short["tokens"]) == (documents, tokens)
    assert (whale["completed_epochs"], short["completed_epochs"]) == (epochs, epochs)
    assert min(whale["documents"], short["documents"]) > 0


@pytest.mark.long
def test_a_whole_epoch_of_sources_that_are_read_as_one_is_counted_exactly(tmp_path: Path) -> None:
    """On several workers too."""
    tokenizer = TokenizerConfig(path=str(REPOSITORY / "assets/tokenizer/tokenizer.json"))
    texts = [[text for text in make_texts(seed, 30 * seed) if text] for seed in (1, 2, 3)]
    paths = [write_jsonl(tmp_path / f"{index}.jsonl", source) for index, source in enumerate(texts)]
    config = DataConfig(sources=[{"path": str(path)} for path in paths], lanes=2, validation_fraction=0.0)
    encoder = DocumentEncoder.load(tokenizer)
    for workers in (0, 2):
        stream = TokenStream(config.model_copy(update={"workers": workers}), tokenizer, 7, epochs=2)
        drain(stream, 5)
        found = stream.state()["sources"][0]["of_sources"]
        stream.close()
        assert [one["documents"] for one in found] == [2 * len(source) for source in texts]
        assert [one["text_bytes"] for one in found] == [2 * sum(len(t.encode()) for t in source) for source in texts]
        assert [one["tokens"] for one in found] == [2 * sum(map(len, encoder.encode(source))) for source in texts]


@pytest.mark.long
def test_what_an_older_version_counted_together_stays_together(
    tiny_config: MakeConfig, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = tiny_config({"data": {"sources": sources, "lanes": 4}, "train.total_tokens": 5 * 768})
    initial = state.initial_state

    def without_sources(plan: ReadPlan) -> state.StreamState:
        found = initial(plan)
        del found["sources"][0]["of_sources"]
        return found

    with mock.patch("pretrain.data.stream.initial_state", without_sources):
        assert train(config, stop_at=3) == 75
    assert train(config) == 0
    whale, short, both = manifest_of(config)["sources"]
    assert both["name"] == TOGETHER
    assert [counts(both)] == list(read_so_far(config, 5).values())
    assert counts(whale) == counts(short) == (None, None, None)
    assert (both["files"], both["bytes"]) == (2, whale["bytes"] + short["bytes"])
    assert both["licences"] == ["CC0-1.0", "MIT"]
    export_checkpoint(config.run_folder, tmp_path / "out")
    rows = [line for line in (tmp_path / "out/README.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.count("counted together") for row in rows if "| CC0-1.0 |" in row or "| MIT |" in row] == [3, 3]
    assert any(f"| {TOGETHER} |" in row and f"| {both['tokens']:,} |" in row for row in rows)


def test_a_run_that_has_not_saved_yet_has_read_nothing(tiny_config: MakeConfig, sources: list[dict[str, Any]]) -> None:
    config = tiny_config({"data": {"sources": sources, "lanes": 4}})
    records = source_records(config.data, fingerprint(config.data), None)
    assert [counts(dict(record)) for record in records] == [(0, 0, 0)] * 2


def test_an_export_of_an_older_checkpoint_says_what_was_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(REPOSITORY / "assets")
    shutil.copytree(OLD_RUN, tmp_path / "run")
    reader = export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert "sources" not in reader.index["provenance"]
    content = json.loads((tmp_path / "out/aurora.json").read_text())
    epochs = reader.index["data_state"]["epoch"]
    assert all(row["documents"] in ("not recorded", "counted together") for row in content["data_sources"])
    assert content["data_sources"][-1]["epochs"] == f"{epochs} completed"
    assert "not recorded" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("state", [{}, {"version": 9}, {"version": 2, "sources": [{}, {}, {}]}, {"sources": [{}]}])
def test_a_state_without_counts_is_not_a_crash(state: dict[str, Any]) -> None:
    config = DataConfig(sources=[{"path": str(CORPUS / "moby_dick.parquet")}])
    [row, *others] = as_table(source_records(config, fingerprint(config), state))
    assert not others
    assert [row[key] for key in ("documents", "tokens", "epochs")] == ["not recorded"] * 3


def test_a_source_of_the_hub_has_its_commit_and_its_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "hub")
    Store(tmp_path / "hub", monkeypatch)
    config = DataConfig(sources=[{"path": PARQUET}, {"path": LINES}, {"path": str(CORPUS / "moby_dick.parquet")}])
    records = source_records(config, fingerprint(config), None)
    assert [record["revision"] for record in records] == [COMMIT, COMMIT, None]
    assert [record["files"] for record in records] == [3, 2, 1]
    assert records[0]["licences"] == ["odc-by"]
    expected = list(dict.fromkeys("/".join(path.split("://datasets/")[1].split("@")[0].split("/")[:2])
                                  for path in (PARQUET, LINES)))  # fmt: skip
    assert datasets_of(records) == expected
    assert all("/" in name for name in expected)


def test_the_model_card_lists_the_data_sets_in_its_front_matter(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "hub")
    Store(tmp_path / "hub", monkeypatch)
    data = {"sources": [{"path": PARQUET}], "lanes": 2, "validation_fraction": 0}
    config = tiny_config({"data": data, "train.total_tokens": 768, "schedule": {"kind": "constant"}})
    assert train(config) == 0
    export_checkpoint(config.run_folder, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    [name] = yaml.safe_load(card.split("---\n")[1])["datasets"]
    assert PARQUET.startswith(f"hf://datasets/{name}")
    assert COMMIT in card


def test_prepared_data_names_the_source_that_it_was_made_from(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "hub")
    store = Store(tmp_path / "hub", monkeypatch)
    text = tiny_config({"data": {"sources": [{"path": PARQUET}], "lanes": 2, "validation_fraction": 0}})
    [done] = prepare(text.data, text.tokenizer, tmp_path / "prepared")
    store.remove()
    config = DataConfig(sources=[{"path": str(done.folder)}])
    [record] = records = source_records(config, fingerprint(config), None)
    assert record["path"] == str(done.folder)
    assert (record["revision"], record["licences"]) == (COMMIT, ["odc-by"])
    assert record["prepared_from"] == PARQUET.replace("@main", f"@{COMMIT}")
    assert datasets_of(records) == [PARQUET.split("://datasets/")[1].split("@")[0]]
    assert COMMIT in as_table(records)[0]["path"]
