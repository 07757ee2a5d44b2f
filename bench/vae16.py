"""Training steps until a UNet of 4 latent channels draws with a VAE of 16, from three starts.

    python bench/vae16.py --folder DIR [--starts aligned repeated zeroed] [--seeds 0 1 2] [--steps 200] [--out bench/results]

aligned    `fastsd swap-vae --images`: all fits, and the best by its loss on images that did not determine it
repeated   the rows of the first and the last convolution are repeated. The first one's are halved, so that white noise in 16
           channels is white noise of unit variance in the base's 4
zeroed     the new channels' rows are zero, as `fastsd swap-vae` does without images

Each is trained with the demo's images, noise and order, by Lion at 1e-4. At some of the steps, the script measures the loss on
32 held-out images, and how many of 48 samples show the requested colour and shape. The result is the steps until 90 % do.
Several calls may share DIR, each with other starts or seeds: complete runs are not repeated, and the result has all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from alignment import QUIET, TARGET_ACCURACY, first, losses
from PIL import Image

from fastsd.bench.counters import stamp
from fastsd.commands.cache import cache
from fastsd.commands.swap_vae import swap_vae
from fastsd.config.schema import Config, ModelTable, load_config
from fastsd.demo import demo, world
from fastsd.model import align
from fastsd.model.formats.load import component_state_dict, load_model, write_component
from fastsd.sampling.generate import generate, load_to_sample
from fastsd.storage import new_file, replace_file

STARTS = ("aligned", "repeated", "zeroed")
SHOWN_STEPS, SHOWN = (0, 50, 200), 6


def repeat_rows(folder: Path, base: Path) -> None:
    """Overwrite the UNet of a model with 16 channels by one whose edge layers repeat those of a base with 4."""
    model, layers = load_model(ModelTable(base=str(folder))), align.edge_layers(load_model(ModelTable(base=str(base))).unet)
    copies = model.vae.channels // layers["conv_out.bias"].numel()
    repeated = {
        "conv_in.weight": layers["conv_in.weight"].repeat(1, copies, 1, 1) / copies**0.5,
        "conv_out.weight": layers["conv_out.weight"].repeat(copies, 1, 1, 1),
        "conv_out.bias": layers["conv_out.bias"].repeat(copies),
    }
    align.put(model.unet, layers | repeated)
    write_component(folder, model, "unet", component_state_dict(model, "unet"))


def make_starts(folder: Path, starts: list[str]) -> dict[str, Any]:
    """Write the models to start from, unless an earlier call has. Return the record of the alignment."""
    demo._lay_out(folder, QUIET)
    base, vae = folder / "models" / "base", folder / "models" / "vae16"
    world.write_dataset(folder / "others", 256, seed=9)
    for start in starts:
        if (folder / start).exists():
            continue
        swap_vae(str(base), str(vae), folder / start, folder / "others" if start == "aligned" else None)
        if start == "repeated":
            repeat_rows(folder / start, base)
    record = folder / "aligned" / "swap.json"
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}


def config_of(folder: Path, start: str, seed: int, steps: int, every: int) -> Config:
    overrides = [f"model.base={folder / start}", "model.vae=", f"run={folder / 'runs' / f'{start}-{seed}'}", f"seed={seed}"]
    overrides += [f"cache.dir={folder / 'cache'}", "sample.prompts=[]", "log.tensorboard=false", "validate.held_out=32"]
    overrides += [f"validate.every={every}", f"stage.until={steps}", "stage.optimizer=lion", "stage.lr=1e-4", "stage.warmup=0"]
    overrides += ["stage.sample_every=0", f"stage.checkpoint_every={every}", "stage.keep_checkpoints=1000"]
    config = load_config(folder / "demo.toml", overrides)
    return config.model_copy(update={"stage": config.stage[:1]})


def draw(config: Config, step: int) -> tuple[float, list[Image.Image]]:
    """Draw every prompt after a step, each with its own noise. Return the fraction of correct samples, and the samples."""
    checkpoint = Path(config.run) / "checkpoints" / f"step-{step:08d}"
    model = load_to_sample(ModelTable(base=str(checkpoint) if step else config.model.base), config.device)
    requests = world.prompts()
    seeds = list(range(len(requests)))
    images = generate(model, [prompt for *_, prompt in requests], seeds, config.sample, config.data.resolution)
    correct = [world.judge(image) == (colour, shape) for image, (colour, shape, _) in zip(images, requests, strict=True)]
    return sum(correct) / len(correct), images


def measure(config: Config, steps: list[int], pictures: Path) -> None:
    """Train from one start, and draw after some of the steps, until 90 % of the samples are correct. Keep the pictures."""
    run = Path(config.run)
    stored = run / "accuracy.json"
    if not stored.exists():
        loss_by_step, accuracy_by_step = losses(config), dict[int, float]()
        for step in steps:
            if step in SHOWN_STEPS or max(accuracy_by_step.values(), default=0.0) < TARGET_ACCURACY:
                accuracy_by_step[step], images = draw(config, step)
                title = f"{run.name.rpartition('-')[0]}, step {step}: {accuracy_by_step[step]:.0%}"
                prompts = [prompt for *_, prompt in world.prompts()[:SHOWN]]
                with new_file(pictures / f"{run.name}-{step:04d}.png") as temporary:
                    world.picture([(title, images[:SHOWN])], prompts).save(temporary, "PNG")
                print(run.name, title, f"loss {loss_by_step.get(step, float('nan')):.4f}", flush=True)
        replace_file(stored, json.dumps({"accuracy": accuracy_by_step, "loss": loss_by_step}))


def complete_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the figures of all complete runs, by start and seed."""
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/accuracy.json")):
        start, _, seed = path.parent.name.rpartition("-")
        figures = json.loads(path.read_text(encoding="utf-8"))
        accuracy_by_step = {int(step): value for step, value in figures["accuracy"].items()}
        reached = first(accuracy_by_step, lambda value: value >= TARGET_ACCURACY)
        runs.setdefault(start, {})[seed] = {"steps_to_accuracy": reached, **figures}
    return runs


