"""Folders of runs that nobody has trained: logs, validation rows and sample grids with given numbers."""

import json

from PIL import Image

from fastsd.config.schema import SampleTable
from fastsd.sampling.grid import grid
from fastsd.sampling.prompts import images_of

STAGE = '[[stage]]\nname = "unet"\ntrain = ["unet"]\nuntil = 4\nbatch = 2\noptimizer = "lion"\nlr = 1e-3\n'
STAGE += "sample_every = 2\ncheckpoint_every = 2\n"
TEXT_STAGE = STAGE.replace("unet", "text").replace('["text"]', '["text_encoder"]')


def row(step: int, stage: str = "unet", **more) -> dict:
    loss = 0.5 / step + 0.1
    hashes = {"order": f"o{step}", "timesteps": f"t{step}", "noise": f"n{step}"}
    return {"step": step, "stage": stage, "images": 4 * step, "epoch": step / 5, "lr": 1e-3, "loss": loss, **hashes, **more}


def validation_row(step: int, loss: float, image_set: str = "held_out", weights: str = "raw") -> dict:
    bands = [[250 * b, 250 * b + 250, loss + b / 100, 0.02] for b in range(4)]
    measurement = {"set": image_set, "weights": weights, "loss": loss, "se": 0.01, "bands": bands}
    return {"step": step, "images": 4 * step, "stage": "unet", **measurement}


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


def plain_images(shades: list[int]) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), (shade, 0, 255 - shade)) for shade in shades]


def plain_grid(shades: list[int], prompts: list[str], seed: int = 0) -> Image.Image:
    table = SampleTable(prompts=prompts, seed=seed)
    return grid(plain_images(shades), images_of(table, 32), table.images)
