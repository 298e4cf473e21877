"""The one error that evaluation raises for its users."""


class EvalError(ValueError):
    """An evaluation cannot be done as asked; the message says what was got and what to do."""
