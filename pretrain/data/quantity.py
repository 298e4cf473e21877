"""What is known of the text of a source: numbers that are counted, or estimated with a standard error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its standard error."""

    value: float
    error: float = 0.0
    """0: counted, not estimated."""

    @property
    def lower(self) -> float:
        """Two standard errors below the value, and at least 0."""
        return max(0.0, self.value - 2 * self.error)

    @property
    def upper(self) -> float:
        """Two standard errors above the value."""
        return self.value + 2 * self.error

    def __str__(self) -> str:
        """`1,234`, or `about 1,230,000 +- 4.5 %` with one standard error."""
        if not self.error:
            return f"{self.value:,.0f}"
        return f"about {rounded(self.value)} +- {100 * self.error / max(self.value, 1):.1f} %"


@dataclass(frozen=True, slots=True)
class SourceEstimate:
    """One source of the config."""

    path: str
    files: int
    bytes: int
    """Of the files."""
    licences: tuple[str, ...]
    how: tuple[str, ...]
    """How each kind of file was sampled."""
    documents: Quantity
    """Rows with text, of both splits."""
    text_bytes: Quantity
    """UTF-8 bytes of their texts."""
    tokens: Quantity
    """Including a separator for each document; of both splits."""
    bytes_per_token: float
    """UTF-8 bytes per token, without separators."""
    characters_per_token: float
    sampled_documents: int
    empty: float
    """Share of the rows of the sample that hold no text but white space."""
    repeated: float
    """Share of the other rows of the sample whose text occurred in the sample before."""
    examples: tuple[str, ...]
    problems: tuple[str, ...]
    """Parts of the sample that could not be read."""


def rounded(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,g}" if value < 100 else f"{float(f'{value:.3g}'):,.0f}"


def spread(residuals: Sequence[float]) -> float:
    """Return the standard error of a sum of independent parts with these residuals; at least two."""
    count = len(residuals)
    return math.sqrt(count / (count - 1) * sum(residual**2 for residual in residuals))
