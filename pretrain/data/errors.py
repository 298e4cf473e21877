"""The error for all faults of the data."""

from pretrain.processes.errors import UserError


class DataError(UserError):
    """The data cannot be used as configured. The message names the file, the row where there is one, and the remedy."""
