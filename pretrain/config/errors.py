"""The error of a config that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.processes.errors import UserError


class ConfigError(UserError):
    """A config that cannot be used, with every problem found, one message each.

    Attributes:
        problems: messages of the form ``section.key: what is wrong``.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))
