"""The error that every fault of the data raises."""


class DataError(ValueError):
    """The data cannot be used as configured. The message names the file and the row, and says what to do."""
