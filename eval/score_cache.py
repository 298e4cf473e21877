"""Scores of requests on disk, so that an evaluation that was stopped or repeated scores nothing a second time.

    <cache>/eval-scores/<digest of the settings>/settings.json        for people
    <cache>/eval-scores/<digest of the settings>/<writer>.scores      one file per process that scored anything

A request is what lm-eval asks of a model: how likely is `continuation` after `context`. Its score depends on the two
texts and on `ScoreSettings`; the version of a task and its solved examples are part of the text. So the same scores
serve every task, limit and number of processes, and a changed prompt is never mistaken for the old one.

Each line is one batch: a CRC-32 of the rest in hexadecimal, a blank, and JSON {key: [log-likelihood, greedy]}. Lines
are only ever appended, each as soon as its batch is scored. A line that a kill or a full disk cut off, or
that was damaged later, fails its CRC and is ignored. No two processes write to the same file, so that this works on any
file system without locks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypedDict

from eval.errors import EvalError
from eval.scoring import Score
from pretrain.files import replace_text

FOLDER = "eval-scores"
_SUFFIX = ".scores"


class ScoreSettings(TypedDict):
    """What a score depends on besides the texts of its request."""

    # SHA-256 over the model's weights, config and tokenizer.
    model: str
    # Dtype of the weights, for example "float32".
    dtype: str
    # "cpu" or "cuda".
    device: str
    # Longest input in tokens.
    context_length: int
    # The token before a text, or "none".
    bos: str
    # Versions of lm_eval, torch, transformers and tokenizers.
    versions: dict[str, str]


class ScoreCache:
    """The scores under one set of settings.

    Attributes:
        folder: where they are.

    Args:
        cache: the folder of everything that is kept.
        settings: what the scores depend on.
    """

    def __init__(self, cache: Path, settings: ScoreSettings) -> None:
        text = json.dumps(settings, sort_keys=True, indent=1)
        self.folder = cache.expanduser() / FOLDER / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._settings = text
        self._scores: dict[str, Score] | None = None
        self._writer: BinaryIO | None = None

    def known(self, keys: Collection[str]) -> dict[str, Score]:
        """Return the scores of those of `keys` that have one.

        Files are read once; what other processes add later is not seen.
        """
        if self._scores is None:
            self._scores = {}
            for file in sorted(self.folder.glob(f"*{_SUFFIX}")):
                self._scores.update(_read(file))
        return {key: self._scores[key] for key in keys if key in self._scores}

    def add(self, scores: Mapping[str, Score]) -> None:
        """Keep the scores of a batch; they are safe from a kill when this returns.

        Raises:
            EvalError: they cannot be written.
        """
        text = json.dumps({key: [value, greedy] for key, (value, greedy) in scores.items()}).encode()
        try:
            if self._writer is None:
                self._writer = self._open()
            self._writer.write(b"%08x %s\n" % (zlib.crc32(text), text))
            self._writer.flush()
        except OSError as error:
            raise EvalError(
                f"cannot keep scores in {self.folder}: {error}; set AURORA_CACHE to a writable folder, or pass "
                "--no-cache"
            ) from error
        if self._scores is not None:
            self._scores.update(scores)

    def close(self) -> None:
        """Close the file of this process."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # what it could not write has been an error before
                writer.close()

    def _open(self) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "settings.json", self._settings + "\n")
        return (self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}{_SUFFIX}").open("xb")


def _read(file: Path) -> Iterator[tuple[str, Score]]:
    """Yield the scores of the intact lines of a file."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            continue
        yield from ((key, (value, greedy)) for key, (value, greedy) in json.loads(text).items())
