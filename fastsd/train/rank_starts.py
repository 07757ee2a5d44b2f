"""The start of ranks: a store whose keys no earlier start of the same torchrun has written.

torchrun keeps one store for its whole life.  After it has started ranks again, the addresses, NCCL ids and ends of those that
are gone still stand there, and a rank that is early would connect to them.  torchrun's number of restarts does not tell starts
apart, because each machine counts its own.  So rank 0 gathers the processes that are there, and gives their start a name:

    start RANK          the process of the rank, as a random number. One that another process overwrites is no longer wanted
    roll                a name for the start, and the processes that rank 0 has read. It writes another one when they change
    present NAME RANK   the rank has read its process on the roll with that name
    begins NAME         all ranks have; those that were started earlier cannot
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from fastsd.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

_PAUSE = 0.02  # seconds


def store_of_start(store: Store, rank: int, world: int, timeout: timedelta) -> Store:
    """Return a view of a store in which the ranks of one start, and no others, meet.

    Args:
        store: shared by the ranks, and by those that torchrun has started before.
        rank, world: number of this rank, and number of all ranks.
        timeout: how long to wait for the others.

    Raises:
        UserError: a rank has not come.
        RuntimeError: the store is gone, or another process has taken this rank's place.
    """
    from torch.distributed import PrefixStore

    process, roll, end = uuid.uuid4().hex, "", time.monotonic() + timeout.total_seconds()
    store.set(f"start {rank}", process)
    starts = [f"start {other}" for other in range(world)]
    while time.monotonic() < end and store.get(starts[rank]).decode() == process:
        if rank == 0 and store.check(starts):
            processes = " ".join(store.get(key).decode() for key in starts)
            if processes != roll.partition(" ")[2]:
                store.set("roll", f"{uuid.uuid4().hex} {processes}")
        if store.check(["roll"]) and (last := store.get("roll").decode()) != roll and process in last.split():
            roll = last
            store.set(f"present {roll.partition(' ')[0]} {rank}", "1")
        name = roll.partition(" ")[0]
        if roll and rank == 0 and store.check([f"present {name} {other}" for other in range(world)]):
            store.set(f"begins {name}", "1")
        if roll and store.check([f"begins {name}"]):
            return PrefixStore(name, store)
        time.sleep(_PAUSE)
    if time.monotonic() < end:
        raise RuntimeError(f"another process has become rank {rank}")
    raise UserError(
        "ranks-absent",
        f"rank {rank} has waited {timeout.total_seconds() / 60:.3g} minutes for {world} ranks to start; "
        "start torchrun on all machines, with the same --nnodes and --nproc-per-node",
    )
