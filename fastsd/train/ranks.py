"""Data parallel training: the processes of one run, called ranks, one for each GPU.

    torchrun --nproc-per-node 4 -m fastsd train CONFIG

The config fixes the global batch.  Each of N ranks trains on 1/N of its images; the loader and the generator of random numbers
depend on sample positions only, so every N that divides the batch has the same samples, noise and timesteps.  The weights, the
optimizer state and the EMA are the same on all ranks.  They start from the same files and receive the same sums of gradients
(`gradient_sums.py`), so nothing else is sent:

    per step        the gradients, the loss, and four small messages between the hosts: whether a rank cannot read its batch,
                    whether memory has run out, what is due, and whether to stop
    rank 0          writes the run's folder: it logs, saves and exports
    other ranks     run the same code, but write and print nothing
    evaluation      each rank makes its share of the UNet calls of validation and samples, and rank 0 puts them together
    checkpoints     are those of one process, so a run can go on with another number of ranks

Decisions that a clock, a file or a signal brings about are made at the end of a step: rank 0's count (`decided`), or anyone's
(`any_rank`).  All others follow from numbers that are equal on all ranks.

When a rank ends with an error, it prints one sentence.  The others notice that its connections are closed, end without one, and
torchrun ends what is left (`rank_ends.py`).  A rank that hangs ends the run after `TIMEOUT`.  All ranks must know of an error
after which one goes on, because they would otherwise wait for messages that it does not send:

    memory runs out in a step       the rank still takes part in the sums, and all repeat the step with a smaller micro-batch
    in a capture                    nothing is sent in it; all repeat the step in the same way
    when a run is opened, or at     all end
      the start of a stage
    for sharded state that is       all allocate before one sends: the evaluation or the checkpoint is skipped
      gathered
    a capture fails                 all go on without graphs
    a batch cannot be read          all save a checkpoint and end
    validation, samples             all skip them

Without torchrun, or with one rank, nothing here imports torch.distributed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsd.config.stages import StageTable
from fastsd.errors import Stopped, UserError, out_of_memory
from fastsd.train.rank_ends import RankEnds

if TYPE_CHECKING:
    from torch.distributed import Work

# Longer than the others ever wait for rank 0, which verifies a checkpoint, or writes the first one.
TIMEOUT = timedelta(minutes=30)
# A step's first message of a GPU is older than the hosts' by the time of its backward.
_NCCL_MARGIN = timedelta(minutes=5)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankLost(RuntimeError):
    """Raised by a collective operation if another rank has ended, or does not answer."""


class RanksOutOfMemory(MemoryError):
    """Raised by all ranks together if memory has run out on one of them."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as this one sees them.

    Attributes:
        rank, world: number of this rank, and number of all ranks.
        local_rank, local_world: the same on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def main(self) -> bool:
        """True for the rank that owns the run's folder."""
        return self.rank == 0

    def decided(self, decisions: Sequence[bool]) -> list[bool]:
        """Return the decisions of rank 0."""
        if self.world == 1:
            return list(decisions)
        flags = torch.tensor([decision and self.main for decision in decisions], dtype=torch.int32)
        return [bool(flag) for flag in self._combined(flags, "MAX").tolist()]

    def any_rank(self, event: object) -> bool:
        """Return True if `event` is true on any rank."""
        return bool(event) if self.world == 1 else bool(self._combined(torch.tensor([bool(event)], dtype=torch.int32), "MAX"))

    def least(self, number: int) -> int:
        """Return the smallest of all ranks' numbers."""
        return number if self.world == 1 else int(self._combined(torch.tensor([number]), "MIN"))

    def most(self, number: int) -> int:
        """Return the largest of all ranks' numbers."""
        return -self.least(-number)

    def different(self, number: int) -> list[int]:
        """Return the ranks whose number is not that of most. Of two equally frequent numbers, that of the lower rank counts."""
        numbers = torch.zeros(self.world, dtype=torch.int64)
        numbers[self.rank] = number
        values = self._combined(numbers, "SUM").tolist() if self.world > 1 else [number]
        usual = max(values, key=values.count)
        return [rank for rank, value in enumerate(values) if value != usual]

    def problem(self, text: str | None) -> tuple[int, str] | None:
        """Return the first rank that has a problem, and its text. Return None if no rank has one."""
        if not self.any_rank(text):
            return None
        texts = enumerate(self.gathered((text or "").encode(errors="surrogateescape")))
        return next((rank, data.decode(errors="surrogateescape")) for rank, data in texts if data)

    def error(self, error: UserError | None) -> UserError | None:
        """Return the error of the first rank that has one, so that all can end with it."""
        problem = self.problem(error.packed if error else None)
        return UserError.unpacked(problem[1]) if problem else None

    def memory_is_enough(self, problem: str | None) -> None:
        """Raise RanksOutOfMemory on all ranks if memory has run out on one of them, whose `problem` says so."""
        if first := self.problem(problem):
            raise RanksOutOfMemory(f"rank {first[0]}: {first[1]}")

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Allocate memory on all ranks before they send anything.

        Raises:
            RanksOutOfMemory: memory has run out on a rank. All ranks raise it.
        """
        problem = None
        try:
            yield
        except Exception as error:
            problem = out_of_memory(error)
            if problem is None or self.world == 1:
                raise
        if self.world > 1:
            self.memory_is_enough(problem)

    @contextmanager
    def needing_memory(self, cause: str) -> Iterator[None]:
        """End with one sentence if memory runs out in the block. All ranks must know of it, so use `allocating` inside.

        Args:
            cause: as for `memory_error`.

        Raises:
            UserError: memory has run out.
        """
        try:
            yield
        except Exception as error:
            problem = out_of_memory(error)
            if problem is None:
                raise
            raise self.memory_error(cause, problem) from None

    def memory_error(self, cause: str, reason: str) -> UserError:
        """Return the error of training for which memory is not enough.

        Args:
            cause: such as "while weights were updated".
            reason: as PyTorch tells it.
        """
        return UserError(
            "out-of-memory",
            f"out of memory {cause} ({reason}); choose settings that {self.plan_command} reports as fitting, "
            "and run again to continue from the last checkpoint",
        )

    @property
    def plan_command(self) -> str:
        """The command that predicts the memory of these ranks, in backticks."""
        if self.world == 1:
            return "`fastsd plan CONFIG`"
        return f"`fastsd plan CONFIG --gpus {self.world} --machines {self.world // self.local_world}`"

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.any_rank(event=False)

    def text(self, text: str = "") -> str:
        """Return the text of rank 0."""
        return self.gathered(text.encode() if self.main else b"")[0].decode()

    def gathered(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks, in their order."""
        if self.world == 1:
            return [data]
        lengths = torch.zeros(self.world, dtype=torch.int64)
        self.finish([self.gather(lengths, torch.tensor([len(data)]))])
        size = max(int(lengths.max()), 1)
        piece = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
        received = torch.empty(self.world * size, dtype=torch.uint8)
        self.finish([self.gather(received, piece)])
        rows = received.view(self.world, size)
        return [rows[rank, :length].numpy().tobytes() for rank, length in enumerate(lengths.tolist())]

    def hear_hosts_first(self, device: torch.device) -> None:
        """Let messages of a GPU time out after those of the hosts.

        Both wait for a rank that hangs. The hosts' messages end the run with a sentence, NCCL's watchdog aborts the process.
        """
        if self.world > 1 and device.type == "cuda":
            from torch.distributed.distributed_c10d import _get_default_group

            _get_default_group()._get_backend(device)._set_default_timeout(TIMEOUT + _NCCL_MARGIN)

    def sum_(self, tensor: Tensor) -> Work:
        """Start to replace a tensor by its sum over all ranks."""
        return self._start("all_reduce", tensor)

    def exchange(self, received: Tensor, sent: Tensor) -> Work:
        """Start to send each rank its piece of a flat tensor. `received` gets this rank's piece from all, in their order."""
        return self._start("all_to_all_single", received, sent)

    def gather(self, received: Tensor, piece: Tensor) -> Work:
        """Start to send a piece to all ranks. `received` gets the pieces of all ranks, in their order."""
        import torch.distributed as dist

        # PyTorch 2.13 warns of the older name. Bytes, because gloo does not know all dtypes.
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        return self._start(name, received.view(torch.uint8), piece.view(torch.uint8))

    def scatter_sum(self, received: Tensor, sent: Tensor) -> Work:
        """Start to sum a flat tensor over all ranks. `received` gets this rank's piece of the sum."""
        import torch.distributed as dist

        name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        return self._start(name, received, sent)

    def finish(self, works: Sequence[Work]) -> None:
        """Let the current stream of a GPU, or this thread on a CPU, wait for what was started."""
        with self._others():
            for work in works:
                work.wait()

    def _start(self, operation: str, *tensors: Tensor) -> Work:
        import torch.distributed as dist

        with self._others():
            work: Work = getattr(dist, operation)(*tensors, async_op=True)
        return work

    def share(self, batch: int) -> int:
        """Return the number of images of a batch that one rank trains on."""
        return batch // self.world

    def _combined(self, values: Tensor, operation: str) -> Tensor:
        import torch.distributed as dist

        with self._others():
            dist.all_reduce(values, op=getattr(dist.ReduceOp, operation))
        return values

    @contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankLost(str(error)) from None


