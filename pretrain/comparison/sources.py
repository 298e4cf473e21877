"""The numbered list of sources at the end of the page."""

from __future__ import annotations

from pretrain.comparison.document import Reference
from pretrain.comparison.facts import Facts


class Sources:
    """Numbers the sources in the order in which the page first cites them.

    Args:
        facts: the file that describes them.
    """

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._numbers: dict[str, int] = {}

    def cite(self, *names: str) -> tuple[int, ...]:
        """Return the numbers of some sources, each once and in ascending order."""
        return tuple(sorted({self._numbers.setdefault(name, len(self._numbers) + 1) for name in names}))

    def listed(self) -> list[Reference]:
        """Return the sources cited so far."""
        found = [self._facts.sources[name] for name in self._numbers]
        return [Reference(source.text, source.url, source.read, source.how) for source in found]
