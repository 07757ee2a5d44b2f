"""Exceptions with messages written for the user."""


class UserError(ValueError):
    """An error that the user must fix. The command line prints its message without a traceback and exits with 2.

    Any other exception is a bug in fastsd (exit 1).

    Attributes:
        code: name of the problem, such as "cache-disk-full". It stays the same when the message is reworded.
        message: the text that the user reads: place, field, value found, what to do. Same as `str(error)`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)  # both, so that a worker process can send the error back
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class Stopped(Exception):
    """Raised after a run has saved and stopped at the user's request. The command line exits with 130."""
