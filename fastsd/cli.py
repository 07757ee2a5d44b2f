"""The command line: parses arguments, calls a command (which imports torch), and prints a `UserError` as one sentence.

Exit codes: 0 done, 1 our fault (with a traceback), 2 the user must change something, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastsd.errors import Stopped, UserError

if TYPE_CHECKING:
    from fastsd.config.schema import Config

app = typer.Typer(
    help="Retrain Stable Diffusion 1.5, with another VAE swapped in, on one GPU.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip


class Precision(StrEnum):
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


class Dtype(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Form(StrEnum):
    diffusers = "diffusers"
    single_file = "single-file"
    lora_kohya = "lora-kohya"
    lora_peft = "lora-peft"


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file, see configs/.")]
Stages = Annotated[Precision | None, typer.Option("--precision", help="Of every stage.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Replace values: stage.0.batch=8")]

BenchWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[WHAT] [CONFIG] [key=value ...]", help="WHAT: step, memory, kernels, optim, loader or cache; step if left out."
    ),
]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    precision: Stages = None,
) -> None:
    """Train the stages of CONFIG. Run the same command again to resume."""
    loaded = _load(config, overrides, precision)
    from fastsd.run.loop import train

    train(loaded)


@app.command()
def cache(
    config: ConfigPath,
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of every stored latent.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Delete shards that nothing uses any more.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Count what is there.")] = False,
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
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Diffusers folder, single file, run or checkpoint.")],
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images and their grid.")] = Path("samples"),
    images: Annotated[int, typer.Option(min=1, help="Images a prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image of each prompt.")] = 0,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance: Annotated[float, typer.Option(min=0.0, help="Classifier-free guidance; 1 is off.")] = 7.0,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    sampler: Annotated[str, typer.Option(help="ddim, euler, euler_a or dpm++")] = "dpm++",
    size: Annotated[int, typer.Option(min=0, help="Pixels a side; 0 is the model's own.")] = 0,
    vae: Annotated[str, typer.Option(help="Decode with this VAE instead of the model's.")] = "",
    vae_scaling_factor: Annotated[float | None, typer.Option(help="For a VAE that is a single file.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id, for a single file.")] = "",
    clip_skip: Annotated[int, typer.Option(min=0)] = 0,
    precision: Annotated[Precision, typer.Option()] = Precision.fp32,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Generate images from prompts with MODEL."""
    from fastsd.commands.sample import sample

    table = {
        "prompts": prompt or [], "prompts_file": str(prompts or ""), "images": images, "seed": seed, "steps": steps,
        "guidance": guidance, "negative": negative, "sampler": sampler, "size": size,
    }  # fmt: skip
    source = {
        "base": model, "vae": vae, "vae_scaling_factor": vae_scaling_factor, "tokenizer": tokenizer, "clip_skip": clip_skip,
    }  # fmt: skip
    sample(source, table, out, precision.value, device)


@app.command()
def validate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Diffusers folder, single file, run or checkpoint.")],
    config: ConfigPath,
    overrides: Overrides = None,
    precision: Annotated[Precision | None, typer.Option(help="That of CONFIG's last stage if left out.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the rows there as well.")] = None,
) -> None:
    """Measure the validation loss of MODEL. The images are the held-out and the stabilised ones of CONFIG."""
    loaded = _load(config, overrides, precision)
    from fastsd.commands.validate import validate

    validate(model, loaded, json_file)


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    precision: Stages = None,
) -> None:
    """Find every problem of CONFIG before the long run."""
    loaded = _load(config, overrides, precision)
    from fastsd.commands.check import check

    check(loaded)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    precision: Stages = None,
    vram: Annotated[float | None, typer.Option(metavar="GB", help="Memory of the card; 24 if no card is named.")] = None,
    card: Annotated[str, typer.Option(metavar="NAME", help="Estimates for this one only, for example 4090.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything there as well.")] = None,
) -> None:
    """Estimate memory, time and disk space from CONFIG alone. Shows which GPU it fits, and with which micro-batch."""
    loaded = _load(config, overrides, precision)
    from fastsd.plan.plan import plan

    plan(loaded, vram, card, json_file)


