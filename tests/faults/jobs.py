"""The commands that are disturbed: ten small runs that together use whatever a run can write, and six other commands."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import Fault, Lab, Outcome, difference, results
from power_loss import Call, read_trace
from tiny import ONE_LEVEL, job, make_tiny_model, write_images

from fastsd.storage import TEMPORARY

UNET = '[[stage]]\nname = "unet"\ntrain = ["unet"]\nuntil = 3\nbatch = 4\noptimizer = "lion"\nlr = 1e-3\ncheckpoint_every = 2\n'
LONGER = UNET.replace("until = 3", "until = 5")  # a kill at 70 % leaves two checkpoints, and steps in which d has grown
DLION = LONGER.replace('optimizer = "lion"\nlr = 1e-3', 'optimizer = "dlion"\nd0 = 1e-4')
CARRIED = DLION.replace('name = "unet"', 'name = "more"\nstate = "carry"')
TEXT = LONGER.replace("unet", "text").replace('train = ["text"]', 'train = ["text_encoder"]\nmax_tags = 2')
AVERAGES = "ema = { sigma_rel = [0.1, 0.2] }\nema_snapshots = 2\n"
VALIDATION = ("validate.held_out=3", "validate.stabilised=2", "validate.every=2")

# Checkpoints before the last, samples and snapshots of averages: a stop adds some, and a full disk prevents some.
OLDER = r"checkpoints/(?!LATEST).*|samples/.*|snapshots/.*"
EVERYTHING = "validation, samples, tensorboard"  # the run that writes every kind of file
# name -> (stages, overrides)
JOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lion": (UNET, ("stage.schedule=cosine",)),
    "dlion, text encoder next": (DLION + TEXT, ()),
    "adamw, accumulation": (UNET.replace("lion", "adamw") + "micro_batch = 2\n", ("stage.keep_checkpoints=2",)),
    "bf16": (UNET, ("stage.precision=bf16",)),
    "ema": (UNET + "ema = 0.5\n", ()),
    "two stages, state carried": (DLION + CARRIED, ("stage.ema=0.5",)),
    "adapters": (UNET.replace('["unet"]', '["lora"]'), ("model.lora={rank=2, text_encoder=true}",)),
    EVERYTHING: (LONGER + "sample_every = 2\n" + AVERAGES, (*VALIDATION, "log.tensorboard=true")),
    "one checkpoint kept": (UNET.replace("every = 2", "every = 1") + "checkpoint_at = [2]\n", ("stage.keep_checkpoints=1",)),
    "log every 2nd step": (UNET, ("log.every=2", "stage.checkpoint_every=3", "export.single_file=false")),
}


@dataclass(frozen=True)
class Command:
    """Arguments of fastsd, and the file or folder that they write.

    Attributes:
        replaces: False = the command never replaces an output.
        adds: the command adds files to those in the folder, with other names.
    """

    words: list[str]
    output: Path
    replaces: bool = True
    adds: bool = False


@dataclass(frozen=True)
class Reference:
    """A command that nothing disturbed: a copy of its output with its digests, its calls, and its duration."""

    results: dict[str, str]
    calls: list[Call]
    seconds: float
    copy: Path


class Workshop:
    """A lab with a tiny model, images, their cache, and the commands. `fastsd train` always writes into the folder `run`."""

    def __init__(self, lab: Lab) -> None:
        from fastsd.model.unet import UNetConfig

        self.lab, self.run, self.outside = lab, lab.root / "run", lab.root.parent
        self.model, self.images = lab.root / "base", lab.root / "data" / "images"
        make_tiny_model(self.model, UNetConfig(**ONE_LEVEL))
        write_images(self.images, 21)
        self.commands: dict[str, Command] = {}
        for name, (stages, overrides) in JOBS.items():
            self.add_job(name, stages, overrides)
        config = self.commands[EVERYTHING].words[1:]
        outcome = lab.run("cache", *config)
        assert outcome.code == 0, outcome.text

        self.reference, self.killed = cache(self._reference), cache(self._killed)
        names = "new-cache", "shared-cache", "drawn", "loss.json", "converted.safetensors", "report.html"
        out = {name: lab.root / name for name in names}
        drawing = ["--prompt", "red circle", "--steps", "2", "--size", "32", "--device", "cpu"]
        for name, path, words in (
            ("cache", out["new-cache"], [*config, f"cache.dir={out['new-cache']}"]),
            ("cache --machine", out["shared-cache"], [*config, f"cache.dir={out['shared-cache']}", "--machine", "node-1"]),
            ("sample", out["drawn"], [self.model, *drawing, "--out", out["drawn"]]),
            ("validate", out["loss.json"], [self.model, *config, "--json", out["loss.json"]]),
            ("convert", out["converted.safetensors"], [self.model, out["converted.safetensors"]]),
            ("compare", out["report.html"], [self.reference(EVERYTHING).copy, "--out", out["report.html"]]),
        ):
            self.commands[name] = Command([name.split()[0], *map(str, words)], path, name != "convert", name == "sample")

    def add_job(self, name: str, stages: str, overrides: tuple[str, ...] = ()) -> None:
        """Add the training of a job to the commands."""
        folder = self.outside / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        config = job(folder, self.model, self.images, stages)
        self.commands[name] = Command(["train", str(config), f"run={self.run}", *overrides], self.run)

    def start(self, name: str, **disturbance) -> Outcome:
        """Run a command, or continue it, with a disturbance as for `Lab.run`."""
        return self.lab.run(*self.commands[name].words, **disturbance)

    def restore(self, name: str, copy: Path | None = None) -> None:
        """Replace the output of a command by a copy; None = by nothing."""
        output = self.commands[name].output
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)
        if copy and copy.exists():
            subprocess.run(["cp", "-a", copy, output], check=True)  # hard links stay

    def _killed(self, name: str, share: float = 0.7) -> Path:
        """Return a copy of the output of a command that was killed after a share of its calls."""
        fault = Fault(nth=int(len(self.reference(name).calls) * share))
        self.restore(name)
        self.start(name, fault=fault)
        return self._copy(name, f"{name}, killed at {share}")

    def ends_equal(self, name: str, *, besides: str = "") -> str:
        """Run a command to its end. Return "" if its output is that of the undisturbed command, otherwise the reason.

        Args:
            besides: regular expression of files that may differ. LATEST in it stands for the last checkpoint.
        """
        command = self.commands[name]
        if command.adds:
            if problem := self._incomplete(name):
                return problem
            self.restore(name)
        if command.replaces or not command.output.exists():
            self.last = self.start(name)
            if problem := self.last.problem(0):
                return problem
        return self._difference(name, besides)

    def _incomplete(self, name: str) -> str:
        """Return "" if each file that a disturbed command has left, except temporary ones, is one of the reference's."""
        output, whole = self.commands[name].output, set(self.reference(name).results.values())
        files = results(output).items() if output.exists() else ()
        damaged = [path for path, digest in files if digest not in whole and not path.startswith(TEMPORARY)]
        return f"{', '.join(damaged)} is not complete" if damaged else ""

    def is_complete(self, name: str) -> bool:
        """Return True if the output of a command is that of the undisturbed command."""
        return not self._difference(name, OLDER)

    def _difference(self, name: str, besides: str) -> str:
        expected, actual = self.reference(name).results, results(self.commands[name].output)
        latest = max((path.split("/")[1] for path in expected if path.startswith("checkpoints/")), default="")
        pattern = re.compile(besides.replace("LATEST", latest))
        expected, actual = (
            {path: digest for path, digest in digests.items() if not pattern.fullmatch(path)} for digests in (expected, actual)
        )
        return difference(expected, actual)

    def _copy(self, name: str, folder: str) -> Path:
        copy, output = self.outside / "copies" / folder, self.commands[name].output
        copy.parent.mkdir(exist_ok=True)
        shutil.rmtree(copy, ignore_errors=True)
        if output.exists():
            subprocess.run(["cp", "-a", output, copy], check=True)
        return copy

    def _reference(self, name: str) -> Reference:
        self.restore(name)
        started_at, trace = time.monotonic(), self.outside / "trace"
        outcome = self.start(name, trace=trace)
        assert not outcome.problem(0), outcome.text
        seconds = time.monotonic() - started_at
        calls = read_trace(trace)
        trace.unlink()
        return Reference(results(self.commands[name].output), calls, seconds, self._copy(name, name))


@contextmanager
def workshop() -> Iterator[Workshop]:
    """Set up a workshop in a temporary folder."""
    with TemporaryDirectory(prefix="fastsd-faults-") as folder, Lab(Path(folder) / "lab") as lab:
        yield Workshop(lab)
