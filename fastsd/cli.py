"""The command line. It parses arguments, calls a command (which imports torch), and prints a `UserError` as one sentence.

Exit codes: 0 = done, 1 = a bug in fastsd (with a traceback), 2 = the user must change something, 130 = stopped by a signal.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option, core

from fastsd.arguments import (
    AnyModel,
    BaseModel,
    BenchWords,
    ComputePrecision,
    ConfigPath,
    Device,
    Dtype,
    Form,
    JsonFile,
    NewFolder,
    Overrides,
    Precision,
    ScalingFactor,
    StagePrecision,
    Tokenizer,
    path,
    text,
)
from fastsd.errors import Stopped, UserError, disk_advice

if TYPE_CHECKING:
    from fastsd.config.schema import Config


class Commands(core.TyperGroup):
    """The commands. A stop signal ends a command that does not handle it with one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print(f"fastsd: {ctx.invoked_subcommand} stopped", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    help="Retrain Stable Diffusion 1.5, with another VAE swapped in, on one GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    precision: StagePrecision = None,
    start: Annotated[
        str, Option("--from", metavar="CHECKPOINT", help="Go back to this checkpoint, and set aside what follows it.")
    ] = "",
) -> None:
    """Train the stages of CONFIG. Run the same command again to resume."""
    loaded = _load(config, overrides, precision)
    from fastsd.run.loop import train

    train(loaded, start=start)


@app.command()
def cache(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    verify: Annotated[bool, Option("--verify", help="Verify all latents and views against their stored sha256.")] = False,
    prune: Annotated[bool, Option("--prune", help="Delete shards that no view uses.")] = False,
    stats: Annotated[bool, Option("--stats", help="Print counts, sizes and statistics of the cache.")] = False,
) -> None:
    """Encode the images of CONFIG into its latent cache. Run the same command again to encode what is missing."""
    loaded = _load(config, overrides)
    from fastsd.commands.cache import cache, inspect_cache

    if verify or prune or stats:
        inspect_cache(loaded, verify=verify, prune=prune, stats=stats)
    else:
        cache(loaded)


