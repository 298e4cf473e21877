"""Bad rows are skipped up to a number, counted and named; whatever else is wrong with a file is an error."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import DataError, check_sources, without_bytes
from pretrain.data.bad_rows import BadRow
from pretrain.data.catalog import make_catalog
from pretrain.data.formats import read_unit
from pretrain.launch import train
from pretrain.run.folder import RunError, RunFolder
from tests.conftest import TINY
from tests.data.corpus import drain, make_setting, make_texts, on_ranks, rows, write_jsonl

pytestmark = pytest.mark.usefixtures("warm")

TEXTS = [text for text in make_texts(5, 90, longest=30) if text][:60]
BAD = [
    b'{"text": null}',
    b'{"text": 3}',
    b'{"text": "\xff"}',
    b'{"text"',
    b"[]",
    b'{"body": "a"}',
    rb'{"text": "\ud83d"}',
]


def read(path: Path, data: dict[str, Any] | None = None, **source: Any) -> tuple[list[str], int]:
    """The texts of a file and the number of its bad rows."""
    config = DataConfig(sources=[SourceConfig(path=str(path), **source)], lanes=1, **(data or {}))
    [units] = make_catalog(config).units(config)
    found = [one for unit in units for _, one in read_unit(unit, 0, 1 << 20)]
    return [one for one in found if one and isinstance(one, str)], sum(o.rows for o in found if isinstance(o, BadRow))


def lines(texts: list[str], bad: dict[int, bytes] | None = None) -> bytes:
    every = [json.dumps({"text": text}).encode() for text in texts]
    for place in sorted(bad or {}, reverse=True):
        every.insert(place, (bad or {})[place])
    return b"\n".join(every) + b"\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_rows_are_skipped_up_to_the_limit_on_any_number_of_ranks(
    tmp_path: Path, tokenizer: TokenizerConfig, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    places = [0, 7, 7, 20, 33, 41, 59]
    for part in range(2):
        (tmp_path / f"{part}.jsonl").write_bytes(lines(TEXTS[part::2]))
    clean = make_setting(tokenizer, tmp_path, lanes=2, epochs=3)
    expected = rows(drain(clean.open(), 4))
    content = lines(TEXTS[::2]).splitlines()
    for place, bad in zip(places, BAD, strict=True):
        content.insert(place // 2, bad)
    (tmp_path / "0.jsonl").write_bytes(b"\n".join([*content, BAD[0]]))  # the last one has no document behind it

    dirty = clean.changed(max_bad_rows=8)
    with caplog.at_level("WARNING"):
        stream = dirty.open(workers=workers)
        assert rows(drain(stream, 4)) == expected
    assert [source.bad_rows for source in stream.progress().values()] == [8]  # each once, though there are three epochs
    assert sum("skipped a bad row" in record.message for record in caplog.records) == 8
    stream.close()

    def on_a_rank(group: Any) -> list[Any]:
        stream = clean.changed(max_bad_rows=7).open(group=group)
        with pytest.raises(Exception, match=r"0\.jsonl.*more than the 7 of data\.max_bad_rows|another rank"):
            drain(stream, 4)
        return [stream.state()]

    if not workers:
        states = on_ranks(2, on_a_rank)
        assert states[0] == states[1]
        resumed = dirty.open(state=states[0][0])
        done = states[0][0]["sequences_emitted"]
        assert rows(drain(resumed, 4)) == expected[done:]
        assert [source.bad_rows for source in resumed.progress().values()] == [8]


def test_bad_rows_are_counted_once_wherever_a_run_is_interrupted(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS[:20], {0: BAD[0], 5: BAD[1], 6: BAD[2], 20: BAD[3]}))
    setting = make_setting(tokenizer, path, lanes=1, epochs=2, max_bad_rows=4)
    expected, done, state = rows(drain(setting.open(), 1)), [], None
    while len(done) < len(expected):
        stream = setting.open(state=state)
        done += rows(drain(stream, 1, limit=1))
        state = stream.state()
    assert done == expected
    assert state is not None
    assert state["sources"][0]["bad_rows"] == 4


def test_the_check_counts_bad_rows_of_all_files_against_one_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(lines(TEXTS, {3: BAD[0], 9: BAD[3]}))
    source = SourceConfig(path=str(tmp_path))
    [problem] = check_sources(DataConfig(sources=[source], lanes=1, max_bad_rows=3))
    assert "b.jsonl: line 11 is not valid JSON" in problem
    assert "4 bad rows so far, more than the 3 of data.max_bad_rows" in problem
    assert check_sources(DataConfig(sources=[source], lanes=1, max_bad_rows=4, validation_fraction=0.0)) == []
    assert "4 bad rows were found" in caplog.text
    assert "a.jsonl: line 4: 'text' holds NoneType" in caplog.text


def test_a_corrupt_page_loses_no_row_group_but_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": TEXTS}), path, row_group_size=20, use_dictionary=False, write_page_checksum=True,
        compression="none",
    )  # fmt: skip
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 5] ^= 255
    path.write_bytes(content)
    assert read(path) == (TEXTS[:20] + TEXTS[40:], 20)
    [problem] = check_sources(DataConfig(sources=[SourceConfig(path=str(path))], lanes=1, max_bad_rows=19))
    assert "row group 1 is damaged" in problem
    source = SourceConfig(path=str(path))
    assert check_sources(DataConfig(sources=[source], lanes=1, max_bad_rows=20, validation_fraction=0.0)) == []


def pieces(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Several members or frames, which end in the middle of a line."""
    return lambda content: b"".join(pack(content[start : start + 50]) for start in range(0, len(content), 50))


