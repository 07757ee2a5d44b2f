"""The exceptions a person is meant to read."""


class UserError(ValueError):
    """Something the user must change. Its text is the whole message: place, field, what was found, what to do.

    The command line prints it without a traceback and exits with 2; any other exception is our fault (exit 1).
    """


class Stopped(Exception):
    """The user asked a run to stop, and it has saved and stopped. The command line exits with 130."""
