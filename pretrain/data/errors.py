"""The errors for all faults of the data."""

from pretrain.processes.errors import UserError
from pretrain.processes.exit_codes import STOPPED, UNAVAILABLE


class DataError(UserError):
    """The data cannot be used as configured. The message names the file, the row where there is one, and the remedy."""


class DamagedFileError(DataError):
    """A file of a source is damaged, beyond what `data.max_bad_rows` allows. Can be pickled.

    Attributes:
        path: the file, which may be repaired before the run is resumed.

    """

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[type["DamagedFileError"], tuple[str, str]]:
        return type(self), (str(self), self.path)


class BadRowsError(DamagedFileError):
    """A file has more bad rows than `data.max_bad_rows` allows."""


class DataUnavailableError(DataError):
    """A data server did not answer for longer than `data.retry_minutes`; a later start may succeed."""

    exit_code = UNAVAILABLE


class ReadingStoppedError(DataUnavailableError):
    """A data server did not answer, and a stop was requested before `data.retry_minutes` had passed."""

    exit_code = STOPPED
