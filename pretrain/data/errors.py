"""The errors for all faults of the data."""

from pretrain.processes.errors import UserError
from pretrain.processes.exit_codes import UNAVAILABLE


class DataError(UserError):
    """The data cannot be used as configured. The message names the file, the row where there is one, and the remedy."""


class DataUnavailableError(DataError):
    """A server of data did not answer for longer than `data.retry_minutes`; a later start may succeed."""

    exit_code = UNAVAILABLE