KINDS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".ndjson.GZ": gzip.compress,
    ".json.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".JSONL.zstd": pieces(zstandard.ZstdCompressor(write_checksum=True).compress),
    ".jsonl.gz": pieces(gzip.compress),
}


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n"])
def test_good_data_is_read_in_every_wrapping(tmp_path: Path, suffix: str, start: bytes, end: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(KINDS[suffix](start + lines(TEXTS).replace(b"\n", end)))
    assert read(path) == (TEXTS, 0)
    assert read(path, split_units=3)[1] == 0
    if ".json." in suffix:
        rows = [{"text": text, "n": float("nan")} for text in TEXTS]
        path.write_bytes(KINDS[suffix](start + b" \n" + json.dumps(rows, indent=1).encode()))
        assert read(path) == (TEXTS, 0)


def outcome(path: Path) -> tuple[list[str], int] | None:
    """What `read` returns; None after an error, which names the file."""
    try:
        return read(path)
    except DataError as error:
        if str(path) not in str(error):
            raise
        return None


@pytest.mark.parametrize("suffix", [*KINDS, ".parquet"])
@pytest.mark.parametrize("seed", [0, pytest.param(range(1, 40), marks=pytest.mark.long)])
def test_damage_never_loses_a_good_document_in_silence(tmp_path: Path, suffix: str, seed: int | range) -> None:
    """A cut or changed file ends in an error, in bad rows, or in what was written."""
    for number in [seed] if isinstance(seed, int) else seed:
        draw = random.Random(number)
        path = tmp_path / f"a{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=20, write_page_checksum=True)
        else:
            path.write_bytes(KINDS[suffix](lines(TEXTS)))
        whole = path.read_bytes()
        for _ in range(20):
            place = draw.randrange(len(whole))
            if draw.random() < 0.5:
                path.write_bytes(whole[:place])
                cut = True
            else:
                flipped = bytearray(whole)
                flipped[place] ^= 1 << draw.randrange(8)
                path.write_bytes(flipped)
                cut = False
            found = outcome(path)
            if found is None:
                continue
            texts, bad = found
            if suffix == ".jsonl":  # nothing tells that lines are missing, or that a letter is another one
                assert len(texts) + bad >= (0 if cut else len(TEXTS) - 1)
            else:
                assert len(texts) + bad == len(TEXTS) or cut
                assert suffix != ".parquet" or set(texts) <= set(TEXTS)


def test_utf_16_is_named(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(lines(TEXTS).decode().encode(encoding)))
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: is encoded in UTF-16, expected UTF-8: convert it"):
            read(path)


def test_a_large_window_is_refused_by_name_and_can_be_allowed(tmp_path: Path) -> None:
    options = zstandard.ZstdCompressionParameters(window_log=24, enable_ldm=True, write_content_size=0)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    content = packer.compress(lines(TEXTS)) + packer.flush()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(lines(TEXTS[:1])) + content)  # not in the first frame
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: .* window of 16 MiB, more than the 8 .*max_zstd_window_mib"):
        read(path, {"max_zstd_window_mib": 8})
    assert read(path, {"max_zstd_window_mib": 16}) == (TEXTS[:1] + TEXTS, 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".parquet"])
