"""Ranks as torchrun starts them: processes with its environment, and a store that outlives them."""

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

from commandline import call, command_line, processes


def _in_rank(environment: dict[str, str], function: str, arguments: list[object]) -> None:
    import torch

    torch.set_num_threads(1)  # as torchrun does
    os.environ |= environment
    {"call": call, "command_line": command_line}[function](*arguments)


@contextmanager
def store_of_ranks(world: int) -> Iterator[dict[str, str]]:
    """Serve a store, as torchrun's agent does. Yield the environment that `world` ranks share."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    yield agent | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    del store


def start_ranks(shared: dict[str, str], function: str, *arguments: object) -> list[BaseProcess]:
    """Start `call(*arguments)` or `command_line(*arguments)` once for each rank."""
    ranks = []
    for rank in range(int(shared["WORLD_SIZE"])):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(processes().Process(target=_in_rank, args=(environment, function, list(arguments))))
        ranks[-1].start()
    return ranks


def _torchrun(words: list[str], output_paths: list[str]) -> None:
    from forked_programs import forked_programs

    for stream, path in enumerate(output_paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = ["torchrun", *words]
    with forked_programs():
        runpy.run_module("torch.distributed.run", run_name="__main__")


def start_torchrun(words: list[str], *output_paths: Path) -> BaseProcess:
    """Start `torchrun WORDS`, with stdout and stderr appended to files. It and its ranks are forks, without slow imports."""
    process = processes().Process(target=_torchrun, args=(words, list(map(str, output_paths))))
    process.start()
    return process


def ended(ranks: list[BaseProcess], seconds: float = 600) -> list[int | None]:
    """Wait until all ranks have ended, and return their exit codes."""
    for process in ranks:
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in ranks]


def train_ranks(world: int, output: Path, *words: str) -> list[int | None]:
    """Run `fastsd train ...` on `world` ranks, and append what they print to a file. Return their exit codes."""
    with store_of_ranks(world) as shared:
        return ended(start_ranks(shared, "command_line", ["train", *words], output))