@app.command()
def bench(
    words: BenchWords = None,
    precision: Stages = None,
    small: Annotated[bool, typer.Option("--small", help="A tiny model: shows in seconds that everything runs.")] = False,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels a side; 512 without a config.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a step.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Images a forward.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="dlion, lion or adamw")] = None,
    peers: Annotated[str | None, typer.Option(help="diffusers,compiled,dadaptation,lion-pytorch; or none")] = None,
    graph: Annotated[bool | None, typer.Option("--graph/--no-graph", help="The step as a CUDA graph.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Rounds to time; batches of the loader.")] = None,
    fraction: Annotated[float | None, typer.Option(help="optim: share of the UNet's tensors.")] = None,
    rate: Annotated[float, typer.Option(help="loader: images a second of the step it feeds.")] = 10.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything there as well.")] = None,
) -> None:
    """Benchmark the training step beside baselines. WHAT selects its memory, kernels, optimizers, loader or cache instead."""
    from fastsd.bench.suites import bench

    options = {"size": size, "batch": batch, "micro_batch": micro_batch, "optimizer": optimizer, "graph": graph}
    bench(
        words or [], json_file, options, precision=precision and precision.value, small=small, peers=peers, steps=steps,
        fraction=fraction, rate=rate,
    )  # fmt: skip


@app.command()
def compare(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN ...", help="Folders of runs.")] = None,
    out: Annotated[Path, typer.Option(help="The page; its pictures go into a folder beside it.")] = Path("report.html"),
    baseline: Annotated[str, typer.Option(metavar="RUN", help="What others are measured against; the first if left out.")] = "",
    draw: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=a,b,c", help="Draw the finished models anew, each way: clip_skip=0,1,2."),
    ] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Draw anew from every checkpoint that was kept.")] = False,
) -> None:
    """Compare runs on one HTML page. It shows settings, curves, samples, cost, and differences from a baseline."""
    from fastsd.compare.compare import compare

    compare(runs or [], out, baseline, draw or [], from_checkpoints=checkpoints)


@app.command()
def sweep(
    config: ConfigPath,
    values: Annotated[
        list[str] | None, typer.Argument(metavar="key=a,b,c ...", help="Swept; key=value is the same in all runs.")
    ] = None,
    precision: Stages = None,
    baseline: Annotated[str, typer.Option(metavar="NAME", help="Run that others are measured against; the config's own.")] = "",
) -> None:
    """Train runs that differ only in these values, and compare them. Run the same command again to resume."""
    from fastsd.compare.sweep import sweep

    sweep(config, values or [], precision and precision.value, baseline)


@app.command(name="lr-probe")
def lr_probe(
    config: ConfigPath,
    overrides: Overrides = None,
    precision: Stages = None,
    steps: Annotated[int, typer.Option(min=40, help="Of the short D-Lion run.")] = 400,
    stage: Annotated[str, typer.Option(metavar="NAME", help="The stage to probe; the first if left out.")] = "",
) -> None:
    """Find a learning rate for Lion with a short D-Lion run."""
    loaded = _load(config, overrides, precision)
    from fastsd.commands.lr_probe import lr_probe

    lr_probe(loaded, steps, stage)


@app.command(name="long-clip")
def long_clip(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Diffusers folder, single file or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new diffusers folder.")],
    tokens: Annotated[int, typer.Option(min=1, help="Positions the text encoder will have.")] = 248,
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id, for a single file.")] = "",
) -> None:
    """Stretch the text encoder of BASE for long captions. Long-CLIP does the same before its training."""
    from fastsd.commands.long_clip import long_clip

    long_clip(base, out, tokens, tokenizer)