def sheet(pictures: Path, starts: list[str], seed: int, path: Path) -> None:
    """Save the pictures of one seed: a row for each start, a column for each of the steps that are shown."""
    rows = [[Image.open(pictures / f"{start}-{seed}-{step:04d}.png") for step in SHOWN_STEPS] for start in starts]
    width, height = rows[0][0].size
    whole = Image.new("RGB", (width * len(SHOWN_STEPS), height * len(rows)))
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            whole.paste(image, (j * width, i * height))
    with new_file(path) as temporary:
        whole.save(temporary, "PNG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results and a sheet of pictures")
    parser.add_argument("--folder", type=Path, required=True, help="for models, runs and pictures")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=25)
    args = parser.parse_args()
    (args.folder / "pictures").mkdir(parents=True, exist_ok=True)
    record = make_starts(args.folder, args.starts)
    steps = sorted({*range(0, args.steps + 1, args.every), *(step for step in SHOWN_STEPS if step <= args.steps)})
    cache(config_of(args.folder, args.starts[0], 0, args.steps, args.every), QUIET)
    fits = {name: {key: fit.get(key) for key in ("loss", "se", "r2")} for name, fit in record.get("fits", {}).items()}
    result: dict[str, Any] = {
        "what": "4 to 16 latent channels on the demo, from three starts",
        "steps": args.steps,
        "fits": fits,
    }
    result |= {"threads": torch.get_num_threads(), "stamp": stamp(torch.device("cpu"))}
    for seed, start in itertools.product(args.seeds, args.starts):
        config = config_of(args.folder, start, seed, args.steps, args.every)
        measure(config, steps, args.folder / "pictures")
        if args.out:
            result["runs"] = complete_runs(args.folder / "runs")
            replace_file(args.out / "vae16-cpu.json", json.dumps(result, indent=1) + "\n")
    if args.out and args.steps >= max(SHOWN_STEPS):
        sheet(args.folder / "pictures", args.starts, args.seeds[0], args.out / "vae16.png")


if __name__ == "__main__":
    main()
