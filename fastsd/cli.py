"""The command line. It parses arguments, calls a command (which imports torch), and prints a `UserError` as one sentence.

Exit codes: 0 = done, 1 = a bug in fastsd (with a traceback), 2 = the user must change something, 130 = stopped by a signal.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastsd.commands import arguments as args
from fastsd.commands.arguments import Precision
from fastsd.commands.examples import EXAMPLES, examples
from fastsd.errors import Stopped, UserError, disk_advice

if TYPE_CHECKING:
    from fastsd.config.schema import Config

app = typer.Typer(
    cls=args.Commands,
    help="Retrain Stable Diffusion 1.5, with another VAE swapped in, on one GPU.",
    epilog=examples(
        "demo                                the whole story in miniature",
        "init                                write a config for your job",
        "plan configs/xlsd.toml --card 4090  memory, speed and disk space",
        "train configs/xlsd.toml             train; the same command resumes",
        "train --help                        options and examples of a command",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def fastsd(*, version: args.Version = False) -> None:
    pass


@app.command(epilog=EXAMPLES["init"])
def init(
    out: args.InitConfig = None,
    goal: args.InitGoal = "",
    base: args.InitBase = "",
    vae: args.InitVae = "",
    images: args.InitImages = "",
    card: args.InitCard = "",
    precision: args.InitPrecision = None,
    until: args.InitUntil = "",
    resolution: args.InitResolution = "",
    vae_scaling_factor: args.InitFactor = "",
) -> None:
    """Write a config for your images and card. Without options, at a terminal, it asks for them."""
    from fastsd.commands.init import Answers, init

    options = (goal, base, vae, images, card, precision.value if precision else "", until, resolution, vae_scaling_factor)
    init(out, Answers(*options), input if not any(options) and sys.stdin.isatty() else None)


@app.command(epilog=EXAMPLES["train"])
def train(
    config: args.ConfigPath,
    overrides: args.Overrides = None,
    precision: args.StagePrecision = None,
    start: args.StartCheckpoint = "",
) -> None:
    """Train the stages of CONFIG. Run the same command again to resume."""
    with args.told_once():
        loaded = _load(config, overrides, precision)
    from fastsd.run.loop import train
    from fastsd.train.ranks import joined_ranks

    with joined_ranks() as ranks:
        train(loaded, start=start, ranks=ranks)


@app.command(epilog=EXAMPLES["cache"])
def cache(
    config: args.ConfigPath,
    overrides: args.Overrides = None,
    *,
    verify: args.Verify = False,
    prune: args.Prune = False,
    stats: args.Stats = False,
    machine: args.Machine = "",
    audit: args.Auditing = False,
    against: args.Against = "",
    worst: args.Worst = None,
    by: args.Measured = None,
) -> None:
    """Encode the images of CONFIG into its latent cache. Run the same command again to encode what is missing."""
    loaded = _load(config, overrides)
    if audit or against or by or worst is not None:
        from fastsd.compare import audit as audits

        audits.check_options({"--verify": verify, "--prune": prune, "--stats": stats}, against, worst, by, audit=audit)
        audits.audit(loaded, against, worst or audits.SHOWN, by or args.Measure.error)
        return
    from fastsd.commands.cache import cache, inspect_cache

    if verify or prune or stats:
        inspect_cache(loaded, verify=verify, prune=prune, stats=stats)
    else:
        cache(loaded, machine=machine)


@app.command(epilog=EXAMPLES["sample"])
def sample(
    model: args.AnyModel,
    prompt: args.Prompts = None,
    prompts: args.PromptFile = None,
    out: args.SampleFolder = Path("samples"),
    images: args.Images = None,
    seed: args.FirstSeed = None,
    steps: args.SampleSteps = None,
    guidance: args.Guidance = None,
    guidance_rescale: args.GuidanceRescale = None,
    negative: args.Negative = None,
    sampler: args.Sampler = None,
    size: args.Size = None,
    width: args.Width = None,
    height: args.Height = None,
    *,
    ema: args.DrawEma = None,
    lora: args.Adapters = None,
    vae: args.DecodingVae = None,
    vae_scaling_factor: args.ScalingFactor = None,
    tokenizer: args.Tokenizer = "",
    clip_skip: args.ClipSkip = None,
    chunks: args.Chunks = None,
    precision: args.SamplePrecision = None,
    device: args.Device = "",
) -> None:
    """Generate images from prompts with MODEL. A run's settings are the defaults for a run and its checkpoints.

    A prompt's own options come before those of the command.
    """
    from fastsd.commands.sample import SampleOptions, sample

    settings: dict[str, Any] = {
        "images": images,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "guidance_rescale": guidance_rescale,
    }
    settings |= {"negative": negative, "sampler": sampler, "size": size, "width": width, "height": height}
    settings |= {"prompts_file": prompts and str(prompts), "weights": None if ema is None else ("ema" if ema else "model")}
    source: dict[str, Any] = {
        "vae": vae,
        "vae_scaling_factor": vae_scaling_factor,
        "tokenizer": tokenizer or None,
        "clip_skip": clip_skip,
    }
    source |= {"chunks": int(chunks) if chunks and chunks.isdecimal() else chunks}
    options = SampleOptions(out, prompt or (), precision.value if precision else "", device, lora or ())
    sample(model, source, settings, options)


@app.command(epilog=EXAMPLES["validate"])
def validate(
    model: args.AnyModel,
    config: args.ConfigPath,
    overrides: args.Overrides = None,
    precision: args.ValidatePrecision = None,
    json_file: args.JsonFile = None,
) -> None:
    """Measure the validation loss of MODEL. The images are the held-out and the stabilised ones of CONFIG."""
    loaded = _load(config, overrides, precision)
    from fastsd.commands.validate import validate

    validate(model, loaded, json_file)


@app.command(epilog=EXAMPLES["check"])
def check(config: args.ConfigPath, overrides: args.Overrides = None, precision: args.StagePrecision = None) -> None:
    """Find the problems of CONFIG, its data and models. Does so before the long run, and changes nothing."""
    from fastsd.commands.check import check_file

    check_file(lambda: _load(config, overrides, precision))


@app.command(epilog=EXAMPLES["plan"])
def plan(
    config: args.ConfigPath,
    overrides: args.Overrides = None,
    precision: args.StagePrecision = None,
    vram: args.Vram = None,
    card: args.Card = "",
    *,
    gpus: args.Gpus = None,
    interconnect: args.Interconnect = "",
    machines: args.Machines = None,
    network: args.Network = "",
    json_file: args.JsonFile = None,
) -> None:
    """Estimate memory, time and disk space from CONFIG alone. Shows which GPU it fits, and with which micro-batch."""
    loaded = _load(config, overrides, precision)
    from fastsd.plan.links import cluster_of
    from fastsd.plan.plan import plan

    plan(loaded, vram, card, json_file, cluster=cluster_of(gpus, machines, interconnect, network))


@app.command(epilog=EXAMPLES["bench"])
def bench(
    words: args.BenchWords = None,
    precision: args.StagePrecision = None,
    *,
    small: args.Small = False,
    size: args.BenchSize = None,
    batch: args.BenchBatch = None,
    micro_batch: args.BenchMicroBatch = None,
    optimizer: args.BenchOptimizer = None,
    peers: args.Peers = None,
    graph: args.Graph = None,
    steps: args.Rounds = None,
    fraction: args.Fraction = None,
    rate: args.Rate = 10.0,
    json_file: args.JsonFile = None,
) -> None:
    """Benchmark the training step against baselines. WHAT selects memory, kernels, optimizers, loader or cache instead."""
    from fastsd.bench.suites import bench

    options = {"size": size, "batch": batch, "micro_batch": micro_batch, "optimizer": optimizer, "graph": graph}
    more: dict[str, Any] = {"small": small, "peers": peers, "steps": steps, "fraction": fraction, "rate": rate}
    bench(words or [], json_file, options, precision=precision and precision.value, **more)


@app.command(epilog=EXAMPLES["compare"])
def compare(
    runs: args.RunFolders = None,
    out: args.ReportFile = Path("report.html"),
    baseline: args.Baseline = "",
    draw: args.Draw = None,
    *,
    checkpoints: args.DrawCheckpoints = False,
) -> None:
    """Compare runs on one HTML page. It shows settings, curves, samples, cost, and differences from a baseline."""
    from fastsd.compare.compare import compare

    compare(runs or [], out, baseline, draw or [], from_checkpoints=checkpoints)


@app.command(epilog=EXAMPLES["watch"])
def watch(runs: args.WatchedRuns, port: args.Port = 8421) -> None:
    """Show runs on one page in the browser while they train. It refreshes itself, and is served on this machine only."""
    from fastsd.compare.watch import watch

    watch(runs, port)


@app.command(epilog=EXAMPLES["sweep"])
def sweep(
    config: args.ConfigPath,
    values: args.SweepValues = None,
    precision: args.StagePrecision = None,
    baseline: args.SweepBaseline = "",
) -> None:
    """Train runs that differ in a few values, and compare them. Run the same command again to resume."""
    from fastsd.compare.sweep import sweep

    sweep(config, values or [], precision and precision.value, baseline)


@app.command(name="lr-probe", epilog=EXAMPLES["lr-probe"])
def lr_probe(
    config: args.ConfigPath,
    overrides: args.Overrides = None,
    precision: args.StagePrecision = None,
    steps: args.ProbeSteps = 400,
    stage: args.ProbeStage = "",
) -> None:
    """Find a learning rate for Lion with a short D-Lion run."""
    loaded = _load(config, overrides, precision)
    from fastsd.commands.lr_probe import lr_probe

    lr_probe(loaded, steps, stage)


@app.command(name="long-clip", epilog=EXAMPLES["long-clip"])
def long_clip(
    base: args.BaseModel,
    out: args.NewFolder,
    tokens: args.NewTokens = 248,
    tokenizer: args.Tokenizer = "",
) -> None:
    """Stretch the text encoder of BASE for long captions. Long-CLIP does the same before its training."""
    from fastsd.commands.long_clip import long_clip

    long_clip(base, out, tokens, tokenizer)


@app.command(name="swap-vae", epilog=EXAMPLES["swap-vae"])
def swap_vae(
    base: args.BaseModel,
    vae: args.NewVae,
    out: args.NewFolder,
    images: args.AlignmentImages = None,
    limit: args.MostImages = 256,
    fit: args.Fit = "",
    vae_scaling_factor: args.ScalingFactor = None,
    normalise: args.Normalise = None,
    tokenizer: args.Tokenizer = "",
    resolution: args.Resolution = 0,
    precision: args.SwapPrecision = Precision.fp32,
    device: args.Device = "auto",
    seed: args.Seed = 0,
) -> None:
    """Replace the VAE of BASE. With --images, the UNet is aligned to the new latents before any training."""
    from fastsd.commands.swap_vae import swap_vae

    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "precision": precision.value,
        "device": device,
        "seed": seed,
        "normalise": normalise,
    }
    swap_vae(base, vae, out, images, fit, limit, resolution, vae_scaling_factor, **options)


@app.command(epilog=EXAMPLES["average"])
def average(source: args.AveragedRun, sigma_rel: args.SigmaRel, out: args.AverageFolder = None) -> None:
    """Average weights over any length from a run's snapshots."""
    from fastsd.commands.average import average

    average(source, sigma_rel, out)


