"""The error that evaluation raises for bad input."""

from pretrain.processes.errors import UserError
from pretrain.processes.redaction import redact


class EvalError(UserError):
    """The evaluation is not possible as requested; the message says what was found and what to do."""


class TeamError(EvalError):
    """An `EvalError` that every process of a team raises, so that they can go on together with something else."""


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error of a library, without passwords and signed queries of URLs.

    A line that ends with a colon announces the next one, which is added.
    """
    lines = [line.strip() for line in redact(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {text or 'no message'}"
