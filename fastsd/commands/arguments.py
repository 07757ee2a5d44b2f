"""Types of the arguments and options of the command line, with their help, and the commands' group. Read next: `cli.py`.

A default in parentheses is the command's, not the option's: it depends on the config or the model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option, core

from fastsd.errors import UserError

_LATER = 2.0  # seconds
INSTANT = {"config"}  # commands that import nothing that takes long
PARALLEL = {"train", "cache"}  # commands that several processes of torchrun share, except for these options:
ALONE = {"cache": ("verify", "prune", "stats", "audit")}


class Precision(StrEnum):
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


class Dtype(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Measure(StrEnum):
    error = "error"
    fine = "fine"


class Form(StrEnum):
    diffusers = "diffusers"
    single_file = "single-file"
    lora_kohya = "lora-kohya"
    lora_peft = "lora-peft"


def text(value: str) -> str:
    """Expand `~` and environment variables in a path on the command line, as in a config. Hub ids stay as they are."""
    from fastsd.config.paths import expanded

    try:
        return expanded(os.fspath(value))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def path(value: str) -> Path:
    """Make a path of a text on the command line."""
    return Path(text(value))


class Commands(core.TyperGroup):
    """The commands. Each says at once that it starts. A stop signal ends one that does not handle it with one line."""

    def __init__(self, *, commands: Any, **options: Any) -> None:
        for name, command in commands.items():
            if name not in INSTANT:
                command.callback = _with_first_line(name, command.params[0].name, command.callback)
        super().__init__(commands=commands, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if shows_progress():
                print(f"fastsd: {ctx.invoked_subcommand} stopped", file=sys.stderr)
            raise typer.Exit(130) from None


def _with_first_line(name: str, subject: str, callback: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command that writes a line to stderr before the seconds in which it imports PyTorch.

    Args:
        subject: the parameter that the line names, the command's first.
    """

    @wraps(callback)
    def run(**values: Any) -> Any:
        with told_once():
            alone = [f"{name} --{option}" for option in ALONE.get(name, ()) if values[option]]
            if name not in PARALLEL:
                alone = [name]
            if alone and "TORCHELASTIC_RUN_ID" in os.environ and (ranks := _ranks()) != "1":
                raise UserError(
                    "ranks-command",
                    f"{alone[0]} runs in one process, but torchrun has started {ranks}; start it without torchrun",
                )
        value = values[subject] or ""
        words = [name, *map(str, value if isinstance(value, list) else [value])]
        if shows_progress():
            with suppress(OSError):  # nobody may be able to see it
                print(f"{' '.join(words).strip()}: loading PyTorch", file=sys.stderr, flush=True)
        return callback(**values)

    return run


def shows_progress() -> bool:
    """Return False for the ranks of torchrun but the first, which would all show the same.

    Without WORLD_SIZE, other variables of torchrun were left by something else.
    """
    return is_alone() or os.environ.get("RANK", "0") == "0"


@contextmanager
def told_once() -> Iterator[None]:
    """Let one rank on each machine print an error that all have.

    The others end later: when a rank has ended, torchrun stops all, and the sentence might never be printed.
    """
    try:
        yield
    except UserError:
        if is_alone() or os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        import time

        with suppress(KeyboardInterrupt):  # torchrun has noticed that the first rank has ended
            time.sleep(_LATER)
        raise typer.Exit(2) from None


def is_alone() -> bool:
    """Return True if torchrun has started no other processes."""
    return _ranks() == "1"


def _ranks() -> str:
    return os.environ.get("WORLD_SIZE", "1")


def show_version(*, show: bool) -> None:
    """Print the versions of fastsd and of the libraries that matter for its results, and exit."""
    if show:
        from importlib.metadata import PackageNotFoundError, version

        versions = []
        for name in ("fastsd", "torch", "triton", "diffusers", "transformers"):
            try:
                versions.append(f"{name} {version(name)}")
            except PackageNotFoundError:  # Triton, on a platform without it
                versions.append(f"{name} missing")
        print(", ".join(versions))
        raise typer.Exit


