"""Data sets of the Hub, loaded without waiting for a Hub that does not answer.

`datasets` asks the Hub before it looks into its cache, several times, and some of its requests have no time limit. So
the Hub is asked here first, within `eval.hub.ANSWER_SECONDS`; if it says nothing, `datasets` uses its cache alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants, get_session

from eval.errors import EvalError
from eval.hub import early_silence, silence_about

_LONGEST_SILENCE = 30.0
"""Seconds after which a Hub that has answered before, and then stops, is given up; for requests without a limit."""


@contextmanager
def bounded_downloads() -> Iterator[None]:
    """Within the block, `datasets.load_dataset`, as lm-eval calls it, does not wait for a Hub that does not answer.

    What it raises then for a data set of the Hub is an `EvalError`, unless the cache has the data set. A Hub that was
    silent once is not asked again.
    """
    load, session, answered = datasets.load_dataset, get_session(), set[str]()
    why = early_silence()

    def load_soon(path: str, *arguments: Any, **options: Any) -> Any:
        nonlocal why
        local = Path(path).is_dir() or options.get("data_files") is not None
        if local or datasets.config.HF_HUB_OFFLINE:
            return load(path, *arguments, **options)
        if path not in answered:
            why = why or silence_about(path)
        if not why:
            answered.add(path)
            return load(path, *arguments, **options)
        with _offline():
            try:
                return load(path, *arguments, **options)
            except Exception as error:  # loaders of data sets raise anything
                raise EvalError(f"the data set {path} is not in the Hugging Face cache, and {why}") from error

    limits, session.timeout = session.timeout, _LONGEST_SILENCE
    datasets.load_dataset = load_soon
    try:
        yield
    finally:
        datasets.load_dataset, session.timeout = load, limits


@contextmanager
def _offline() -> Iterator[None]:
    """Within the block, `datasets` and `huggingface_hub` use no network."""
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
