"""The error that evaluation raises for bad input."""

from pretrain.processes.errors import UserError
from pretrain.processes.redaction import redact


class EvalError(UserError):
    """The evaluation is not possible as requested; the message says what was found and what to do."""


class TeamError(EvalError):
    """An `EvalError` that every process of a team raises, so that they can go on together with something else."""


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error of a library, without passwords and signed queries of URLs."""
    lines = redact(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