@app.command(name="swap-vae")
def swap_vae(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Diffusers folder, single file or hub id.")],
    vae: Annotated[str, typer.Argument(metavar="VAE", help="The same, or a VAE alone.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new diffusers folder.")],
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Align the UNet to the new latents by these.")] = None,
    limit: Annotated[int, typer.Option(min=8, metavar="N", help="Images to look at.")] = 256,
    fit: Annotated[str, typer.Option(help="plain, orthogonal, affine or kernel; that of the smallest loss if left out.")] = "",
    vae_scaling_factor: Annotated[float | None, typer.Option(help="For a VAE that is a single file.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id, for a single file.")] = "",
    resolution: Annotated[int, typer.Option(min=0, help="Pixels a side; 0 is the model's own.")] = 0,
    precision: Annotated[Precision, typer.Option(help="To measure in; written is fp32.")] = Precision.fp32,
    device: Annotated[str, typer.Option()] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Which images, noise and timesteps.")] = 0,
) -> None:
    """Replace the VAE of BASE. With --images, the UNet is aligned to the new latents before any training."""
    from fastsd.commands.swap_vae import swap_vae

    swap_vae(
        base, vae, out, images, fit, limit, resolution, vae_scaling_factor, tokenizer, precision.value, device, seed
    )  # fmt: skip


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Folder, hub id, .safetensors, .ckpt, LoRA, run or checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or a new .safetensors file.")],
    to: Annotated[Form | None, typer.Option(help="As the ending of OUT says if left out.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; as they are if left out.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights.")] = False,
    fold: Annotated[bool, typer.Option("--fold/--no-fold", help="Single file: make the VAE one of factor 0.18215.")] = True,
    variant: Annotated[str, typer.Option(metavar="WORD", help="diffusers: in the weights' names, for example fp16.")] = "",
    shard: Annotated[float, typer.Option(metavar="GB", min=0.0, help="diffusers: begin another file above this size.")] = 0.0,
    vae: Annotated[str, typer.Option(help="In place of the model's own.")] = "",
    vae_scaling_factor: Annotated[float | None, typer.Option(help="For a VAE that is a single file.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id, for a single file.")] = "",
    revision: Annotated[str, typer.Option(help="Of a hub id.")] = "",
) -> None:
    """Convert a model to another format. Writes a diffusers folder, a single file, or a LoRA with kohya or PEFT names."""
    from fastsd.commands.convert import ConvertOptions, convert

    options = ConvertOptions(
        dtype=dtype.value if dtype else "", ema=ema, fold=fold, variant=variant, shard=shard, vae=vae,
        vae_scaling_factor=vae_scaling_factor, tokenizer=tokenizer, revision=revision,
    )  # fmt: skip
    convert(source, out, to.value if to else "", options)


@app.command()
def redraw(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Diffusers folder, single file, run or checkpoint.")],
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or one that the same line has begun.")],
    overrides: Overrides = None,
    start: Annotated[int | None, typer.Option(metavar="T", help="Timestep of the noise on each image; 0 only decodes.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N images.")] = None,
    precision: Annotated[Precision, typer.Option()] = Precision.fp32,
    device: Annotated[str, typer.Option(help="The config's if left out.")] = "",
) -> None:
    """Make a data set by redrawing images with MODEL. Images of CONFIG are redrawn from captions or from noised latents."""
    loaded = _load(config, overrides)
    from fastsd.commands.redraw import redraw

    redraw(model, loaded, out, start, limit, precision.value, device)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("demo-out"),
) -> None:
    """Try the whole workflow on tiny models. Swaps the VAE, caches, trains, samples: minutes on CPU or GPU, no downloads."""
    from fastsd.demo.demo import demo

    demo(out)


def _load(path: Path, overrides: list[str] | None, precision: Precision | None = None) -> Config:
    from fastsd.config.schema import load_config

    return load_config(path, overrides, precision and precision.value)


def main() -> None:
    # diffusers and transformers print advice on import that the user cannot act on; errors still raise.
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    try:
        app()
    except UserError as error:
        print(f"fastsd: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"fastsd: {stopped}; the same line again goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
