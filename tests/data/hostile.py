"""Folders of hostile data, drawn from a seed, and an oracle that reads them with nothing of ours.

Every file is valid, or damaged in a way that programs of this field really produce: `write_folder` makes them, and
`read_plainly` says which documents a file holds.
"""

import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

WORDS = [
    "the",
    "sea",
    "naïve",
    "鯨",
    "🐋",
    "\u2028",
    "\u0085",
    "\x00",
    "\r",
    '"',
    "\\",
    "{",
    "}",
    "[",
    "]",
    ",",
    "\ufeff",
    "\x1b",
]
Rows = list[dict[str, Any]]


@dataclass
class Found:
    """What a file holds."""

    texts: list[str] = field(default_factory=list)
    """In order, without empty ones."""
    bad: int = 0
    """Rows without usable text."""
    damaged: bool = False
    """The file as a whole cannot be read to its end."""


def draw_text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.choice([0, 1, 5, 40, 3000 if draw.random() < 0.1 else 9])))


def draw_rows(draw: random.Random) -> Rows:
    rows = []
    for number in range(draw.choice([1, 3, 30, 90])):
        row: dict[str, Any] = {"id": number, "text": draw_text(draw), "n": draw.choice([0, 2**63 - 1, -1, None])}
        row["meta"] = draw.choice([{"a": {"b": "x"}}, {"a": None}, None])
        row["licence"] = draw.choice([["mit"], [], None])
        rows.append(row)
    return rows


# --- JSON ------------------------------------------------------------------------------------------------------------

BAD_LINES = [
    b'{"text": null}', b'{"text": 3}', b'{"text": "\xff"}', b"{", b"[]", b"3", b'"text"', b'{"TEXT": "a"}',
    rb'{"text": "\ud800"}', b'{"text": "a"}{"text": "b"}', b'{"text": ["a"]}', b"{'text': 'a'}", b"null", b"\x00",
    b"\xef\xbb\xbf{}", b'{"text": "a",}', b'{"x": ' + b"[" * 5000 + b"}", b'{"text": "a\tb"}',
]  # fmt: skip
ODD_LINES = [
    b"", b"  \t", b"\r", b'{"text": "a", "text": "b"}', b'{"text": "a", "n": NaN, "m": -Infinity}',
    b'{"n": ' + b"9" * 5000 + b', "text": "long"}', b'{"text": "\\ud83d\\ude00 \\u0000"}', b' {"text":"a"} \r',
    b'{"text": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}",
]  # fmt: skip


def json_lines(draw: random.Random, rows: Rows) -> bytes:
    lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5).encode() for row in rows]
    for _ in range(draw.choice([0, 0, 1, 4])):
        lines.insert(draw.randrange(len(lines) + 1), draw.choice(ODD_LINES))
    if draw.random() < 0.3:
        lines.insert(draw.randrange(1, len(lines) + 1), draw.choice(BAD_LINES))
    end = draw.choice([b"\n", b"\n", b"\r\n"])
    return draw.choice([b"", b"\xef\xbb\xbf"]) + end.join(lines) + draw.choice([b"", end, end * 3])


def json_array(draw: random.Random, rows: Rows) -> bytes:
    elements: list[Any] = list(rows)
    if draw.random() < 0.3:
        elements.insert(draw.randrange(len(elements) + 1), draw.choice([None, [], [["a"]], 3, {"text": None}]))
    text = json.dumps(elements, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5).encode()
    damage = draw.choice([b""] * 4 + [b",", b"\n{}", b"]"])
    return draw.choice([b"", b"\xef\xbb\xbf", b"\n \t" * 4000]) + text + damage + draw.choice([b"", b"\n", b"\r\n "])


def pack_gzip(draw: random.Random, content: bytes) -> bytes:
    cuts = sorted(draw.randrange(len(content) + 1) for _ in range(draw.choice([0, 1, 5])))
    members = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    return b"".join(map(gzip.compress, members)) + bytes(draw.choice([0, 0, 100]))  # zeros may follow


def pack_zstd(draw: random.Random, content: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=True, write_content_size=draw.random() < 0.5)
    half = draw.randrange(len(content) + 1)
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    pieces = draw.choice([[content], [content[:half], content[half:]], [b"", content, b""]])
    return skippable[: 12 * draw.randrange(2)] + b"".join(map(compressor.compress, pieces))


def damage(draw: random.Random, content: bytes) -> bytes:
    """Cut a file, as a broken download is, or write other bytes behind it or into it."""
    place = draw.randrange(1, max(2, len(content)))
    return draw.choice([content[:place], content + b"garbage!", content[:place] + bytes(8) + content[place + 8 :], b""])


# --- Parquet ---------------------------------------------------------------------------------------------------------