Version = Annotated[bool, Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")]

ConfigPath = Annotated[Path, Argument(parser=path, metavar="CONFIG", help="Config file in TOML format; configs/ has examples.")]
Overrides = Annotated[
    list[str] | None, Argument(metavar="[key=value ...]", help="Config values to replace, for example stage.0.batch=8.")
]
BaseModel = Annotated[str, Argument(parser=text, metavar="BASE", help="Base model: diffusers folder, single file or hub id.")]
AnyModel = Annotated[
    str, Argument(parser=text, metavar="MODEL", help="Diffusers folder, single file, hub id, run folder or checkpoint.")
]
NewFolder = Annotated[Path, Argument(parser=path, metavar="OUT", help="Output: a diffusers folder that does not exist yet.")]

StagePrecision = Annotated[
    Precision | None, Option("--precision", help="Compute precision for all stages (default: per config).")
]
ComputePrecision = Annotated[Precision, Option("--precision", help="Compute precision.")]
Device = Annotated[str, Option("--device", metavar="NAME", help="Compute device: auto, cpu, cuda or cuda:N (default: auto).")]
ConfigDevice = Annotated[
    str, Option("--device", metavar="NAME", help="Compute device: auto, cpu, cuda or cuda:N (default: per config).")
]
ScalingFactor = Annotated[
    float | None, Option("--vae-scaling-factor", metavar="X", help="Scaling factor of the VAE (default: as stored).")
]
Tokenizer = Annotated[
    str,
    Option("--tokenizer", parser=text, metavar="PATH", help="Tokenizer folder or hub id, for a model that is a single file."),
]
JsonFile = Annotated[
    Path | None, Option("--json", parser=path, metavar="FILE", help="JSON file to write the results to as well.")
]

# train, cache
StartCheckpoint = Annotated[
    str, Option("--from", metavar="CHECKPOINT", help="Go back to this checkpoint, and set aside what follows it.")
]
Verify = Annotated[bool, Option("--verify", help="Verify all latents and views against their stored sha256.")]
Prune = Annotated[bool, Option("--prune", help="Delete shards that no view uses.")]
Stats = Annotated[bool, Option("--stats", help="Print counts, sizes and statistics of the cache.")]
Machine = Annotated[
    str,
    Option(
        "--machine",
        metavar="NAME",
        help="Name of this machine, if several fill the cache (default: none, or as torchrun says).",
    ),
]
Auditing = Annotated[bool, Option("--audit", help="Measure what the VAE changes in each image, and show the worst images.")]
Against = Annotated[str, Option("--against", parser=text, metavar="VAE", help="With --audit: another VAE, to compare.")]
Worst = Annotated[int | None, Option("--worst", metavar="N", help="With --audit: number of images on the page (default: 100).")]
Measured = Annotated[
    Measure | None,
    Option(
        "--by", help="With --audit: sort by the error (the default), or by the fine error, which shows text and thin lines."
    ),
]

# sample
Prompts = Annotated[
    list[str] | None, Option("--prompt", "-p", metavar="TEXT", help="Prompt, as a line of --prompts; may be repeated.")
]
PromptFile = Annotated[
    Path | None,
    Option(
        "--prompts",
        parser=path,
        metavar="FILE",
        help="Text file with one prompt per line, and options as in sd-scripts: --w --h --d --s --l --n.",
    ),
]
SampleFolder = Annotated[
    Path, Option("--out", "-o", parser=path, metavar="DIR", help="Output folder for the images and their grid.")
]
Images = Annotated[int | None, Option("--images", min=1, metavar="N", help="Images per prompt (default: 1).")]
FirstSeed = Annotated[
    int | None,
    Option("--seed", min=0, metavar="N", help="Seed of the first image of each prompt, counting up (default: 0)."),
]
SampleSteps = Annotated[int | None, Option("--steps", min=1, metavar="N", help="Number of sampling steps (default: 20).")]
Guidance = Annotated[
    float | None,
    Option("--guidance", "--cfg", min=0.0, metavar="X", help="Scale of classifier-free guidance; 1 is off (default: 7)."),
]
GuidanceRescale = Annotated[
    float | None,
    Option(
        "--guidance-rescale",
        min=0.0,
        max=1.0,
        metavar="X",
        help="Share of the guidance's spread to remove, 0.7 for zero SNR (default: 0).",
    ),
]
Negative = Annotated[str | None, Option("--negative", "-n", metavar="TEXT", help="Negative prompt for all images.")]
Sampler = Annotated[
    str | None, Option("--sampler", metavar="NAME", help="Sampler: ddim, euler, euler_a or dpm++ (default: dpm++).")
]
Size = Annotated[
    int | None, Option("--size", min=0, metavar="PX", help="Width and height of the images (default: the model's size).")
]
Width = Annotated[int | None, Option("--width", min=0, metavar="PX", help="Width of the images (default: --size).")]
Height = Annotated[int | None, Option("--height", min=0, metavar="PX", help="Height of the images (default: --size).")]
DrawEma = Annotated[bool | None, Option("--ema/--no-ema", help="Use a checkpoint's averaged (EMA) weights (default: no).")]
Adapters = Annotated[list[str] | None, Option("--lora", metavar="LORA[:weight]", help="Adapter to draw with; may be repeated.")]
DecodingVae = Annotated[
    str | None, Option("--vae", parser=text, metavar="PATH", help="VAE to decode with (default: the model's own).")
]
ClipSkip = Annotated[
    int | None,
    Option(
        "--clip-skip", min=0, metavar="N", help="Last text encoder layers to skip, 1 less than in kohya and A1111 (default: 0)."
    ),
]
Chunks = Annotated[
    str | None, Option("--chunks", metavar="N", help="Chunks of 75 tokens to read of a prompt, or auto (default: 1).")
]
SamplePrecision = Annotated[
    Precision | None, Option("--precision", help="Compute precision (default: fp32, or that of a run's stage).")
]

# validate, plan
ValidatePrecision = Annotated[
    Precision | None, Option("--precision", help="Compute precision (default: that of the last stage).")
]
Vram = Annotated[float | None, Option("--vram", metavar="GiB", help="GPU memory in GiB (default: that of --card, or 24).")]
Card = Annotated[str, Option("--card", metavar="NAME", help="GPU to estimate for, for example 4090 (default: all known).")]
Gpus = Annotated[int | None, Option("--gpus", metavar="N", help="Number of GPUs that train together (default: 1).")]
Interconnect = Annotated[
    str,
    Option("--interconnect", metavar="LINK", help="pcie4, nvlink, 100gbe, ..., or GB/s that a GPU sends (default: pcie4)."),
]
Machines = Annotated[
    int | None, Option("--machines", metavar="M", help="Machines that hold the GPUs (default: one for each 8).")
]
Network = Annotated[
    str, Option("--network", metavar="LINK", help="100gbe, ..., or GB/s that a machine sends to others (default: 100gbe).")
]

# init
InitConfig = Annotated[
    Path | None, Argument(parser=path, metavar="[OUT]", help="Config to write (default: named after the images and the goal).")
]
InitGoal = Annotated[
    str,
    Option("--goal", metavar="NAME", help="Job: vae, finetune, lora or text-encoder (default: vae or finetune)."),
]
InitBase = Annotated[
    str, Option("--base", metavar="MODEL", help="Base model: folder, .safetensors or hub id (default: SD1.5 on the hub).")
]
InitVae = Annotated[str, Option("--vae", metavar="VAE", help="New VAE: folder, file or hub id (default for vae: SDXL's).")]
InitImages = Annotated[str, Option("--images", metavar="FOLDER", help="Folder of images with captions, or a .tar.")]
InitCard = Annotated[
    str,
    Option("--card", metavar="CARD", help="GPU, or its memory in GiB, such as 4090 or 12 (default: this machine's, or 24)."),
]
InitPrecision = Annotated[Precision | None, Option("--precision", help="Compute precision (default: bf16).")]
InitUntil = Annotated[str, Option("--until", metavar="N", help="Length: steps, 2e (epochs) or 12h (default: by the goal).")]
InitResolution = Annotated[str, Option("--resolution", metavar="PX", help="Image size (default: that of the base).")]
InitFactor = Annotated[
    str, Option("--vae-scaling-factor", metavar="X", help="Scaling factor of a VAE that is a file without one.")
]

# bench
BenchWords = Annotated[
    list[str] | None,
    Argument(
        metavar="[WHAT] [CONFIG] [key=value ...]",
        help="What to measure: step, memory, kernels, optim, loader or cache (default: step).",
    ),
]
Small = Annotated[bool, Option("--small", help="Use a tiny model, as a quick test of the benchmark.")]
BenchSize = Annotated[int | None, Option("--size", min=1, metavar="PX", help="Image size (default: per CONFIG, or 512).")]
BenchBatch = Annotated[
    int | None, Option("--batch", min=1, metavar="N", help="Images per training step (default: per CONFIG).")
]
BenchMicroBatch = Annotated[
    int | None, Option("--micro-batch", min=1, metavar="N", help="Images per forward pass (default: per CONFIG).")
]
BenchOptimizer = Annotated[
    str | None, Option("--optimizer", metavar="NAME", help="Optimizer, as stage.optimizer (default: per CONFIG).")
]
Peers = Annotated[
    str | None,
    Option("--peers", metavar="LIST", help="Baselines: none, or a list of diffusers,compiled,dadaptation,lion-pytorch."),
]
Graph = Annotated[bool | None, Option("--graph/--no-graph", help="Run the step as a CUDA graph (default: per CONFIG).")]
Rounds = Annotated[int | None, Option("--steps", min=1, metavar="N", help="Rounds to time (loader: batches to load).")]
Fraction = Annotated[float | None, Option("--fraction", metavar="X", help="For optim: fraction of the UNet's tensors to use.")]
Rate = Annotated[float, Option("--rate", metavar="X", help="For loader: images per second that the training step consumes.")]

# compare, watch, sweep, lr-probe
RunFolders = Annotated[list[Path] | None, Argument(parser=path, metavar="RUN ...", help="Run folders to compare.")]
Port = Annotated[int, Option("--port", min=0, max=65535, metavar="N", help="Port of the page; 0 = any free one.")]
WatchedRuns = Annotated[list[Path], Argument(parser=path, metavar="RUN ...", help="Run folders to show.")]
ReportFile = Annotated[
    Path, Option("--out", "-o", parser=path, metavar="FILE", help="HTML page to write; its images go into a folder beside it.")
]
Baseline = Annotated[
    str,
    Option("--baseline", parser=text, metavar="RUN", help="Run to compare the others with (default: the first)."),
]
Draw = Annotated[
    list[str] | None,
    Option("--draw", metavar="KEY=a,b,c", help="Draw samples with these settings, for example clip_skip=0,1."),
]
DrawCheckpoints = Annotated[bool, Option("--checkpoints", help="Draw samples from every saved checkpoint.")]
SweepValues = Annotated[
    list[str] | None, Argument(metavar="key=a,b,c ...", help="Values to sweep; key=value sets one value for all runs.")
]
SweepBaseline = Annotated[
    str, Option("--baseline", metavar="NAME", help="Run to compare the others with (default: CONFIG's own).")
]
ProbeSteps = Annotated[int, Option("--steps", min=40, metavar="N", help="Length of the D-Lion run in steps.")]
ProbeStage = Annotated[str, Option("--stage", metavar="NAME", help="Stage to probe (default: the first).")]

# long-clip, swap-vae
NewTokens = Annotated[int, Option("--tokens", min=1, metavar="N", help="New length of the text encoder in tokens.")]
NewVae = Annotated[str, Argument(parser=text, metavar="VAE", help="VAE, or model with a VAE, in any form that BASE can have.")]
AlignmentImages = Annotated[
    Path | None, Option("--images", parser=path, metavar="DIR", help="Images for aligning the UNet to the new latents.")
]
MostImages = Annotated[int, Option("--limit", min=8, metavar="N", help="Largest number of images to use.")]
Fit = Annotated[str, Option("--fit", metavar="NAME", help="Fit: plain, orthogonal, affine or kernel (default: smallest loss).")]
Normalise = Annotated[
    Path | None,
    Option("--normalise", metavar="DIR", help="Latent cache of VAE: give each of its channels mean 0 and deviation 1 on it."),
]
Resolution = Annotated[int, Option("--resolution", min=0, metavar="PX", help="Image size; 0 = the model's native size.")]
SwapPrecision = Annotated[Precision, Option("--precision", help="Precision of measurements: fp32 or bf16.")]
Seed = Annotated[int, Option("--seed", min=0, metavar="N", help="Seed that selects images, noise and timesteps.")]

# average
AveragedRun = Annotated[str, Argument(parser=text, metavar="RUN", help="Run with sigma_rel, or one of its checkpoints.")]
SigmaRel = Annotated[
    float, Option("--sigma-rel", metavar="LENGTH", help="Length of the average as a share of the steps, for example 0.07.")
]
AverageFolder = Annotated[
    Path | None, Option("--out", "-o", parser=path, metavar="DIR", help="Folder to write (default: in RUN/averages).")
]

# convert, config, convert-config
AnyFile = Annotated[
    str, Argument(parser=text, metavar="IN", help="Folder, hub id, .safetensors, .ckpt, LoRA, run or checkpoint.")
]
NewModel = Annotated[Path, Argument(parser=path, metavar="OUT", help="Output: a new folder or .safetensors file.")]
OutputForm = Annotated[Form | None, Option("--to", help="Output format (default: inferred from OUT's extension).")]
OutputDtype = Annotated[Dtype | None, Option("--dtype", help="Data type of the weights (default: unchanged).")]
ConvertEma = Annotated[bool, Option("--ema", help="Convert the averaged (EMA) weights.")]
Fold = Annotated[bool, Option("--fold/--no-fold", help="For a single file: fold the VAE's scaling factor into it.")]
Variant = Annotated[str, Option("--variant", metavar="WORD", help="For diffusers: variant in file names, for example fp16.")]
Shard = Annotated[
    float, Option("--shard", metavar="GiB", min=0.0, help="For diffusers: size in GiB above which files are split; 0 = off.")
]
OtherVae = Annotated[str, Option("--vae", parser=text, metavar="PATH", help="VAE to use instead of the model's own.")]
Revision = Annotated[str, Option("--revision", metavar="NAME", help="Branch, tag or commit of a hub id.")]
Merge = Annotated[
    list[str] | None,
    Option(
        "--merge",
        parser=text,
        metavar="LORA[:weight]",
        help="Adapter to merge (LoRA, LoHa, LoKr, DoRA, full difference); may be repeated.",
    ),
]
ConfigKey = Annotated[str, Argument(metavar="[KEY]", help="Key or table, for example lr or stage.lr (default: list all keys).")]
ForeignConfig = Annotated[Path, Argument(parser=path, metavar="FILE", help="Config of sd-scripts, OneTrainer or EveryDream2.")]
NewConfig = Annotated[Path | None, Argument(parser=path, metavar="OUT", help="TOML file to write (default: FILE-fastsd.toml).")]

# redraw, demo
NewDataset = Annotated[
    Path, Argument(parser=path, metavar="OUT", help="Output: a new folder, or that of an interrupted run of this command.")
]
StartTimestep = Annotated[
    int | None,
    Option("--start", metavar="T", help="Timestep to which latents are noised; 0 = only decode them (default: pure noise)."),
]
Limit = Annotated[int | None, Option("--limit", min=1, metavar="N", help="Number of images to draw (default: all).")]
DemoFolder = Annotated[Path, Option("--out", "-o", parser=path, metavar="DIR", help="Output folder.")]
