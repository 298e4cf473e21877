"""The error that evaluation raises for bad input."""

from pretrain.processes.errors import UserError


class EvalError(UserError):
    """The evaluation is not possible as requested; the message says what was found and what to do."""


class TeamError(EvalError):
    """An `EvalError` that every process of a team raises, so that they can go on together with something else."""