def test_a_document_beyond_the_limit_is_a_bad_row(tmp_path: Path, suffix: str) -> None:
    texts = ["a", "x" * (3 << 20), "b", "y" * (1 << 19), "c"]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif ".json." in suffix or suffix == ".json":
        content = json.dumps([{"text": text} for text in texts]).encode()
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    else:
        write_jsonl(path, texts)
    assert read(path, {"max_document_mib": 1}) == ([texts[0], *texts[2:]], 1)
    assert read(path) == (texts, 0)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_bomb_takes_little_memory(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """200 MiB in one line without an end."""
    import tracemalloc

    path = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    path.write_bytes(pack(b'{"text": "good"}\n{"text": "') + pack(b" " * (8 << 20)) * 25)
    tracemalloc.start()
    try:
        assert read(path, {"max_document_mib": 1}) == (["good"], 1)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_a_value_that_a_dictionary_repeats_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * (2 << 20)]))
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    config = DataConfig(sources=[SourceConfig(path=str(tmp_path / "a.parquet"))], lanes=1)
    [[unit]] = make_catalog(config).units(config)
    before = pa.total_allocated_bytes()
    found = read_unit(unit, 0, 1 << 20)
    assert len(str(next(found)[1])) == 2 << 20
    assert pa.total_allocated_bytes() - before < 600 << 20  # all rows of a batch would take 6 GB
    found.close()


def test_a_document_of_50_mb_and_100000_tiny_ones(tmp_path: Path) -> None:
    texts = [str(number) for number in range(100_000)] + ["z" * 50_000_000]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    assert read(tmp_path / "a.jsonl") == (texts, 0)


def test_other_columns_may_be_anything(tmp_path: Path) -> None:
    tables = [
        pa.table({"text": TEXTS, "meta": [{"a": 1}] * 60, "license": [["mit"]] * 60}),
        pa.table({"meta": ["x"] * 60, "text": pa.array(TEXTS).dictionary_encode(), "source": [{"a": 1}] * 60}),
        pa.Table.from_arrays([pa.array(range(60)), pa.array(TEXTS), pa.array(TEXTS)], names=["x", "x", "text"]),
        pa.table({"text": pa.array(TEXTS, pa.string_view()), "list": [[{"b": [1]}]] * 60}),
        pa.table({"text": pa.array([], pa.string())}),
    ]
    for number, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"{number}.parquet")
    config = DataConfig(sources=[SourceConfig(path=str(tmp_path))], lanes=1, validation_fraction=0.0)
    assert check_sources(config) == []
    assert read(tmp_path) == (TEXTS * 4, 0)


def test_a_broken_arrow_schema_in_the_footer_does_no_harm(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS, "n": range(60)})
    for key, value in ((b"ARROW:schema", b"garbage"), (b"pandas", b"{no json"), (b"\xff", b"\xff")):
        with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, store_schema=False) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({key: value})
        assert read(tmp_path / "a.parquet") == (TEXTS, 0)


def test_nested_fields_and_templates_are_the_same_in_both_formats(tmp_path: Path) -> None:
    every: list[dict[str, Any]] = [
        {"a": {"b": {"c": "deep"}, "n": 1}, "title": "T", "text": "x"},
        {"a": {"b": {"c": "other"}, "n": 2}, "title": "", "text": ""},
        {"a": {"b": {"c": ""}, "n": 3}, "title": "U {}", "text": "y"},
    ]
    pq.write_table(pa.Table.from_pylist(every), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(every))
    for name in ("a.parquet", "a.json"):
        path = tmp_path / name
        assert read(path, text_field="a.b.c") == (["deep", "other"], 0)
        assert read(path, text_field="{{{title}}}\n{text}") == (["{T}\nx", "{U {}}\ny"], 0)
        assert read(path, text_field="{a.b.c}.", where="a.n < 3 and title != ''") == (["deep."], 0)
    with pytest.raises(
        DataError, match=r"has no column 'titel'; its columns are a, title, text \(did you mean title\?\)"
    ):
        read(tmp_path / "a.parquet", text_field="{titel}")
    (tmp_path / "b.jsonl").write_text('{"meta.text": "own", "meta": {"text": "nested"}}\n{"meta": {"text": "nested"}}')
    assert read(tmp_path / "b.jsonl", text_field="meta.text") == (["own", "nested"], 0)


