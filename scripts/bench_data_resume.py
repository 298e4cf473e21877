"""Number 4: the first batch after a resume, late in the text compared with early."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench_data_common import Row, Setting, ratios
from bench_data_inputs import write_files

from pretrain.config.data import DataConfig
from pretrain.data import Catalog, StreamState, make_catalog
from pretrain.data.documents import Cursor, Tokenized, lane_documents
from pretrain.data.order import make_plan
from pretrain.data.prepared.layout import DOCUMENTS_SUFFIX, INDEX_FILE, TOKENS_SUFFIX, load_index
from pretrain.data.prepared.prepare import prepare
from pretrain.data.state import initial_state, lane_state

_LANES = 4
EARLY, LATE = 0.05, 0.95
_TARGET = "at most 1.2"


def after_resume(setting: Setting) -> Iterator[Row]:
    """4: the first batch after a resume at 95 % of the text, compared with one at 5 %."""
    for name, suffix, target in (
        ("parquet, row groups of 1,000", ".parquet", _TARGET),
        ("plain jsonl", ".jsonl", _TARGET),
        ("prepared", "", _TARGET),
        ("jsonl.gz", ".jsonl.gz", ""),
        ("jsonl.zst", ".jsonl.zst", ""),
    ):
        folder = setting.folder / "resume"
        if suffix:
            write_files(folder, suffix, setting.large_megabytes, files=_LANES)
        else:
            _prepared(setting, folder)
        yield _measure(setting, folder, name, target)
        shutil.rmtree(folder)


def _measure(setting: Setting, folder: Path, name: str, target: str) -> Row:
    config = setting.config(folder, lanes=_LANES)
    catalog = make_catalog(config)
    states = _states(config, catalog)
    seconds: dict[float, list[float]] = {place: [] for place in states}
    for _ in range(setting.rounds):
        for place, state in states.items():
            start = time.perf_counter()
            stream = setting.stream(config, state=state, catalog=catalog)
            stream.next_batch(setting.batch_sequences)
            seconds[place].append(time.perf_counter() - start)
            stream.close()
    late, early = (statistics.median(seconds[place]) for place in (LATE, EARLY))
    what = f"first batch after a resume at 95 %, over 5 %: {name}"
    return Row(
        4, what, ratios(seconds[LATE], seconds[EARLY]), "x", target, f"{late:.2f} s and {early:.2f} s, {_LANES} lanes"
    )


def _states(config: DataConfig, catalog: Catalog) -> dict[float, StreamState]:
    """The states with each lane at these shares of its text, at the beginning of a document."""
    plan = make_plan(config, "train", 1, catalog)
    states = {place: initial_state(plan) for place in (EARLY, LATE)}
    cursors: dict[float, list[Cursor]] = {place: [] for place in states}
    for lane in range(plan.lanes):
        ends, found = [0], []  # bytes of text behind each document or run, and what it is
        for one in lane_documents(plan, lane, Cursor(0, 0, 0, 0), 0, 1 << 20, [], _no_token_bytes):
            tokenized = isinstance(one, Tokenized)
            found.append(one if tokenized else one.position)
            ends.append(ends[-1] + (one.run.sizes[-1] if tokenized else one.text_bytes))
        for place in states:
            wanted = place * ends[-1]
            index = max(0, bisect_left(ends, wanted) - 1)
            cursor = found[index]
            if isinstance(cursor, Tokenized):
                row = bisect_left(cursor.run.sizes, wanted - ends[index]) - 1
                cursor = cursor.position._replace(row=cursor.position.row + max(0, row))
            cursors[place].append(cursor)
    for place, state in states.items():
        [source] = state["sources"]
        source["lanes"] = [lane_state(cursor) for cursor in cursors[place]]
    return states


def _no_token_bytes() -> None:
    raise RuntimeError("prepared folders record the size of their documents")


def _prepared(setting: Setting, folder: Path) -> None:
    """Prepare a part of the text, and repeat its shard until there is as much as of the other formats."""
    megabytes = min(setting.megabytes, setting.large_megabytes / _LANES)
    text = write_files(setting.folder / "resume-text", ".parquet", megabytes, files=1)
    [done] = prepare(setting.config(text, lanes=1), setting.tokenizer, setting.folder / "resume-part")
    index = load_index(str(done.folder))
    [shard] = index.shards
    folder.mkdir()
    shards = []
    for number in range(round(setting.large_megabytes / megabytes)):
        shards.append(replace(shard, name=f"shard-{number:05}"))
        for suffix in (TOKENS_SUFFIX, DOCUMENTS_SUFFIX):
            os.link(done.folder / f"{shard.name}{suffix}", folder / f"{shards[-1].name}{suffix}")
    (folder / INDEX_FILE).write_text(replace(index, shards=tuple(shards)).to_json(), encoding="utf-8")
    shutil.rmtree(text)
    shutil.rmtree(done.folder)
