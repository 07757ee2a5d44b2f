"""Exceptions with messages written for the user."""


class UserError(ValueError):
    """An error that the user must fix. Its text is the whole message: place, field, value found, what to do.

    The command line prints it without a traceback and exits with 2; any other exception is a bug in fastsd (exit 1).
    """


class Stopped(Exception):
    """Raised after a run has saved and stopped at the user's request. The command line exits with 130."""