@app.command(epilog=EXAMPLES["convert"])
def convert(
    source: args.AnyFile,
    out: args.NewModel,
    to: args.OutputForm = None,
    dtype: args.OutputDtype = None,
    *,
    ema: args.ConvertEma = False,
    fold: args.Fold = True,
    variant: args.Variant = "",
    shard: args.Shard = 0.0,
    vae: args.OtherVae = "",
    vae_scaling_factor: args.ScalingFactor = None,
    tokenizer: args.Tokenizer = "",
    revision: args.Revision = "",
    merge: args.Merge = None,
) -> None:
    """Convert a model to another format. Writes a diffusers folder, a single file, or a LoRA with kohya or PEFT names."""
    from fastsd.commands.convert import ConvertOptions, convert

    how = (ema, fold, variant, shard, vae, vae_scaling_factor, tokenizer, revision, tuple(merge or ()))
    options = ConvertOptions(dtype.value if dtype else "", *how)
    convert(source, out, to.value if to else "", options)


@app.command(name="config", epilog=EXAMPLES["config"])
def explain_config(key: args.ConfigKey = "") -> None:
    """Explain config keys: meaning, values and default."""
    from fastsd.commands.explain_config import explain_config

    explain_config(key)


@app.command(name="convert-config", epilog=EXAMPLES["convert-config"])
def convert_config(source: args.ForeignConfig, out: args.NewConfig = None) -> None:
    """Convert a config of another trainer. Prints what becomes of each key, and what has no equal."""
    from fastsd.commands.convert_config import convert_config

    convert_config(source, out)


