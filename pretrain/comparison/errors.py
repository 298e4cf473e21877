"""The error of the comparison page."""

from pretrain.processes.errors import UserError


class ComparisonError(UserError):
    """The page cannot be made from these files; the message has one line per problem."""