def write_parquet(draw: random.Random, path: Path, rows: Rows) -> None:
    texts: list[str | None] = [row["text"] for row in rows]
    if draw.random() < 0.3:
        texts[draw.randrange(len(texts))] = None
    kind = draw.choice([pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
    column: Any = pa.array(texts, pa.string()).cast(kind)
    if draw.random() < 0.1:  # not valid UTF-8
        values = [
            None if text is None else text.encode() + b"\xff" * (number == 0) for number, text in enumerate(texts)
        ]
        column = pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())
    others: dict[str, Any] = {
        "id": [row["id"] for row in rows],
        "meta": [row["meta"] for row in rows],
        "licence": draw.choice([[row["licence"] for row in rows], ["mit"] * len(rows), [{"a": 1}] * len(rows)]),
        "when": pa.array([0] * len(rows), pa.timestamp("us")),
        "none": pa.nulls(len(rows)),
        "source": pa.array([b"\xff"] * len(rows), pa.binary()),
    }
    names = draw.sample(sorted(others), draw.randrange(len(others)))
    columns = [(name, others[name]) for name in names]
    columns.insert(draw.randrange(len(columns) + 1), ("text", column))
    if draw.random() < 0.1:
        columns.append(draw.choice([("text", column), ("id", others["id"]), ("id", others["id"])]))
    arrays = [value if isinstance(value, pa.Array) else pa.array(value) for _, value in columns]
    table = pa.Table.from_arrays(arrays, names=[name for name, _ in columns])
    with pq.ParquetWriter(
        path, table.schema,
        compression=draw.choice(["none", "snappy", "gzip", "brotli", "lz4", "zstd"]),
        use_dictionary=draw.random() < 0.5, data_page_version=draw.choice(["1.0", "2.0"]),
        write_statistics=draw.random() < 0.5, write_page_index=draw.random() < 0.5, write_page_checksum=True,
        data_page_size=draw.choice([100, 1 << 20]), store_schema=draw.random() < 0.7,
    ) as writer:  # fmt: skip
        if draw.random() < 0.3:
            writer.write_table(table.slice(0, 0))  # a row group of no rows
        writer.write_table(table, row_group_size=draw.choice([1, 7, 1000]))


# --- Folders ---------------------------------------------------------------------------------------------------------

JSON_KINDS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "": lambda _, content: content, ".gz": pack_gzip, ".zst": pack_zstd, ".ZSTD": pack_zstd, ".Gz": pack_gzip,
}  # fmt: skip
BYSTANDERS = [
    "_SUCCESS",
    ".a.jsonl.crc",
    "a.jsonl.sha256",
    "README.md",
    ".hidden.parquet",
    "_metadata",
    "x.lock",
    "notes",
]


def write_folder(seed: int, root: Path) -> list[Path]:
    """Write one to five files below a folder, and what accompanies data; return those that are data."""
    draw = random.Random(seed)
    files = []
    for number in range(draw.randint(1, 5)):
        folder = root / draw.choice(["", "sub", "x.parquet", "deep/er"])
        folder.mkdir(parents=True, exist_ok=True)
        rows = draw_rows(draw)
        if draw.random() < 0.4:
            path = folder / f"{number}{draw.choice(['.parquet', '.PARQUET'])}"
            write_parquet(draw, path, rows)
        else:
            stem = draw.choice([".jsonl", ".ndjson", ".json", ".JSON"])
            packing = draw.choice(list(JSON_KINDS))
            as_array = stem.lower() == ".json" and draw.random() < 0.6
            content = (json_array if as_array else json_lines)(draw, rows)
            if draw.random() < 0.05:
                content = content.decode("utf-8", "replace").encode("utf-16")
            path = folder / f"{number}{stem}{packing}"
            path.write_bytes(JSON_KINDS[packing](draw, content))
        if draw.random() < 0.15:
            path.write_bytes(damage(draw, path.read_bytes()))
        files.append(path)
    for name in draw.sample(BYSTANDERS, 3):
        (root / name).write_bytes(b"x")
    return files


def read_plainly(path: Path) -> Found:
    """Read a file in one go with the standard library, pyarrow and zstandard."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            return _read_parquet(path)
        content = _unpacked(path, name)
    except Exception:
        return Found(damaged=True)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Found(damaged=True)
    content = content.removeprefix(b"\xef\xbb\xbf")
    found = Found()
    if ".json" in name and ".jsonl" not in name and content.strip(b" \t\r\n").startswith(b"["):
        try:
            values = json.loads(content)
        except ValueError:
            return Found(damaged=True)
    else:
        values = [_value(line) for line in content.split(b"\n") if line.strip()]
    for value in values:
        text = value.get("text") if isinstance(value, dict) else None
        try:
            if not isinstance(text, str):
                raise ValueError
            found.texts += [text] if text.encode() else []
        except ValueError:
            found.bad += 1
    return found


def _value(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), parse_int=lambda digits: 0)
    except (ValueError, RecursionError):
        return None


def _unpacked(path: Path, name: str) -> bytes:
    raw = path.read_bytes()
    if name.endswith(".gz"):
        if not raw:
            raise ValueError
        return gzip.decompress(raw)
    if not name.endswith((".zst", ".zstd")):
        return raw
    out, rest = io.BytesIO(), raw
    while True:
        frame = zstandard.ZstdDecompressor().decompressobj()
        out.write(frame.decompress(rest))
        if not frame.eof:
            raise ValueError
        rest = frame.unused_data
        if not rest:
            return out.getvalue()


def _read_parquet(path: Path) -> Found:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except pa.ArrowInvalid:  # the file may be good without the Arrow schema in its footer
        content = path.read_bytes().replace(b"ARROW:schema", b"ARROW:ignore")
        file = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)
    if file.schema_arrow.names.count("text") != 1:
        return Found(damaged=True)
    found = Found()
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        try:
            column = file.read_row_group(group, columns=["text"]).column(0)
        except Exception:
            found.bad += rows
            continue
        for value in column:
            try:
                text = value.as_py()
            except UnicodeDecodeError:
                text = None
            if text is None:
                found.bad += 1
            elif text:
                found.texts.append(text)
    return found