@pytest.mark.parametrize("template", ["{", "}", "{a", "a}", "{}", "{a!r}", "{a:>3}", "{a[0]}", "{{a}}", "{ a }"])
def test_a_template_holds_fields_only(template: str) -> None:
    with pytest.raises(ValidationError, match="text_field"):
        SourceConfig(path="a", text_field=template)


def test_a_condition_that_no_row_meets_names_the_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "language": "en"}\n')
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), where="langauge == 'en'")
    [problem] = check_sources(DataConfig(sources=[source], lanes=1))
    assert "no row that meets where \"langauge == 'en'\" holds any text" in problem
    assert "did you mean language?" in problem
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), where="`a.b` == 1")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "a.b": 2}\n')
    [problem] = check_sources(DataConfig(sources=[source], lanes=1))
    assert problem.endswith("holds any text")


def test_two_fields_of_one_name_within_a_column_are_refused(tmp_path: Path) -> None:
    pair = pa.StructArray.from_arrays([pa.array(["z"]), pa.array(["a"]), pa.array(["b"])], names=["z", "t", "t"])
    pq.write_table(pa.table({"x": pair, "text": ["c"]}), tmp_path / "a.parquet")
    for source in ({"text_field": "x.t"}, {"where": "x.t == 'a'"}):
        with pytest.raises(DataError, match=r"a\.parquet: has 2 fields 't' in 'x', expected one: rename one"):
            read(tmp_path / "a.parquet", **source)
    assert read(tmp_path / "a.parquet", text_field="x.z", where="x.z == 'z'") == (["z"], 0)


def test_a_source_of_bad_rows_alone_is_not_called_empty(tmp_path: Path) -> None:
    """A file with the line ends of old Macs is a single row."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r{"text": "b"}\r')
    source = SourceConfig(path=str(tmp_path / "a.jsonl"))
    [problem] = check_sources(DataConfig(sources=[source], lanes=1, max_bad_rows=10))
    assert "no row holds any text that can be used, the first problem: " in problem
    assert "a.jsonl: line 1 is not valid JSON: Extra data" in problem


def test_a_file_that_ended_a_run_by_a_bad_row_may_be_repaired_and_no_other(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.check.FULL_SCAN_BYTES", 0)
    monkeypatch.setattr("pretrain.data.check._SAMPLE_BYTES", 2000)
    monkeypatch.setattr("pretrain.data.reading.REFILL_BYTES", 1 << 13)
    texts = [f"{number} " + "time water people stone light river " * 20 for number in range(200)]
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(lines(texts, {100: b'{"text": null}'}))
    other.write_bytes(lines(texts))
    sources = [{"path": str(tmp_path / "?.jsonl")}]
    config = tiny_config(
        {
            "data": {"sources": sources, "lanes": 1, "validation_fraction": 0.1},
            "checkpoint.save_every_steps": 1000,
            "train.total_tokens": TINY["train"]["global_batch_tokens"] * 60,
        }
    )
    with pytest.raises(DataError, match=r"a\.jsonl: line 101"):
        train(config)
    path.write_bytes(lines(texts))
    other.write_bytes(lines(texts[:-1]))
    with pytest.raises(RunError, match=r"data\.sources\.0 contents"):
        train(config, stop_at=1000)
    other.write_bytes(lines(texts))
    capsys.readouterr()
    forgotten = []

    def forget(state: Any) -> Any:
        forgotten.append(state)
        return without_bytes(state)

    monkeypatch.setattr("pretrain.launch.building.without_bytes", forget)
    assert train(config) == 0
    assert len(forgotten) == 1  # places in a repaired file may have moved
    assert "taken as repaired" in capsys.readouterr().out
    launches = RunFolder(config.run_folder).manifest()["launches"]
    assert [len(launch["changed_data"]) for launch in launches] == [0, 1]