ALONE = Ranks()


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """Read the variables that torchrun sets for each process.

    Raises:
        UserError: WORLD_SIZE is not 1, but a variable is missing or no number.
    """
    world = environment.get("WORLD_SIZE", "1")
    if world == "1":
        return ALONE
    for name in _VARIABLES:
        value = environment.get(name, "")
        if not value or (name != "MASTER_ADDR" and not value.isdecimal()) or (name == "WORLD_SIZE" and value == "0"):
            raise UserError(
                "ranks-variable",
                f"the environment has WORLD_SIZE={world}, but {name} is {value!r}; start all ranks with "
                "`torchrun --nproc-per-node N -m fastsd train CONFIG`, or unset WORLD_SIZE",
            )
    return Ranks(*(int(environment[name]) for name in _VARIABLES[:4]))


def local_device(name: str, ranks: Ranks) -> str:
    """Return the config's `device` for a rank: each has the GPU of its number.

    Raises:
        UserError: the config chooses a GPU by its number, this machine has more ranks than GPUs, or PyTorch has no NCCL.
    """
    if ranks.world == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    import torch.distributed as dist

    if not dist.is_nccl_available():
        raise UserError(
            "ranks-no-nccl",
            f"{ranks.world} ranks on GPUs need NCCL, which PyTorch has not on this system; start one process without torchrun, "
            "or use Linux",
        )
    if ":" in name:
        raise UserError(
            "ranks-device", f'device is {name!r}, but each of {ranks.world} ranks uses a GPU of its own; use "auto" or "cuda"'
        )
    gpus = torch.cuda.device_count()
    if gpus and ranks.local_world > gpus:
        cards = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise UserError(
            "ranks-too-many",
            f"{ranks.local_world} ranks run on {platform.node()}, which has {cards}; start {gpus} with --nproc-per-node {gpus}",
        )
    return f"cuda:{ranks.local_rank}"


