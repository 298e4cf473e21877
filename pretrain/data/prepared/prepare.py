"""Prepare data: tokenize the sources of a config once, into folders that runs read.

The work has three steps: parts are written in parallel, duplicates are found in their tables, and shards are assembled
in order. Each file is either complete or absent, and each step skips the files that exist. So a preparation that was
killed continues where it stopped and produces the same bytes, whatever the number of workers.
"""

import contextlib
import errno
import fcntl
import os
import pickle
import queue
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data.bad_rows import BadRow, BadRowBudget
from pretrain.data.catalog import Locked
from pretrain.data.errors import DataError
from pretrain.data.hub_tokenizer import fetch
from pretrain.data.prepared.assembly import Assembly
from pretrain.data.prepared.duplicates import find_duplicates
from pretrain.data.prepared.layout import INDEX_FILE, TOKENIZER_FILE, Index, load_index
from pretrain.data.prepared.parts import Encoding, Part, write_part
from pretrain.data.prepared.plan import Plan, PrepareOptions, begin, check_division, make_plan
from pretrain.data.sources.retries import patience
from pretrain.data.tokenizer import DocumentEncoder, load_tokenizer, separator_id, vocabulary_rows
from pretrain.files import replace_text, replacing

_PARTS = "parts"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


@dataclass(frozen=True)
class Prepared:
    """A source that has been prepared."""

    path: str
    """As in the config."""
    folder: Path
    index: Index
    skipped: tuple[BadRow, ...] = ()
    """The bad rows that this call or an interrupted one before it skipped; empty if the folder was complete."""


Say = Callable[[str], None]


def prepare(
    config: DataConfig,
    tokenizer: TokenizerConfig,
    folder: Path,
    *,
    workers: int = 1,
    options: PrepareOptions = PrepareOptions(),  # noqa: B008
    locked: Locked | None = None,
    say: Say = lambda line: None,
) -> list[Prepared]:
    """Prepare every source of a config, or continue to.

    Args:
        config: the sources; what concerns the order of reading has no effect.
        tokenizer: the tokenizer.
        folder: the prepared folder of a single source; several get one each below it.
        workers: processes that read and tokenize.
        options: what decides the contents.
        locked: the remote sources; those that are absent are resolved here.
        say: called with lines of progress.

    Raises:
        DataError: a source or the tokenizer cannot be used, the sources hold too many bad rows, the folder holds
            something else, is in use or cannot be written, or the disk is too small.
        RuntimeError: a worker died.

    """
    tokenizer = fetch(tokenizer, config)
    loaded = load_tokenizer(tokenizer)
    plan = make_plan(config, tokenizer, folder, options, locked)
    skipped: dict[int, list[BadRow]] = {}
    # No source has a name that begins with a dot.
    parts = folder / (_PARTS if folder / _PARTS not in plan.folders else f".{_PARTS}")
    with _writable(folder), _locked(folder):
        begin(plan, folder)
        if not all((source / INDEX_FILE).is_file() for source in plan.folders):
            dtype = "uint16" if vocabulary_rows(loaded) <= 1 << 16 else "uint32"
            encoding = Encoding(parts, tokenizer, dtype, config.max_bad_rows)
            _delete_leftovers(folder, parts, plan)
            check_division(plan, encoding.folder)
            _write_parts(plan, encoding, workers, say)
            skipped = _skipped(plan, encoding)
            _assemble(plan, encoding, options, separator_id(loaded, tokenizer), skipped, say)
        shutil.rmtree(parts, ignore_errors=True)
        for source in plan.folders:
            for record in source.glob("shard-*.json"):
                record.unlink()
    return [
        Prepared(source.path, path, load_index(str(path)), tuple(skipped.get(number, ())))
        for number, (source, path) in enumerate(zip(config.sources, plan.folders, strict=True))
    ]


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Make a folder, and say what to do if it cannot be written or is full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(
                f"{error.filename or folder}: {error.strerror}: make room and repeat the command, which continues"
            ) from error
        if error.errno in _FORBIDDEN:
            raise DataError(f"{error.filename or folder}: {error.strerror}: choose another folder for --to") from error
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder; refuse one in which another process is working."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{folder}: another process is preparing data in this folder") from None
    else:
        yield
    finally:
        os.close(descriptor)


def _delete_leftovers(folder: Path, parts: Path, plan: Plan) -> None:
    """Delete files that a killed preparation was writing."""
    for place in {folder, parts, *plan.folders}:
        place.mkdir(exist_ok=True)
        for file in place.glob("*.tmp"):
            file.unlink(missing_ok=True)


def _write_parts(plan: Plan, encoding: Encoding, workers: int, say: Say) -> None:
    """Write the parts that are missing."""
    missing = [part for part in plan.parts if not encoding.table_file(part.number).is_file()]
    progress = _Progress(plan, encoding, missing, say)
    if workers == 1 or len(missing) <= 1:
        encoder = DocumentEncoder.load(encoding.tokenizer)
        for part in missing:
            write_part(part, encoding, encoder, progress.bad.rows)
            progress.done(part)
        return
    waiting: queue.SimpleQueue[Part] = queue.SimpleQueue()
    for part in missing:
        waiting.put(part)
    answers: queue.SimpleQueue[Part | Exception | None] = queue.SimpleQueue()
    processes = [_start_worker() for _ in range(min(workers, len(missing)))]
    try:
        for process in processes:
            threading.Thread(target=_drive, args=(process, encoding, progress, waiting, answers), daemon=True).start()
        for _ in missing:
            answer = answers.get()
            if isinstance(answer, Exception):
                raise answer
            if answer is not None:
                progress.done(answer)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start_worker() -> "subprocess.Popen[bytes]":
    """Start a worker; see `pretrain.data.workers` for why it is a plain program."""
    return subprocess.Popen(
        [sys.executable, "-c", "from pretrain.data.prepared.parts import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"},
    )


