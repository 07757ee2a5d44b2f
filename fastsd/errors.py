"""Exceptions with messages written for the user, and the recognition of errors that mean the memory ran out."""

import errno
import re
from typing import Any, Self


class UserError(ValueError):
    """An error that the user must fix. The command line prints its message without a traceback and exits with 2.

    Any other exception is a bug in fastsd (exit 1).

    Attributes:
        code: name of the problem, such as "cache-disk-full". It stays the same when the message is reworded.
        message: the text that the user reads: place, field, value found, what to do. Same as `str(error)`.
        table: the settings as they were read, if some of them are invalid; otherwise None.
    """

    table: dict[str, Any] | None = None

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)  # both, so that a worker process can send the error back
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message

    @property
    def packed(self) -> str:
        """The error as one text, to send it to another process."""
        return f"{self.code}\0{self.message}"

    @classmethod
    def unpacked(cls, text: str) -> Self:
        """Restore an error from its text."""
        return cls(*text.split("\0", 1))


# The ways in which PyTorch and its libraries report that memory ran out, besides torch.OutOfMemoryError. cuDNN swallows the
# failed allocation of a workspace and then finds no engine. cuBLAS cannot create its handle, or cannot allocate.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|unable to find an engine|unable to find a valid cuDNN algorithm|CUDNN_STATUS_\w*ALLOC|CUBLAS_STATUS_ALLOC"
    r"|cublasCreate|DefaultCPUAllocator: (not enough|can't allocate) memory",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> str | None:
    """Return the first line of an error that means that the memory of a device ran out. Return None for any other error.

    An error that was raised while another one was handled counts too: the end of a capture that ran out of memory fails itself.
    """
    cause: BaseException | None = None if isinstance(error, UserError) else error
    while cause is not None:
        text = str(cause) or type(cause).__name__
        named = isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError"
        if named or (isinstance(cause, RuntimeError) and _OUT_OF_MEMORY.search(text)):
            return text.splitlines()[0]
        cause = cause.__cause__ or cause.__context__
    return None


_DISK_ADVICE = {
    errno.ENOSPC: "free space", errno.EDQUOT: "free space", errno.EIO: "check the disk", errno.EROFS: "make it writable",
    errno.EACCES: "give yourself permission", errno.EPERM: "give yourself permission", errno.ENOLCK: "use a disk with locks",
}  # fmt: skip


def disk_advice(error: OSError) -> str | None:
    """Return what to do about a disk that fails, or None for any other error."""
    return _DISK_ADVICE.get(error.errno or 0)


class Stopped(Exception):
    """Raised after a run has saved and stopped at the user's request. The command line exits with 130."""
