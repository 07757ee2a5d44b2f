"""The end of ranks: what they tell each other through torchrun's store, so that the user reads one reason.

    process RANK    its id and its host, from the start on
    left RANK       the rank has an error, was stopped by a signal, or has noticed that another one is lost
    told            a rank has told the user why it ends
    error CODE      number of ranks with this error, of which the first one tells it
    stopped         a signal has stopped a rank

A rank that is killed tells nothing.  The others notice that its connections are closed, and those on the same machine that its
process is gone.  A rank that hangs leaves its connections open, so the others stop waiting after a while.
"""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from fastsd.errors import Stopped, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

_GRACE = 5.0  # seconds in which the other ranks can tell why they end


class RankEnds:
    """The ends of a run's ranks, as one of them sees and tells them.

    Args:
        store: shared by the ranks. It may vanish together with the machine that serves it.
        rank, world: number of this rank, and number of all ranks.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store, self._rank, self._others = store, rank, [other for other in range(world) if other != rank]
        store.set(f"process {rank}", f"{os.getpid()} {platform.node()}")

    def tells(self, code: str = "") -> bool:
        """Record that this rank ends with an error. Return True if it shall tell the user: no other has had the same one."""
        with suppress(RuntimeError):
            self._set("told")
            self._set(f"left {self._rank}")
            return not code or self._store.add(f"error {code}", 1) == 1
        return True

    def stops(self) -> bool:
        """Record that a signal has stopped this rank. Return False if torchrun sent it because another rank is lost."""
        if any(not self._has(f"left {other}") for other in self._gone()):
            return False
        self._set("stopped")
        self._set(f"left {self._rank}")
        return True

    def after_loss(self, reason: str, minutes: float) -> BaseException:
        """Return the exception that ends this rank after another one is lost: an error to tell the user, or a quiet exit.

        Args:
            reason: message of the collective operation that has failed.
            minutes: the time after which it fails if a rank hangs.
        """
        self._set(f"left {self._rank}")
        end, gone, silent = time.monotonic() + _GRACE, set[int](), set(self._others)
        while silent - gone and time.monotonic() < end:
            with suppress(KeyboardInterrupt):  # torchrun ends this rank, because it has noticed the other's end
                gone = self._gone()
                silent = {other for other in self._others if not self._has(f"left {other}")}
                if self._has("told"):
                    return SystemExit(2)
                if self._has("stopped"):
                    return Stopped("a signal has stopped a rank") if self._rank == 0 else SystemExit(130)
                time.sleep(0.1)
        if "imed out" in reason and not silent & gone:
            problem = f"{self._names(silent)} has not answered for {minutes:.3g} minutes"
            error = UserError("rank-hangs", f"{problem}; end its process if it is still there, and {_advice()}")
        else:
            problem = f"{self._names(silent & gone)} has ended without a message: it was killed, or main memory ran out"
            error = UserError("rank-lost", f"{problem}; {_advice()}")
        return error if self.tells(error.code) else SystemExit(2)

    def _gone(self) -> set[int]:
        """Return the ranks on this machine whose processes have ended."""
        gone = set()
        for other in self._others:
            with suppress(RuntimeError):
                pid, _, host = self._store.get(f"process {other}").decode().partition(" ")
                if host == platform.node() and not _is_running(int(pid)):
                    gone.add(other)
        return gone

    def _names(self, ranks: set[int]) -> str:
        """Return "rank 1 (process 123 on node1)", or what is known without that."""
        names = []
        for rank in sorted(ranks):
            with suppress(RuntimeError):
                pid, _, host = self._store.get(f"process {rank}").decode().partition(" ")
                names.append(f"rank {rank} (process {pid} on {host})")
        return " or ".join(names) or "a rank on another machine"

    def _set(self, key: str) -> None:
        with suppress(RuntimeError):
            self._store.set(key, "1")

    def _has(self, key: str) -> bool:
        with suppress(RuntimeError):
            return bool(self._store.check([key]))
        return False


def _is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _advice() -> str:
    """Return what happens next, or what the user can do."""
    restarts, limit = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if restarts.isdecimal() and limit.isdecimal() and int(restarts) < int(limit):
        return "torchrun starts all ranks again from the last checkpoint"
    return "run the same command again to resume from the last checkpoint"
