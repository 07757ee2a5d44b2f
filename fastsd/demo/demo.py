"""`fastsd demo`: the whole workflow in miniature, on a machine that has only Python.

A tiny model with SD1.5's architecture can draw coloured shapes. Its VAE is replaced by another one, and its samples come out
wrong. Then the user's own commands (swap-vae, cache, train, sample) align it to the new latents and retrain it. The demo ends
with one picture, the accuracies and the held-out losses. The models ship with the package (`fastsd/demo/models.py` trained
them). The training images are drawn by the demo.
"""

from __future__ import annotations

import json
import shutil
import time
import tomllib
from pathlib import Path
from typing import Any

from PIL import Image

from fastsd.commands.cache import cache
from fastsd.commands.swap_vae import swap_vae
from fastsd.config.schema import Config, ModelTable, load_config
from fastsd.demo import world
from fastsd.errors import UserError
from fastsd.run.folder import read_rows
from fastsd.run.loop import train
from fastsd.run.restart import lock
from fastsd.sampling.generate import generate, load_to_sample
from fastsd.storage import copy_file, make_folder, new_file, replace_file
from fastsd.terminal.console import STDOUT, Console

MODELS = Path(__file__).parent / "assets"
PICTURES, PICTURE_SEED = 384, 1
SEEDS = (0, 1)  # each of the 48 prompts is drawn with both seeds
SHOWN = 6  # samples in a panel of the final picture
ALIGNMENT_IMAGES = 32  # for the fits of `fastsd swap-vae`


def demo(out: Path, console: Console = STDOUT) -> dict[str, float]:
    """Run the demo in `out`. Return the accuracies, the losses and the seconds it took, and write them to result.json.

    Raises:
        UserError: another demo runs in `out`, or it has a run of another config.
    """
    make_folder(out)
    with lock(out):
        return _run(out, console)


def _run(out: Path, console: Console) -> dict[str, float]:
    start_time = time.perf_counter()
    config = _lay_out(out, console)
    base, vae, aligned = str(out / "models" / "base"), str(out / "models" / "vae"), Path(config.model.base)
    base_share, base_images = _draw(config, ModelTable(base=base))
    console.echo(f"base model: {base_share:.0%} of {len(base_images)} samples show the requested colour and shape")
    swapped_share, swapped_images = _draw(config, ModelTable(base=base, vae=vae))
    console.echo(f"base model with another VAE: {swapped_share:.0%}\n")

    if not aligned.exists():  # an earlier start may have written it
        console.echo(f"$ fastsd swap-vae {base} {vae} {aligned} --images {out / 'images'} --limit {ALIGNMENT_IMAGES}")
        swap_vae(base, vae, aligned, out / "images", limit=ALIGNMENT_IMAGES, device=config.device, console=console)
    aligned_share, aligned_images = _draw(config, ModelTable(base=str(aligned)))
    console.echo(f"aligned model, before training: {aligned_share:.0%}\n")

    console.echo(f"$ fastsd cache {out / 'demo.toml'}")
    cache(config, console)
    console.echo(f"\n$ fastsd train {out / 'demo.toml'}")
    train(config, console)
    model = Path(config.run) / "model"
    console.echo(f"\n$ fastsd sample {model} --prompt ...")
    trained_share, trained_images = _draw(config, ModelTable(base=str(model)))
    columns = (swapped_share, swapped_images), (aligned_share, aligned_images), (trained_share, trained_images)
    _picture(out / "demo.png", (base_share, base_images), *columns)
    losses = [row["loss"] for row in read_rows(Path(config.run) / "validation.jsonl", {"loss": float})]
    result = {"base": base_share, "before": swapped_share, "aligned": aligned_share, "after": trained_share}
    result |= {"loss_before_training": losses[0], "loss": losses[-1], "samples": len(trained_images)}
    result["seconds"] = round(time.perf_counter() - start_time, 1)
    replace_file(out / "result.json", json.dumps(result) + "\n")
    shares = f"{base_share:.0%} base, {swapped_share:.0%} with the VAE swapped, {aligned_share:.0%} aligned"
    console.echo(f"\ncorrect colour and shape: {shares}, {trained_share:.0%} retrained ({len(trained_images)} samples each)")
    change = f"{losses[0]:.4f} aligned, {losses[-1]:.4f} retrained ({losses[-1] / losses[0] - 1:+.0%})"
    console.echo(f"loss on images that were not trained on: {change}; {result['seconds']:.0f} s in all")
    console.echo(f"picture: {out / 'demo.png'}")
    return result


def _lay_out(out: Path, console: Console) -> Config:
    """Write the models, the training images and the config into `out`. Return the config.

    Raises:
        UserError: `out` has a run of another config, such as that of another version of fastsd.
    """
    text, path = _config_file().read_text(encoding="utf-8").replace("demo-out", out.as_posix()), out / "demo.toml"
    if path.exists() and (out / "run").exists() and _job(path.read_text(encoding="utf-8")) != _job(text):
        raise UserError(
            "demo-other-config", f"{out} has a demo with another demo.toml; delete the folder, or name another one with --out"
        )
    shutil.copytree(MODELS, out / "models", copy_function=_copy, dirs_exist_ok=True)
    world.write_dataset(out / "images", PICTURES, PICTURE_SEED)
    replace_file(path, text)
    console.echo(f"{PICTURES} captioned images in {out / 'images'}; a tiny SD1.5 and another VAE in {out / 'models'}")
    return load_config(path)


def _job(text: str) -> tuple[list[dict[str, Any]], set[str]] | None:
    """Return what a run of a config cannot change: its stages, and which models it names. None if it is no TOML."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
    return tables.get("stage", []), set(tables.get("model", {}))


def _copy(source: str, target: str) -> None:
    with new_file(Path(target)) as temporary:
        copy_file(Path(source), temporary)


def _config_file() -> Path:
    """Return configs/demo.toml of the checkout, or its copy in an installed wheel."""
    folder = Path(__file__).parent
    return next(path for path in (folder.parent.parent / "configs" / "demo.toml", folder / "demo.toml") if path.exists())


def _draw(config: Config, table: ModelTable) -> tuple[float, list[Image.Image]]:
    """Draw every prompt with every seed. Return the share of images with the right colour and shape, and the images."""
    model = load_to_sample(table, config.device)
    requests = [(colour, shape, prompt, seed) for seed in SEEDS for colour, shape, prompt in world.prompts()]
    size = config.data.resolution
    images = generate(model, [prompt for _, _, prompt, _ in requests], [seed for *_, seed in requests], config.sample, size)
    correct = [world.judge(image) == (colour, shape) for image, (colour, shape, _, _) in zip(images, requests, strict=True)]
    return sum(correct) / len(correct), images


def _picture(path: Path, *columns: tuple[float, list[Image.Image]]) -> None:
    titles = ("base", "VAE swapped", "aligned", "retrained")
    panels = [(f"{title}  {share:.0%}", images[:SHOWN]) for title, (share, images) in zip(titles, columns, strict=True)]
    with new_file(path) as temporary:
        world.picture(panels, [prompt for _, _, prompt in world.prompts()[:SHOWN]]).save(temporary, "PNG")