def check_stage(stage: StageTable, name: str, ranks: Ranks) -> None:
    """Raise UserError for a stage that several ranks cannot train."""
    if stage.batch % ranks.world:
        above = -(-stage.batch // ranks.world) * ranks.world
        sizes = f"{above - ranks.world} or {above}" if stage.batch > ranks.world else str(above)
        counts = ", ".join(str(n) for n in range(1, stage.batch + 1) if stage.batch % n == 0)
        raise UserError(
            "ranks-batch",
            f"stage {name!r}: batch is {stage.batch}, which {ranks.world} ranks do not divide; set batch to {sizes}, or start "
            f"one of these numbers of ranks: {counts}",
        )
    if stage.fused_backward and ranks.world > 1:
        raise UserError(
            "ranks-fused",
            f"stage {name!r}: fused_backward is true, which updates weights before gradients of {ranks.world} ranks are "
            "summed; set fused_backward = false",
        )


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Connect the ranks that torchrun has started, and let them end together.

    Raises:
        UserError: an error that this rank shall print. A rank whose error another one prints exits with 2.
    """
    ranks = ranks_of(os.environ)
    if ranks.world == 1:
        yield ranks
        return
    import torch.distributed as dist

    from fastsd.train.rank_starts import store_of_start

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        shared, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world, timeout=TIMEOUT))
        store = store_of_start(shared, ranks.rank, ranks.world, TIMEOUT)
        dist.init_process_group(backend, store=store, timeout=TIMEOUT, rank=ranks.rank, world_size=ranks.world)
    except RuntimeError as error:  # PyTorch's errors of stores and connections
        raise UserError(
            "ranks-not-joined",
            f"rank {ranks.rank} on {platform.node()} cannot join the other ranks ({str(error).splitlines()[0]}); see what they "
            "print, and start all ranks again",
        ) from None
    ends = RankEnds(store, ranks.rank, ranks.world)
    try:
        yield ranks
    except Stopped:
        if not ends.stops():
            raise ends.after_loss("", TIMEOUT.total_seconds() / 60) from None
        if not ranks.main:
            raise SystemExit(130) from None
        raise
    except RankLost as error:
        raise ends.after_loss(str(error), TIMEOUT.total_seconds() / 60) from None
    except UserError as error:
        if not ends.tells(error.code):
            raise SystemExit(2) from None
        raise
    except BaseException:  # it prints a traceback
        ends.tells()
        raise
    dist.destroy_process_group()
