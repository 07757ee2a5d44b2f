"""Train many tiny steps in one process, and measure its memory, open files and threads. By hand:

    python tests/faults/soak.py --steps 100000

A checkpoint is saved every 5,000 steps and a row logged every 100. After the warm-up, nothing may grow by more than 1 %
(see `growth`).
`PYTHONPATH` must have the checkout, kernels, tests/support and tests/faults.
"""

import argparse
import json
import sys
import time

import psutil
from jobs import UNET, workshop

from fastsd.data.loader import _WORKERS
from fastsd.data.rows import _READERS

POOLS = 1 + _WORKERS + _READERS  # the main thread, and those that load batches and read shards
COLUMNS = ("step", "memory_mb", "files", "threads")
STAGE = UNET.replace("batch = 4", "batch = 1").replace("checkpoint_every = 2", "checkpoint_every = 5000")
STAGE = STAGE.replace('["unet"]', '["unet.out"]')  # the shortest backward


def last_step(log) -> int:
    lines = log.read_bytes().splitlines()[-2:] if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"}")), default=0)


def soak(steps: int, warm_up: int) -> list[dict[str, float]]:
    """Return a measurement for each thousand steps after the warm-up."""
    rows: list[dict[str, float]] = []
    with workshop() as shop:
        shop.add_job("soak", STAGE.replace("until = 3", f"until = {steps}"), ("log.every=100",))

        def watch(pid: int) -> None:
            process, measured = psutil.Process(pid), 0
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.2)
                step = last_step(shop.run / "log.jsonl")
                if step // 1000 > measured // 1000 and step >= warm_up:
                    measured = step
                    values = (step, process.memory_info().rss / 1e6, process.num_fds(), process.num_threads())
                    rows.append(dict(zip(COLUMNS, values, strict=True)))
                    print(*(f"{value:10.1f}" for value in values), flush=True)

        shop.restore("soak")
        outcome = shop.start("soak", during=watch)
        assert outcome.code == 0, outcome.text
    return rows


def growth(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return how much of each quantity was added between the first and the last tenth of the rows, as a share.

    The smallest values are compared: while a checkpoint is written, a run has another thread and open file, and a leak stays.
    Threads up to `POOLS` count as one, because a pool starts its next thread only when the others are busy.
    """
    count = max(len(rows) // 10, 1)
    first, last = ({name: min(row[name] for row in tenth) for name in COLUMNS[1:]} for tenth in (rows[:count], rows[-count:]))
    for values in (first, last):
        values["threads"] = max(values["threads"], POOLS)
    return {name: last[name] / first[name] - 1 for name in first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--warm-up", type=int, default=5000)
    options = parser.parse_args()
    print(*(f"{name:>10}" for name in COLUMNS), flush=True)
    rows = soak(options.steps, options.warm_up)
    shares = growth(rows)
    print("growth since the warm-up:", ", ".join(f"{name} {value:+.2%}" for name, value in shares.items()))
    sys.exit(any(value > 0.01 for value in shares.values()))


if __name__ == "__main__":
    main()