@app.command()
def sample(
    model: AnyModel,
    prompt: Annotated[list[str] | None, Option(help="Prompt, as a line of --prompts; can be given several times.")] = None,
    prompts: Annotated[
        Path | None,
        Option(parser=path, help="Text file with one prompt per line, and options as in sd-scripts: --w --h --d --s --l --n."),
    ] = None,
    out: Annotated[Path, Option(parser=path, help="Output folder for the images and their grid.")] = Path("samples"),
    images: Annotated[int | None, Option(min=1, help="Images per prompt (default: 1).")] = None,
    seed: Annotated[int | None, Option(min=0, help="Seed of the first image of each prompt, counting up (default: 0).")] = None,
    steps: Annotated[int | None, Option(min=1, help="Number of sampling steps (default: 20).")] = None,
    guidance: Annotated[
        float | None, Option(min=0.0, help="Scale of classifier-free guidance; 1 turns it off (default: 7).")
    ] = None,
    guidance_rescale: Annotated[
        float | None, Option(min=0.0, max=1.0, help="Share of the guidance's spread to remove, 0.7 for zero SNR (default: 0).")
    ] = None,
    negative: Annotated[str | None, Option(help="Negative prompt for all images (default: empty).")] = None,
    sampler: Annotated[str | None, Option(help="Sampler: ddim, euler, euler_a or dpm++ (default: dpm++).")] = None,
    size: Annotated[int | None, Option(min=0, help="Image width and height in px (default: the model's native size).")] = None,
    width: Annotated[int | None, Option(min=0, help="Image width in px (default: --size).")] = None,
    height: Annotated[int | None, Option(min=0, help="Image height in px (default: --size).")] = None,
    *,
    ema: Annotated[
        bool | None, Option("--ema/--no-ema", help="Use a checkpoint's averaged (EMA) weights (default: no).")
    ] = None,
    lora: Annotated[list[str] | None, Option(metavar="LORA[:weight]", help="Adapter to draw with; may be repeated.")] = None,
    vae: Annotated[str | None, Option(parser=text, help="VAE to decode with (default: the model's own).")] = None,
    vae_scaling_factor: ScalingFactor = None,
    tokenizer: Tokenizer = "",
    clip_skip: Annotated[
        int | None, Option(min=0, help="Last text encoder layers to skip, 1 less than in kohya and A1111 (default: 0).")
    ] = None,
    chunks: Annotated[str | None, Option(metavar="N", help="Chunks of 75 tokens to read of a prompt (default: 1).")] = None,
    precision: Annotated[Precision | None, Option(help="Compute precision (default: fp32, or that of a run's stage).")] = None,
    device: Annotated[str, Option(help="Compute device: auto, cpu, cuda or cuda:N (default: auto).")] = "",
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


@app.command()
def validate(
    model: AnyModel,
    config: ConfigPath,
    overrides: Overrides = None,
    precision: Annotated[Precision | None, Option(help="Compute precision (default: that of the last stage).")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the validation loss of MODEL. The images are the held-out and the stabilised ones of CONFIG."""
    loaded = _load(config, overrides, precision)
    from fastsd.commands.validate import validate

    validate(model, loaded, json_file)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None, precision: StagePrecision = None) -> None:
    """Check CONFIG, its data and its models for problems before training."""
    loaded = _load(config, overrides, precision)
    from fastsd.commands.check import check

    check(loaded)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    precision: StagePrecision = None,
    vram: Annotated[float | None, Option(metavar="GB", help="GPU memory in GB (default: that of --card, or 24).")] = None,
    card: Annotated[str, Option(metavar="NAME", help="GPU to estimate for, for example 4090 (default: all known).")] = "",
    json_file: JsonFile = None,
) -> None:
    """Estimate memory, time and disk space from CONFIG alone. Shows which GPU it fits, and with which micro-batch."""
    loaded = _load(config, overrides, precision)
    from fastsd.plan.plan import plan

    plan(loaded, vram, card, json_file)


@app.command()
def bench(
    words: BenchWords = None,
    precision: StagePrecision = None,
    *,
    small: Annotated[bool, Option("--small", help="Use a tiny model, as a quick test of the benchmark.")] = False,
    size: Annotated[int | None, Option(min=1, help="Image size in px (default: per CONFIG, or 512).")] = None,
    batch: Annotated[int | None, Option(min=1, help="Images per training step (default: per CONFIG).")] = None,
    micro_batch: Annotated[int | None, Option(min=1, help="Images per forward pass (default: per CONFIG).")] = None,
    optimizer: Annotated[str | None, Option(help="Optimizer, as stage.optimizer (default: per CONFIG).")] = None,
    peers: Annotated[
        str | None, Option(help="Baselines: none, or a list of diffusers,compiled,dadaptation,lion-pytorch.")
    ] = None,
    graph: Annotated[
        bool | None, Option("--graph/--no-graph", help="Run the step as a CUDA graph (default: per CONFIG).")
    ] = None,
    steps: Annotated[int | None, Option(min=1, help="Rounds to time (loader: batches to load).")] = None,
    fraction: Annotated[float | None, Option(help="For optim: fraction of the UNet's tensors to use.")] = None,
    rate: Annotated[float, Option(help="For loader: images per second that the training step consumes.")] = 10.0,
    json_file: JsonFile = None,
) -> None:
    """Benchmark the training step against baselines. WHAT selects memory, kernels, optimizers, loader or cache instead."""
    from fastsd.bench.suites import bench

    options = {"size": size, "batch": batch, "micro_batch": micro_batch, "optimizer": optimizer, "graph": graph}
    more: dict[str, Any] = {"small": small, "peers": peers, "steps": steps, "fraction": fraction, "rate": rate}
    bench(words or [], json_file, options, precision=precision and precision.value, **more)


@app.command()
def compare(
    runs: Annotated[list[Path] | None, Argument(parser=path, metavar="RUN ...", help="Run folders to compare.")] = None,
    out: Annotated[Path, Option(parser=path, help="HTML page to write; its images go into a folder beside it.")] = Path(
        "report.html"
    ),
    baseline: Annotated[
        str, Option(parser=text, metavar="RUN", help="Run to compare the others with (default: the first).")
    ] = "",
    draw: Annotated[
        list[str] | None, Option(metavar="KEY=a,b,c", help="Draw samples with these settings, for example clip_skip=0,1.")
    ] = None,
    *,
    checkpoints: Annotated[bool, Option("--checkpoints", help="Draw samples from every saved checkpoint.")] = False,
) -> None:
    """Compare runs on one HTML page. It shows settings, curves, samples, cost, and differences from a baseline."""
    from fastsd.compare.compare import compare

    compare(runs or [], out, baseline, draw or [], from_checkpoints=checkpoints)


@app.command()
def sweep(
    config: ConfigPath,
    values: Annotated[
        list[str] | None, Argument(metavar="key=a,b,c ...", help="Values to sweep; key=value sets one value for all runs.")
    ] = None,
    precision: StagePrecision = None,
    baseline: Annotated[str, Option(metavar="NAME", help="Run to compare the others with (default: CONFIG's own).")] = "",
) -> None:
    """Train runs that differ only in these values, and compare them. Run the same command again to resume."""
    from fastsd.compare.sweep import sweep

    sweep(config, values or [], precision and precision.value, baseline)


@app.command(name="lr-probe")
def lr_probe(
    config: ConfigPath,
    overrides: Overrides = None,
    precision: StagePrecision = None,
    steps: Annotated[int, Option(min=40, help="Length of the D-Lion run in steps.")] = 400,
    stage: Annotated[str, Option(metavar="NAME", help="Stage to probe (default: the first).")] = "",
) -> None:
    """Find a learning rate for Lion with a short D-Lion run."""
    loaded = _load(config, overrides, precision)
    from fastsd.commands.lr_probe import lr_probe

    lr_probe(loaded, steps, stage)


@app.command(name="long-clip")
def long_clip(
    base: BaseModel,
    out: NewFolder,
    tokens: Annotated[int, Option(min=1, help="New length of the text encoder in tokens.")] = 248,
    tokenizer: Tokenizer = "",
) -> None:
    """Stretch the text encoder of BASE for long captions. Long-CLIP does the same before its training."""
    from fastsd.commands.long_clip import long_clip

    long_clip(base, out, tokens, tokenizer)


@app.command(name="swap-vae")
def swap_vae(
    base: BaseModel,
    vae: Annotated[str, Argument(parser=text, metavar="VAE", help="VAE, or model with a VAE, in any form that BASE can have.")],
    out: NewFolder,
    images: Annotated[
        Path | None, Option(parser=path, metavar="DIR", help="Images for aligning the UNet to the new latents.")
    ] = None,
    limit: Annotated[int, Option(min=8, metavar="N", help="Largest number of images to use.")] = 256,
    fit: Annotated[str, Option(help="Fit: plain, orthogonal, affine or kernel (default: smallest loss).")] = "",
    vae_scaling_factor: ScalingFactor = None,
    tokenizer: Tokenizer = "",
    resolution: Annotated[int, Option(min=0, help="Image size in px; 0 = the model's native size.")] = 0,
    precision: Annotated[Precision, Option(help="Precision of measurements: fp32 or bf16.")] = Precision.fp32,
    device: Device = "auto",
    seed: Annotated[int, Option(min=0, help="Seed that selects images, noise and timesteps.")] = 0,
) -> None:
    """Replace the VAE of BASE. With --images, the UNet is aligned to the new latents before any training."""
    from fastsd.commands.swap_vae import swap_vae

    options: dict[str, Any] = {"tokenizer": tokenizer, "precision": precision.value, "device": device, "seed": seed}
    swap_vae(base, vae, out, images, fit, limit, resolution, vae_scaling_factor, **options)


@app.command()
def convert(
    source: Annotated[
        str, Argument(parser=text, metavar="IN", help="Folder, hub id, .safetensors, .ckpt, LoRA, run or checkpoint.")
    ],
    out: Annotated[Path, Argument(parser=path, metavar="OUT", help="Output: a new folder or .safetensors file.")],
    to: Annotated[Form | None, Option(help="Output format (default: inferred from OUT's extension).")] = None,
    dtype: Annotated[Dtype | None, Option(help="Data type of the weights (default: unchanged).")] = None,
    *,
    ema: Annotated[bool, Option("--ema", help="Convert the averaged (EMA) weights.")] = False,
    fold: Annotated[bool, Option("--fold/--no-fold", help="For a single file: fold the VAE's scaling factor into it.")] = True,
    variant: Annotated[str, Option(metavar="WORD", help="For diffusers: variant in file names, for example fp16.")] = "",
    shard: Annotated[
        float, Option(metavar="GB", min=0.0, help="For diffusers: size above which files are split; 0 = off.")
    ] = 0.0,
    vae: Annotated[str, Option(parser=text, help="VAE to use instead of the model's own.")] = "",
    vae_scaling_factor: ScalingFactor = None,
    tokenizer: Tokenizer = "",
    revision: Annotated[str, Option(help="Revision of a hub id.")] = "",
    merge: Annotated[
        list[str] | None,
        Option(
            parser=text,
            metavar="LORA[:weight]",
            help="Adapter to merge (LoRA, LoHa, LoKr, DoRA, full difference); may be repeated.",
        ),
    ] = None,
) -> None:
    """Convert a model to another format. Writes a diffusers folder, a single file, or a LoRA with kohya or PEFT names."""
    from fastsd.commands.convert import ConvertOptions, convert

    how = (ema, fold, variant, shard, vae, vae_scaling_factor, tokenizer, revision, tuple(merge or ()))
    options = ConvertOptions(dtype.value if dtype else "", *how)
    convert(source, out, to.value if to else "", options)


@app.command(name="convert-config")
def convert_config(
    source: Annotated[Path, Argument(parser=path, metavar="FILE", help="Config of sd-scripts, OneTrainer or EveryDream2.")],
    out: Annotated[
        Path | None, Argument(parser=path, metavar="OUT", help="TOML file to write (default: FILE-fastsd.toml).")
    ] = None,
) -> None:
    """Convert a config of another trainer. Prints what becomes of each key, and what has no equal."""
    from fastsd.commands.convert_config import convert_config

    convert_config(source, out)


@app.command()
def redraw(
    model: AnyModel,
    config: ConfigPath,
    out: Annotated[
        Path, Argument(parser=path, metavar="OUT", help="Output: a new folder, or that of an interrupted run of this command.")
    ],
    overrides: Overrides = None,
    start: Annotated[
        int | None,
        Option(metavar="T", help="Timestep to which latents are noised; 0 = only decode them (default: pure noise)."),
    ] = None,
    limit: Annotated[int | None, Option(min=1, metavar="N", help="Number of images to draw (default: all).")] = None,
    precision: ComputePrecision = Precision.fp32,
    device: Annotated[str, Option(help="Compute device: auto, cpu, cuda or cuda:N (default: per config).")] = "",
) -> None:
    """Make a data set by redrawing images with MODEL. Images of CONFIG are redrawn from captions or from noised latents."""
    loaded = _load(config, overrides)
    from fastsd.commands.redraw import redraw

    redraw(model, loaded, out, start, limit, precision.value, device)


@app.command()
def demo(out: Annotated[Path, Option(parser=path, help="Output folder.")] = Path("demo-out")) -> None:
    """Try the whole workflow on tiny models. Swaps the VAE, caches, trains, samples: minutes on CPU or GPU, no downloads."""
    from fastsd.demo.demo import demo

    demo(out)


def _load(path: Path, overrides: list[str] | None, precision: Precision | None = None) -> Config:
    from fastsd.config.schema import load_config

    return load_config(path, overrides, precision and precision.value)


def main() -> None:
    # When imported, diffusers and transformers print advice that does not help a user. Errors are still raised.
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    from fastsd.run.signals import signals_of_commands

    try:
        with signals_of_commands():
            app()
    except UserError as error:
        print(f"fastsd: {error}", file=sys.stderr)
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


if __name__ == "__main__":
    program()