def _drive(
    process: Any, encoding: Encoding, progress: "_Progress", waiting: "queue.SimpleQueue[Part]", answers: Any
) -> None:
    """Hand one part after another to a worker; runs in a thread."""
    try:
        pickle.dump((encoding, patience()), process.stdin)
        while True:
            part = waiting.get_nowait()
            pickle.dump((part, progress.bad.rows), process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
            answers.put(part if answer is None else answer)
    except queue.Empty:
        pass
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        code = process.wait()
        cause = f"signal {-code}, possibly out of memory" if code < 0 else f"exit code {code}, see its output above"
        failure = RuntimeError(f"a worker (process {process.pid}) ended unexpectedly: {cause}")
        failure.__cause__ = error
        answers.put(failure)


class _Progress:
    """Reports the parts that are complete, counts their bad rows, and notices early that the disk is too small."""

    def __init__(self, plan: Plan, encoding: Encoding, missing: Sequence[Part], say: Say) -> None:
        self._encoding, self._say = encoding, say
        self._bytes = sum(part.bytes for part in plan.parts)
        self._left = sum(part.bytes for part in missing)
        self._read = self._written = 0
        self.bad = BadRowBudget(encoding.max_bad_rows)
        """Counts the bad rows of all complete parts."""
        unread = {part.number for part in missing}
        for part in plan.parts:
            if part.number not in unread:
                self._spend(part)
        if len(missing) < len(plan.parts):
            say(f"continuing: {len(plan.parts) - len(missing)} of {len(plan.parts)} parts are complete")

    def done(self, part: Part) -> None:
        """Count a part.

        Raises:
            DataError: the complete parts hold too many bad rows, or the disk is too small for the rest, judged by
                the parts so far.

        """
        self._spend(part)
        self._left -= part.bytes
        self._read += part.bytes
        self._written += self._encoding.tokens_file(part.number).stat().st_size
        self._say(f"read {(self._bytes - self._left) / 1e6:,.0f} of {self._bytes / 1e6:,.0f} MB")
        needed = self._written * self._left // max(1, self._read)
        free = shutil.disk_usage(self._encoding.folder).free
        if needed > free:
            raise DataError(
                f"{self._encoding.folder.parent}: about {needed / 1e6:,.1f} MB more are needed, and {free / 1e6:,.1f} "
                "MB are free on this disk: make room and repeat the command, which continues"
            )

    def _spend(self, part: Part) -> None:
        for row in self._encoding.bad_rows(part.number):
            self.bad.spend(row)


def _skipped(plan: Plan, encoding: Encoding) -> dict[int, list[BadRow]]:
    """Return the bad rows of each source, whose files are called as in the lock."""
    found: dict[int, list[BadRow]] = {}
    for part in plan.parts:
        rows = encoding.bad_rows(part.number)
        found.setdefault(part.source, []).extend(replace(row, path=plan.names.get(row.path, row.path)) for row in rows)
    return found


def _assemble(
    plan: Plan,
    encoding: Encoding,
    options: PrepareOptions,
    eos_id: int,
    skipped: Mapping[int, Sequence[BadRow]],
    say: Say,
) -> None:
    """Make shards and the index of every source."""
    numbers = [part.number for part in plan.parts]
    keep: dict[int, npt.NDArray[np.bool_]] = {}
    if options.remove_duplicates:
        say("looking for duplicates")
        keep = dict(zip(numbers, find_duplicates(numbers, encoding.table), strict=True))
    for source, folder in enumerate(plan.folders):
        if (folder / INDEX_FILE).is_file():
            continue
        own = [part.number for part in plan.parts if part.source == source]
        kept = [keep[number] for number in own] if options.remove_duplicates else None
        recipe = plan.record["sources"][source]
        seen = recipe["seen"]
        if not sum(len(encoding.table(number).tokens) for number in own):
            raise DataError(f"{seen['path']}: no row holds any text that has tokens")
        characters = (encoding.table(number).characters for number in own)
        assembly = Assembly(folder, encoding, own, kept, options.shard_tokens)
        shards = []
        for shard in assembly.shards():
            shards.append(shard)
            say(f"{folder / shard.name}: {shard.tokens:,} tokens")
        index = Index(
            tokenizer_sha256=plan.record["tokenizer_sha256"],
            eos_token=encoding.tokenizer.eos_token,
            eos_id=eos_id,
            dtype=encoding.dtype,
            characters=int(
                sum(
                    counts[keep[number]].sum() if number in keep else counts.sum()
                    for number, counts in zip(own, characters, strict=True)
                )
            ),
            duplicates_removed=None if kept is None else int(sum((~one).sum() for one in kept)),
            source={**seen, "text_field": recipe["text_field"], "where": recipe["where"]},
            shards=tuple(shards),
            bad_rows=_by_file(skipped[source]),
        )
        with replacing(folder / TOKENIZER_FILE) as partial:
            shutil.copyfile(encoding.tokenizer.path, partial)
        replace_text(folder / INDEX_FILE, index.to_json())


def _by_file(rows: Sequence[BadRow]) -> dict[str, int]:
    """Count the rows of each file, in the order of the files."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row.path] += row.rows
    return dict(counts)
