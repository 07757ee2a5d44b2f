"""Training steps saved by an aligned start, on the demo's pair of VAEs.

    python bench/alignment.py [--ways lion staged] [--seeds 0 1 2] [--out bench/results]

`fastsd swap-vae` makes two models to start from: a plain one without images, and one aligned with 256 images that are not in
the training set. Both are trained with the same config, images, noise and order, in two ways: 250 steps of Lion, or 700
steps of D-Lion and Lion in three stages. Every 25 steps, the script measures the loss on 32 held-out
images, and how many of 96 samples show the requested colour and shape. The results are the steps until 90 % of the samples do,
and the steps until the final loss of the plain start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from plain_swap import plain_swap

from fastsd.bench.counters import stamp
from fastsd.commands.cache import cache
from fastsd.commands.swap_vae import swap_vae
from fastsd.config.schema import Config, ModelTable, load_config
from fastsd.demo import demo, world
from fastsd.run.loop import train
from fastsd.storage import new_file, replace_file
from fastsd.terminal.console import Console

EVERY, TARGET_ACCURACY = 25, 0.9
STARTS = ("plain", "aligned")
NUM_PROMPTS, SAMPLE_STEPS = 6, (0, 50, 200)
QUIET = Console(file=StringIO())
# Stages, as settings that override those of `plain_swap`.
WAYS: dict[str, list[dict[str, Any]]] = {
    "lion": [{"optimizer": "lion", "lr": 1e-4, "until": 250, "warmup": 0}],
    "staged": [
        {"name": "unet", "until": 400},
        {"name": "finer", "optimizer": "lion", "lr": 1e-4, "warmup": 0, "until": 200},
        {"name": "finest", "optimizer": "lion", "lr": 3e-5, "warmup": 0, "until": 100},
    ],
}


def config_of(folder: Path, way: str, start: str, seed: int) -> Config:
    run = folder / "runs" / f"{way}-{start}-{seed}"
    overrides = [f"model.base={folder / start}", "model.vae=", f"run={run}", f"seed={seed}"]
    overrides += ["sample.prompts=[]", "log.tensorboard=false", "validate.held_out=32", f"validate.every={EVERY}"]
    overrides += ["stage.sample_every=0", f"stage.checkpoint_every={EVERY}", "stage.keep_checkpoints=1000"]
    config = load_config(folder / "demo.toml", [*plain_swap(folder), *overrides])
    stages = [config.stage[0].model_copy(update=changes) for changes in WAYS[way]]
    return config.model_copy(update={"stage": stages})


def losses(config: Config) -> dict[int, float]:
    """Train, and return the validation loss by step."""
    train(config, QUIET, export=False)
    rows = map(json.loads, (Path(config.run) / "validation.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows}


def sample(config: Config, step: int) -> tuple[float, list[Image.Image]]:
    """Draw samples after a step. Return the fraction of them that match their prompt, and the samples."""
    checkpoint = Path(config.run) / "checkpoints" / f"step-{step:08d}"
    return demo._draw(config, ModelTable(base=str(checkpoint) if step else config.model.base))


def accuracies(config: Config, steps: list[int]) -> dict[int, float]:
    """Return the accuracy by step, up to the first step that reaches the target."""
    accuracy_by_step: dict[int, float] = {}
    for step in steps:
        accuracy_by_step[step] = sample(config, step)[0]
        if accuracy_by_step[step] >= TARGET_ACCURACY:
            break
    return accuracy_by_step


def first(values: dict[int, float], predicate: Any) -> int | None:
    return next((step for step, value in sorted(values.items()) if predicate(value)), None)


def compare_starts(folder: Path, way: str, seed: int) -> dict[str, Any]:
    configs = {start: config_of(folder, way, start, seed) for start in STARTS}
    loss_curves = {start: losses(config) for start, config in configs.items()}
    accuracy_curves = {start: accuracies(config, sorted(loss_curves[start])) for start, config in configs.items()}
    target_loss = loss_curves["plain"][max(loss_curves["plain"])]
    result = {
        "steps_to_accuracy": {start: first(accuracy_curves[start], lambda value: value >= TARGET_ACCURACY) for start in STARTS},
        "steps_to_loss": {start: first(loss_curves[start], lambda value: value <= target_loss) for start in STARTS},
        "mark": target_loss,
        "loss": loss_curves,
        "accuracy": accuracy_curves,
    }
    print(way, seed, json.dumps({key: result[key] for key in ("steps_to_accuracy", "steps_to_loss", "mark")}), flush=True)
    return result


def picture(folder: Path, way: str, seed: int, path: Path) -> None:
    """Save a picture of samples at three steps, with the plain start above the aligned one."""
    prompts = [prompt for *_, prompt in world.prompts()[:NUM_PROMPTS]]
    rows = []
    for start in STARTS:
        config = config_of(folder, way, start, seed)
        panels = [(step, *sample(config, step)) for step in SAMPLE_STEPS]
        titles = [(f"{start}, step {step}: {accuracy:.0%}", images[:NUM_PROMPTS]) for step, accuracy, images in panels]
        rows.append(world.picture(titles, prompts))
    sheet = Image.new("RGB", (rows[0].width, 2 * rows[0].height))
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * row.height))
    with new_file(path) as temporary:
        sheet.save(temporary, "PNG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        demo._lay_out(folder, QUIET)
        base, vae = str(folder / "models" / "base"), str(folder / "models" / "vae")
        world.write_dataset(folder / "others", 256, seed=9)
        swap_vae(base, vae, folder / "plain", console=QUIET)
        aligned = swap_vae(base, vae, folder / "aligned", folder / "others")
        cache(config_of(folder, args.ways[0], "plain", 0), QUIET)
        ways: dict[str, dict[int, Any]] = {way: {} for way in args.ways}
        result: dict[str, Any] = {"what": "training from an aligned start beside a plain one, on the demo's pair of VAEs"}
        result |= {"fits": aligned["fits"], "taken": aligned["fit"], "ways": ways}
        result |= {"threads": torch.get_num_threads(), "stamp": stamp(torch.device("cpu"))}

        for way, seed in itertools.product(args.ways, args.seeds):
            ways[way][seed] = compare_starts(folder, way, seed)
            replace_file(args.out / "alignment-cpu.json", json.dumps(result, indent=1) + "\n")
            if (way, seed) == (args.ways[0], args.seeds[0]):
                picture(folder, way, seed, args.out / "alignment.png")


if __name__ == "__main__":
    main()
