"""The held-out texts that ``aurora eval --bits-per-byte`` names."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.texts import HeldOutText
    from pretrain.config import Config
    from pretrain.data import Catalog

VALIDATION = "validation"
_BYTES_PER_TOKEN = 5  # of English text, roughly: turns validation.max_tokens into bytes of text
_BATCH_BYTES = 4 << 20


def held_out_texts(wanted: Sequence[str], run: Path | None) -> list[HeldOutText]:
    """Read the texts.

    Args:
        wanted: what `eval.texts.read_texts` takes, or `validation` for the validation split of a run.
        run: the run or checkpoint that is evaluated; None for another model.

    Raises:
        EvalError: a text cannot be read, or there is no run to have a validation split.
        DataError: the sources of the run cannot be read.
    """
    if not wanted:
        return []
    from eval.errors import EvalError
    from eval.texts import read_texts

    ours = VALIDATION in wanted
    if ours and run is None:
        raise EvalError(
            f"--bits-per-byte {VALIDATION} is the validation split of a run, and the model is not one; name a file"
        )
    texts = read_texts([word for word in wanted if word != VALIDATION])
    if run is not None and ours:
        texts.append(_validation_split(run))
    return texts


def _validation_split(run: Path) -> HeldOutText:
    """Documents of the run's validation split: up to about validation.max_tokens, from files in random order.

    Of remote sources, about validation.max_read_mib of text are read, as in training.
    """
    from eval.texts import held_out_text
    from pretrain.config import parse_stored_config
    from pretrain.data import make_catalog
    from pretrain.data.catalog import require_text
    from pretrain.export.run import open_checkpoint
    from pretrain.run.data_lock import lock_of_check
    from pretrain.run.folder import RunFolder

    reader = open_checkpoint(run)
    config = parse_stored_config(reader.index["config"])
    locked = lock_of_check(config.data, RunFolder(reader.folder.parents[1]), online=True)
    catalog = make_catalog(config.data, locked)
    require_text(catalog)
    return held_out_text(VALIDATION, list(_documents(config, catalog)), f"validation split of {config.run.name}")


def _documents(config: Config, catalog: Catalog) -> Iterator[str]:
    from pretrain.data.formats import read_unit
    from pretrain.data.sampling import undivided_units
    from pretrain.data.split import is_validation
    from pretrain.data.validation_sample import is_sampled

    units = [unit for of_source in undivided_units(config.data, catalog) for unit in of_source]
    random.Random(0).shuffle(units)
    wanted = _BYTES_PER_TOKEN * config.validation.max_tokens
    readable = config.validation.max_read_mib << 20 if is_sampled(catalog) else math.inf
    for unit in units:
        for _, text in read_unit(unit, 0, _BATCH_BYTES):
            if not isinstance(text, str):  # a bad row
                continue
            encoded = text.encode()
            readable -= len(encoded)
            if is_validation(encoded, config.data.validation_fraction):
                yield text
                wanted -= len(encoded)
            if wanted <= 0 or readable <= 0:
                return