@app.command(epilog=EXAMPLES["redraw"])
def redraw(
    model: args.AnyModel,
    config: args.ConfigPath,
    out: args.NewDataset,
    overrides: args.Overrides = None,
    start: args.StartTimestep = None,
    limit: args.Limit = None,
    precision: args.ComputePrecision = Precision.fp32,
    device: args.ConfigDevice = "",
) -> None:
    """Make a data set by redrawing images with MODEL. Images of CONFIG are redrawn from captions or from noised latents."""
    loaded = _load(config, overrides)
    from fastsd.commands.redraw import redraw

    redraw(model, loaded, out, start, limit, precision.value, device)


@app.command(epilog=EXAMPLES["demo"])
def demo(out: args.DemoFolder = Path("demo-out")) -> None:
    """Try the whole workflow on tiny models. Swaps the VAE, caches, trains, samples: minutes on CPU or GPU, no downloads."""
    from fastsd.demo.demo import demo

    demo(out)


def _load(path: Path, overrides: list[str] | None, precision: Precision | None = None) -> Config:
    from fastsd.config.schema import load_config
    from fastsd.terminal.console import STDOUT

    STDOUT.name_config([str(path), *(overrides or [])], precision and precision.value)
    return load_config(path, overrides, precision and precision.value)


def main() -> None:
    # When imported, diffusers and transformers print advice that does not help a user. Errors are still raised.
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    from fastsd.run.signals import signals_of_commands
    from fastsd.terminal.console import shown

    try:
        with signals_of_commands(), shown() if args.shows_progress() else nullcontext():
            app()
    except UserError as error:
        from fastsd.terminal.console import error_text

        print(error_text(f"fastsd: {error}"), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if (advice := disk_advice(error)) is None:
            raise
        print(
            f"fastsd: {error.filename or 'a file'}: {error.strerror}; {advice} and run the same command again", file=sys.stderr
        )
        sys.exit(2)
    except Stopped as stopped:
        print(f"fastsd: {stopped}; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:  # before a command was chosen
        print("fastsd: stopped", file=sys.stderr)
        sys.exit(130)


def program() -> None:
    """Run the command line as a whole process. A signal during the interpreter's exit ends it at once, without a traceback."""
    try:
        main()
    finally:
        from fastsd.run.signals import end_at_signals

        end_at_signals()
