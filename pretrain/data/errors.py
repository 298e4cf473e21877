"""The error that every fault of the data raises."""

from pretrain.processes.errors import UserError


class DataError(UserError):
    """The data cannot be used as configured. The message names the file and the row, and says what to do."""
