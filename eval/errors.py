"""The one error that evaluation raises for its users."""

from pretrain.processes.errors import UserError


class EvalError(UserError):
    """An evaluation cannot be done as asked; the message says what was got and what to do."""
