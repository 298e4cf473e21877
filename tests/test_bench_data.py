"""The benchmarks of the data pipeline run, at sizes that say nothing about speed, and their page holds every row."""

import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = [path.stem for path in SCRIPTS.glob("bench_data*.py")]
    modules = {name: __import__(name) for name in names}
    yield SimpleNamespace(**modules)
    for name in names:
        del sys.modules[name]


@pytest.fixture
def setting(bench: SimpleNamespace, tmp_path: Path) -> object:
    return bench.bench_data_common.Setting(
        folder=tmp_path,
        tokenizer=bench.bench_data.TokenizerConfig(path=str(REPOSITORY / bench.bench_data.TOKENIZER)),
        sequence_length=64,
        batch_sequences=4,
        megabytes=0.1,
        large_megabytes=0.2,
        lock_files=130,
        rounds=1,
    )


def test_prepared_shards(bench: SimpleNamespace, setting: object) -> None:
    rows = list(bench.bench_data_prepared.prepared(setting))
    assert [row.number for row in rows] == [2, 2]
    assert all(row.value > 0 for row in rows)


def test_one_process_over_raw_encoding_and_over_datasets(
    bench: SimpleNamespace, setting: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed: ModuleType = bench.bench_data_speed
    files = bench.bench_data_inputs.write_files(setting.folder / "text", ".parquet", 0.2, files=16)  # type: ignore[attr-defined]
    assert speed.against_encoding(setting, files).value > 0
    found = list(speed.against_datasets(setting))
    assert [row.what.rpartition(" ")[2] for row in found] == ["parquet", "parquet", "jsonl", "jsonl"]


def test_both_sides_of_the_comparison_with_datasets_read_as_many_tokens(
    bench: SimpleNamespace, setting: object
) -> None:
    files = bench.bench_data_inputs.write_files(setting.folder / "text", ".parquet", 0.2, files=4)  # type: ignore[attr-defined]
    config = setting.config(files, lanes=4)  # type: ignore[attr-defined]
    ours = sum(bench.bench_data_common.count_targets(setting.stream(config), 4))  # type: ignore[attr-defined]
    tokenizer = bench.bench_data_speed.load_tokenizer(setting.tokenizer)  # type: ignore[attr-defined]
    speed = bench.bench_data_speed
    for documents in (speed._encoded, speed._mapped):
        assert sum(speed.stream_datasets(setting, documents(files, tokenizer), 0)) == ours


def test_the_states_of_a_resume_stand_where_they_should(bench: SimpleNamespace, setting: object) -> None:
    resume = bench.bench_data_resume
    folder = bench.bench_data_inputs.write_files(setting.folder / "text", ".jsonl", 0.2, files=4)  # type: ignore[attr-defined]
    config = setting.config(folder, lanes=4)  # type: ignore[attr-defined]
    catalog = resume.make_catalog(config)
    total = sum(path.stat().st_size for path in folder.iterdir())
    for place, state in resume._states(config, catalog).items():
        at = sum(lane.get("byte", 0) for lane in state["sources"][0]["lanes"])
        assert place - 0.3 < at / total <= place + 0.05
    whats = [row.what for row in resume.after_resume(setting)]
    assert len(set(whats)) == 5


def test_memory_and_the_start_with_a_lock(
    bench: SimpleNamespace, setting: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = bench.bench_data_memory
    monkeypatch.setattr(memory, "_in_a_process", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(memory, "_FILES", 8)
    monkeypatch.setattr(memory, "_LANES", 4)
    rows = list(memory.memory(setting))  # type: ignore[type-var]
    assert [row.unit for row in rows] == ["x", "MB", "files", "MB", "s"]


def test_a_report_keeps_what_is_not_measured_again_and_becomes_a_page(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, made = bench.bench_data, []

    def rows(number: int) -> object:
        def measured(setting: object) -> Iterator[object]:
            made.append(number)
            yield main.Row(number, f"what {number}", 1.234 * len(made), "x", "at least 1", "detail")

        return measured

    monkeypatch.setattr(main, "MEASURES", {number: [rows(number)] for number in (1, 2, 3)})
    report, page = tmp_path / "report.json", tmp_path / "page.md"
    for arguments in (["--only", "1", "3"], ["--only", "2", "3"]):
        monkeypatch.setattr("sys.argv", ["bench_data.py", *arguments, "--json", str(report), "--page", str(page)])
        main.main()
    assert made == [1, 3, 2, 3]
    assert sorted(row["number"] for row in json.loads(report.read_text())["rows"]) == [1, 2, 3]
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ") and "what" in line][1:]
    assert [line.split(" | ")[2] for line in lines] == ["1.23", "3.70", "4.94"]


def test_documents_have_the_lengths_of_web_pages(bench: SimpleNamespace) -> None:
    lengths = sorted(map(len, bench.bench_data_inputs.documents(4)))
    assert 1500 < lengths[len(lengths) // 2] < 2500
    assert lengths[-1] > 10 * lengths[len(lengths) // 2]


def test_processes_are_started_afresh(bench: SimpleNamespace) -> None:
    """A forked process would share the memory that is measured."""
    assert isinstance(bench.bench_data_memory._SPAWN, type(multiprocessing.get_context("spawn")))
