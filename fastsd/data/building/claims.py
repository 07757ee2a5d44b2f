"""Claims of processes of one machine on the rows that they encode."""

from __future__ import annotations

import sys
from pathlib import Path

from fastsd.data import cache
from fastsd.data.building.store import disk_errors, lock_errors


class Claims:
    """Claims on rows that this process encodes. Each is a lock on a byte of a file that is never written.

    The number of the byte is the index of the row among the rows of all shards. The locks belong to the process. When any
    handle of the file is closed, all of them are released, so use one `Claims` per process.
    """

    def __init__(self, folder: Path):
        with disk_errors(folder):
            self._file = (folder / "claims.lock").open("a+b")

    def take(self, shard: int, first: int, count: int) -> bool:
        """Claim rows [first, first + count) of a shard. Return False if another process has claimed one of them.

        Raises:
            UserError: the file system has no locks.
        """
        if sys.platform == "win32":  # the folder's lock already excludes other processes
            return True
        import fcntl

        with lock_errors(self._file) as conflict:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, count, shard * cache.SHARD_ROWS + first)
        return not conflict

    def release(self, shard: int, first: int, count: int) -> None:
        if sys.platform != "win32":
            import fcntl

            fcntl.lockf(self._file, fcntl.LOCK_UN, count, shard * cache.SHARD_ROWS + first)

    def close(self) -> None:
        self._file.close()
