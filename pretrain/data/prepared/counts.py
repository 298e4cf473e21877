"""How much a source of prepared data holds: its index says so, or else its tokens are counted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.data.cache import CachedFile
from pretrain.data.prepared import speedrun
from pretrain.data.prepared.reading import TokenBytes, index_of, read_runs
from pretrain.data.units import Unit

_SAMPLED_UNITS = 4


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What a source of prepared data holds, in both splits."""

    documents: float
    text_bytes: float
    tokens: int
    """Including separators."""
    characters: float | None
    """None: not recorded."""
    sampled: int = 0
    """Tokens from which documents and text_bytes were estimated; 0 if they are recorded."""
    documents_error: float = 0.0
    """Standard error, from the spread between the sampled units."""
    text_bytes_error: float = 0.0


def token_counts(units: Sequence[Unit], token_bytes: TokenBytes) -> TokenCounts:
    """Count the documents and the tokens of a source.

    Args:
        units: all read units of the source, none of them divided.
        token_bytes: see `read_runs`.

    Raises:
        DataError: the data is missing or damaged.

    """
    if not units[0].file.path.endswith(speedrun.SUFFIX):
        index = index_of(units[0].file)
        return TokenCounts(index.documents, index.text_bytes, index.tokens, index.characters)
    tokens = sum(unit.rows or 0 for unit in units)
    # Through a cache, each further file would have to be fetched as a whole.
    near = [unit for unit in units if unit.file == units[0].file] if isinstance(units[0].file, CachedFile) else units
    chosen = [near[place] for place in np.unique(np.linspace(0, len(near) - 1, _SAMPLED_UNITS).astype(int))]
    found = []
    for unit in chosen:
        runs = list(read_runs(unit, 0, 0.0, "train", token_bytes))
        found.append((unit.rows or 0, sum(len(run.ends) for run in runs), sum(run.sizes[-1] for run in runs)))
    sizes, documents, text_bytes = np.array(found, float).T
    numbers = [_scaled(sizes, counts, tokens) for counts in (documents, text_bytes)]
    return TokenCounts(numbers[0][0], numbers[1][0], tokens, None, int(sizes.sum()), numbers[0][1], numbers[1][1])


def _scaled(sizes: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], tokens: int) -> tuple[float, float]:
    """Scale the counts of some units to all tokens; return the estimate and its standard error.

    A ratio estimated from clusters, as in `pretrain.data.estimate`. Of a single unit no spread is known, so the error
    is as large as the estimate.
    """
    ratio = counts.sum() / max(1.0, sizes.sum())
    value = float(ratio * tokens)
    left = 1 - sizes.sum() / max(1, tokens)
    if left <= 0 or len(sizes) == 1:
        return value, value if left > 0 else 0.0
    spread = ((counts - ratio * sizes) ** 2).sum() / (len(sizes) - 1) / len(sizes)
    return value, float(tokens / sizes.mean() * np.sqrt(left * spread))
