"""Kill one of two ranks at random points of a run, and start it again: on two ranks, and from a copy on one. By hand:

    python tests/faults/rank_kills.py --points 20 [--json FILE]      a minute for each point on one core
    python tests/faults/rank_kills.py --slurm                        the page's Slurm job, with stand-ins of srun and scontrol

On two ranks, all files must be those of a run that nothing disturbed (`lab.results`).  On one, the samples, timesteps and noise
must be the same, and the losses within 1e-5.
`PYTHONPATH` must have the checkout, kernels, tests/support and tests/faults.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from environment import ROOT
from lab import difference, results
from ranks import ended, start_ranks, store_of_ranks, train_ranks
from runs import rows_of
from tiny import ONE_LEVEL, job, make_tiny_model, write_images

STEPS = 8
STAGE = f"""
[[stage]]
name = "one"
train = ["unet"]
until = {STEPS}
batch = 4
micro_batch = 2
optimizer = "dlion"
precision = "bf16"
ema = 0.9
checkpoint_every = 3
sample_every = 4
"""
SETTINGS = ("validate.held_out=3", "validate.every=3", "export.single_file=false", 'sample.prompts=["red circle", "star"]')
INPUTS = ("step", "images", "order", "timesteps", "noise")
TOLERANCE = 1e-5


class RankKills:
    """A run on two ranks that nothing disturbed, and copies of it that are killed.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path, keys: tuple[str, ...] = ()) -> None:
        from fastsd.commands.cache import cache
        from fastsd.config.schema import load_config
        from fastsd.model.unet import UNetConfig

        self.folder, self.reference, self.run = folder, folder / "reference", folder / "run"
        make_tiny_model(folder / "base", UNetConfig(**ONE_LEVEL))
        write_images(folder / "images", 21)
        self.config, self.keys = job(folder, folder / "base", folder / "images", STAGE), (*SETTINGS, *keys)
        cache(load_config(self.config, list(self.keys)))
        self._train(2)
        self.run.rename(self.reference)
        self.results = results(self.reference)

    def _train(self, world: int) -> None:
        output = self.folder / "output"
        output.write_text("")
        codes = train_ranks(world, output, str(self.config), f"run={self.run}", *self.keys)
        assert codes == [0] * world, output.read_text()

    def kill(self, rng: random.Random) -> tuple[int, int]:
        """Start the run and kill a rank. Return its number, and the number of rows logged by then."""
        shutil.rmtree(self.run, ignore_errors=True)
        rank, step = rng.randrange(2), rng.randrange(STEPS)
        log, output = self.run / "log.jsonl", self.folder / "killed"
        output.write_text("")
        with store_of_ranks(2) as shared:
            ranks = start_ranks(shared, "command_line", ["train", str(self.config), f"run={self.run}", *self.keys], output)
            while ranks[rank].is_alive() and rows_in(log) < step:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
            ranks[rank].kill()
            ended(ranks[rank : rank + 1])
            ranks[1 - rank].join(5)
            ranks[1 - rank].terminate()  # as torchrun does, which kills after 30 seconds: a rank may wait for the connection
            codes = ended(ranks, 30)
        text = output.read_text()
        assert codes[1 - rank] in (0, 2, 130, None) and "Traceback" not in text and text.count("fastsd: ") <= 1, text
        return rank, rows_in(log)

    def trials(self, points: int, rng: random.Random) -> Iterator[dict[str, object]]:
        """Yield the result of each point. Its "problem" is "" if nothing was lost."""
        for _ in range(points):
            rank, rows = self.kill(rng)
            copy = self.folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.run, copy, symlinks=True)
            self._train(2)
            problem = difference(self.results, results(self.run))
            shutil.rmtree(self.run)
            copy.rename(self.run)
            self._train(1)
            inputs, losses = zip(*(columns(folder) for folder in (self.reference, self.run)), strict=True)
            worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
            if inputs[0] != inputs[1] or not worst <= TOLERANCE:
                problem = problem or f"on one rank, losses differ by {worst:.2g}, or inputs do"
            yield {"killed_rank": rank, "rows": rows, "loss_difference_on_one_rank": worst, "problem": problem}


def rows_in(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def columns(run: Path) -> tuple[list[list[object]], list[float]]:
    """Return what the steps of a run have computed with, and their losses."""
    rows = rows_of(run)
    return [[row[key] for key in INPUTS] for row in rows], [
        row["loss"] if row["loss"] is not None else math.nan for row in rows
    ]


STAND_INS = {
    "scontrol": "#!/bin/bash\necho localhost\n",
    "srun": '#!/bin/bash\nfor ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & done\n'
    'while ((node--)); do wait -n || code=$?; done\nexit "${code:-0}"\n',
}


def slurm(folder: Path) -> str:
    """Run the page's Slurm job on two stand-ins of nodes with two ranks each. Return what it prints."""
    kills = RankKills(folder, ("stage.batch=4", "stage.micro_batch=1"))
    for name, text in STAND_INS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (folder / "torchrun").chmod(0o755)
    page = (ROOT / "docs/several-gpus.md").read_text()
    (match,) = re.findall(r"^ {4}#!/bin/bash\n(?: {4}.*\n)+", page, re.MULTILINE)
    words = " ".join([str(kills.config), f"run={folder / 'slurm'}", *(f"'{key}'" for key in kills.keys)])
    script = re.sub("^ {4}", "", match, flags=re.MULTILINE).replace("configs/xlsd.toml", words)
    variables = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment = os.environ | variables | {"PATH": f"{folder}:{os.environ['PATH']}"}
    process = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, process.stdout + process.stderr
    inputs, losses = zip(*(columns(run) for run in (kills.reference, folder / "slurm")), strict=True)
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert inputs[0] == inputs[1] and worst <= TOLERANCE, worst
    return f"{process.stdout}\nsame samples as on two ranks; losses within {worst:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--slurm", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.slurm:
            print(slurm(Path(folder)))
            return
        trials = []
        for trial in RankKills(Path(folder)).trials(options.points, random.Random(options.seed)):
            trials.append(trial)
            print(json.dumps(trial), flush=True)
    if options.json:
        import torch

        from fastsd.bench.counters import stamp

        table = {"stamp": stamp(torch.device("cpu")), "steps": STEPS, "seed": options.seed, "trials": trials}
        options.json.write_text(json.dumps(table, indent=2) + "\n")
    sys.exit(any(trial["problem"] for trial in trials))


if __name__ == "__main__":
    main()
