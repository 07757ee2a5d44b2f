"""Storage, read rates and caching time of data sets that several GPUs train on. Used by `fastsd plan --gpus`.

The bytes of an image are its latents, padded shards and all, and its rows in the index and the database. Reading is what the
loaders take at the predicted speed; the order is random, so no image is read twice in an epoch. Caching is the VAE's encoder
on each GPU, predicted from its operations as a training step is (`step_time.py`). Decoding images is left to the cores of the
machines, which must keep up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastsd.config.schema import Config
from fastsd.model.shapes import Shapes
from fastsd.plan.figures import duration_text, range_text
from fastsd.plan.rehearsal import encoding_operations
from fastsd.plan.step_time import step_seconds
from fastsd.terminal.console import Console, work
from fastsd.terminal.texts import size_text
from fastsd_kernels import Ops
from fastsd_kernels.cards import Card

IMAGES = (12_000_000, 400_000_000)  # CC12M, LAION-400M
# Bytes in the database and the index of a view, with a path and a caption of some 50 letters each. Counted in a cache of 3,000
# images; `tests/plan/test_large_data.py` compares with another one.
ROW = 430


def describe_data(
    config: Config,
    shapes: Shapes,
    side: int,
    latent_bytes: int,
    speeds: Sequence[Mapping[str, Sequence[float]]],
    cards: Sequence[Card],
    gpus: int,
    ops: Ops,
) -> dict[str, Any]:
    """Describe the data as JSON, with sizes in bytes, rates in bytes per second and times in seconds.

    Args:
        side: of the latents.
        latent_bytes: bytes of an image in the shards.
        speeds: images per second of all GPUs, (slowest, fastest), by card, of each stage.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.cache.precision]
    with work("rehearsing the VAE's encoder"):
        operations = encoding_operations(shapes, side, config.cache.batch, dtype, ops)
    image_bytes = latent_bytes + ROW
    data: dict[str, Any] = {"workers": gpus, "bytes_an_image": image_bytes, "cards": {}}
    data["cache"] = {str(images): images * image_bytes for images in IMAGES}
    for card in cards:
        fewest, most = step_seconds(operations, card, config.cache.precision)
        rates = [config.cache.batch / most, config.cache.batch / fewest]
        read = max(stage[card.name][1] for stage in speeds) * latent_bytes
        row: dict[str, Any] = {"encoded_a_gpu": rates, "read": read, "read_a_gpu": read / gpus}
        row["seconds"] = {str(images): [images / gpus / rate for rate in rates[::-1]] for images in IMAGES}
        data["cards"][card.name] = row
    return data


def print_data(data: dict[str, Any], console: Console) -> None:
    """Print what `describe_data` returns."""
    sizes = [f"{int(images) // 10**6} million images {size_text(size)}" for images, size in data["cache"].items()]
    console.echo(f"\ndata       cache of {', '.join(sizes)}: {data['bytes_an_image'] / 1024:.1f} KiB each, with the index")
    workers = data["workers"]
    console.echo(f"           {workers} worker{'s' * (workers > 1)}, one per GPU, cache them if the cores decode as fast")
    columns = [f"cached, {images // 10**6} M" for images in IMAGES]
    console.echo(f"  {'predicted':<12}{'images/s a GPU':>16}" + "".join(f"{c:>16}" for c in columns) + "   read in all, a GPU")
    for card, row in data["cards"].items():
        times = "".join(f"{duration_text(*row['seconds'][str(images)]):>16}" for images in IMAGES)
        read = f"{size_text(row['read'])}/s, {size_text(row['read_a_gpu'])}/s"
        console.echo(f"  {card:<12}{range_text(row['encoded_a_gpu']):>16}{times}   {read}")
