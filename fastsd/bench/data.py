"""`fastsd bench loader` and `fastsd bench cache`: rates from the cache to the step, and from image files to the cache.

Without a config, all data is generated, and deleted afterwards.  Latents have the shape C x h x w.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsd.bench import counters, timing
from fastsd.bench.options import BenchOptions, Figures
from fastsd.config.schema import Config, DataTable
from fastsd.data.building.build import build_cache
from fastsd.data.building.store import Store
from fastsd.data.cache import SHARD_ROWS, CacheMeta, Group, LatentCache, freeze, view_name
from fastsd.data.loader import Loader
from fastsd.data.rows import row_check
from fastsd.errors import UserError
from fastsd.model.formats.load import load_text, load_vae, locate
from fastsd.model.latent_space import SD15_SCALING_FACTOR
from fastsd.model.shapes import SD15_VAE
from fastsd.model.text_encoder import assemble, ids_of
from fastsd.model.vae import Vae
from fastsd.terminal.console import Console, counted
from fastsd.train.device import choose_device, choose_ops
from fastsd.train.precision import COMPUTE_DTYPE, precision_switches
from fastsd_kernels import Ops

ASSETS = Path(__file__).parents[1] / "demo" / "assets"
_WORDS = ("a", "photo", "of", "red", "green", "blue", "circle", "square", "star", "on", "white", "with", "soft", "light")
_RANDOM_META: dict[str, Any] = {
    "vae_hash": "made", "vae_name": "made", "scaling_factor": SD15_SCALING_FACTOR, "shift_factor": 0.0, "downscale": 8,
    "dtype": "fp16", "folders": [], "preprocessing": {}, "rejected": 0, "empty_captions": 0, "crops": 1, "flip": False,
}  # fmt: skip
_IMAGE_SIZE = (1024, 768)  # px; images from cameras and web pages are at least this large


def bench_loader(options: BenchOptions, config: Config, console: Console) -> Figures:
    """Measure samples per second from the cache to a step that only receives them."""
    if options.rate <= 0:
        raise UserError("bench-rate", f"--rate is {options.rate:g}; give the images per second that a step consumes, above 0")
    count = options.steps or (8 if options.small else 32)
    batch = config.stage[0].batch if options.config or options.changed("batch") else 32
    passes = []
    with _loader(config, batch, options) as loader:
        for i in counted("timing", range(4), "passes"):
            with loader.stream(i * count * batch, (i + 1) * count * batch, batch) as stream:
                passes.append(count * batch / counters.seconds(lambda: list(stream), torch.device("cpu")))
        row_bytes = loader.cache.get([0])["latents"].nbytes
        samples = len(loader.cache)

    # The first pass may read from the disk; later passes find the data in memory.
    table = [["", "samples/s", "MB/s", "ms per batch", f"share of a step at {options.rate:g} img/s"]]
    rows = []
    for name, speed in (("first pass", passes[0]), ("later", statistics.median(passes[1:]))):
        row = {"name": name, "samples_per_s": speed, "mb_per_s": speed * row_bytes / 1e6, "share_of_step": options.rate / speed}
        figures = [f"{speed:.4g}", f"{row['mb_per_s']:.3g}", f"{batch / speed * 1e3:.3g}", f"{row['share_of_step']:.1%}"]
        rows.append(row)
        table.append([name, *figures])
    console.table(table)
    console.echo(f"{samples} samples of {row_bytes} bytes, batch {batch}; loading runs ahead, so a step waits only above 100 %")
    settings = {"batch": batch, "batches": count, "samples": samples, "sample_bytes": row_bytes, "passes": passes}
    return torch.device("cpu"), {"settings": settings, "results": rows, "misses": []}


@contextmanager
def _loader(config: Config, batch: int, options: BenchOptions) -> Iterator[Loader]:
    """Yield the config's loader, or without a config one that reads a temporary cache."""
    stage, model = config.stage[0].model_copy(update={"batch": batch}), config.model
    with ExitStack() as stack:
        if options.config:
            text, vae = load_text(model, locate(model.base, "model.base", model.revision)), load_vae(model)
            cache = LatentCache.open(config.cache.dir, view_name(config, vae.hash))
            loader = Loader(cache, text.tokenize, config.seed, stage, data=config.data)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastsd-bench-")))
            side = config.data.resolution // 8
            cache = random_cache(folder, 256 if options.small else 8192, (4, side, side))
            loader = Loader(cache, _demo_tokenizer(), 0, stage)
        stack.callback(cache.close)
        yield loader


def _demo_tokenizer() -> Callable[[list[str]], Tensor]:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "base" / "tokenizer")
    return lambda captions: assemble(tokenizer, ids_of(tokenizer, captions), 77)


def random_cache(folder: Path, samples: int, shape: tuple[int, int, int]) -> LatentCache:
    """Write a cache of random latents and captions of 20 words to an empty folder."""
    generator = np.random.default_rng(0)
    size = int(np.prod(shape)) * 2
    captions = [" ".join(generator.choice(_WORDS, 20)).encode() for _ in range(samples)]
    return write_cache(folder, shape, (generator.bytes(size) for _ in range(samples)), captions)


def write_cache(folder: Path, shape: tuple[int, int, int], rows: Iterable[bytes], captions: list[bytes]) -> LatentCache:
    """Write a cache of given fp16 latents, one per caption, to an empty folder. A row is the bytes of one latent."""
    samples, remaining, checks = len(captions), iter(rows), list[int]()
    with Store.open(folder, create=True) as store:
        space = store.space("made", {"vae": "made"}, "fp16")
        for first in range(0, samples, SHARD_ROWS):
            count = min(SHARD_ROWS, samples - first)
            with store.transaction():
                contents = [((first + i).to_bytes(32, "big"), 0) for i in range(count)]
                store.add_shard(space, f"made-{first}", list(shape), contents)

        shards = store.shards(space)
        for shard in shards:
            shard.create()
            data = [(row, next(remaining)) for row in range(shard.rows)]
            shard.write_rows(data)
            checks += [row_check(blob) for _, blob in data]

    indices = np.arange(samples)
    arrays: dict[str, np.ndarray] = {
        "shard": (indices // SHARD_ROWS).astype(np.int32),
        "row": (indices % SHARD_ROWS).astype(np.int32),
        "check": np.array(checks, np.int64),
        "caption_offsets": np.cumsum([0, *map(len, captions)], dtype=np.int64),
        "captions": np.frombuffer(b"".join(captions), np.uint8),
    }
    freeze_random(folder, shape, arrays, [[shard.name, shard.shape] for shard in shards])
    return LatentCache.open(folder)


def freeze_random(folder: Path, shape: tuple[int, int, int], arrays: dict[str, np.ndarray], shards: list[Any]) -> None:
    """Freeze the cache view of generated latents, which all have the same shape."""
    samples = len(arrays["row"])
    meta = CacheMeta(
        **_RANDOM_META, channels=shape[0], resolution=8 * shape[1], images=samples, cached=samples, latents=samples
    )
    freeze(folder, "made", arrays, shards, [Group(shape, 0, 0, samples)], meta)


def bench_cache(options: BenchOptions, config: Config, console: Console) -> Figures:
    """Measure images per second from JPEG files to latents, by pipeline step. Time our VAE encoder in turn with diffusers'."""
    device = choose_device(config.device, console)
    ops = choose_ops(config.kernels, device)
    vae = load_vae(config.model, ops=ops) if options.config else _random_vae(ops, small=options.small)
    vae.to(device, COMPUTE_DTYPE[config.cache.precision])
    gpu = device.type == "cuda"
    count = (options.steps or 1) * (8 if options.small or not gpu else 512)
    batch = config.cache.batch if gpu or options.small or options.config else 1
    size = config.data.resolution
    console.echo(f"{counters.device_name(device)}, kernels {ops.name}, {config.cache.precision}, {size} px, batch {batch}")
    with precision_switches(config.cache.precision), tempfile.TemporaryDirectory(prefix="fastsd-bench-") as folder:
        _write_images(Path(folder) / "images", count)
        data = DataTable(folders=[str(Path(folder) / "images")], resolution=size)
        cache = config.cache.model_copy(update={"dir": str(Path(folder) / "cache"), "batch": batch})
        job = config.model_copy(update={"data": data, "cache": cache})
        images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        candidates = {"fastsd": partial(vae.encode, images), "diffusers": partial(_encode_with_diffusers, vae, images)}
        for call in candidates.values():
            call()
        order = timing.in_turns({name: (call, nullcontext) for name, call in candidates.items()}, 5, device)
        counts = build_cache(job, vae)

    times = {name: statistics.median(seconds for timed, seconds in order if timed == name) for name in candidates}
    rows: list[dict[str, Any]] = [{"name": step, "img_per_s": rate} for step, rate in counts.rates.items()]
    rows += [{"name": f"encoder, {name}", "img_per_s": batch / seconds} for name, seconds in times.items()]
    ratio = times["diffusers"] / times["fastsd"]
    console.table([["", "img/s"]] + [[row["name"], f"{row['img_per_s']:.4g}"] for row in rows])
    width, height = _IMAGE_SIZE
    console.echo(f"{count} JPEG files of {width} x {height} px; the encoder runs at {ratio:.2f}x the speed of diffusers'")
    settings = {"batch": batch, "images": count, "size": size, "precision": config.cache.precision, "kernels": ops.name}
    return device, {"settings": settings, "results": rows, "ratio": ratio, "order": order, "misses": []}


def _random_vae(ops: Ops, *, small: bool) -> Vae:
    """Return the demo's VAE if `small`, otherwise a VAE of SD1.5's shape with random weights."""
    from diffusers import AutoencoderKL

    if small:
        return Vae(AutoencoderKL.from_pretrained(ASSETS / "base" / "vae", local_files_only=True), "demo", ops)
    torch.manual_seed(0)
    return Vae(AutoencoderKL.from_config(dict(SD15_VAE)), "random weights", ops)


def _encode_with_diffusers(vae: Vae, images: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.module.encode(images.to(vae.device, vae.dtype)).latent_dist.mean


def _write_images(folder: Path, count: int) -> None:
    """Write photograph-like JPEG files: smooth colours with grain."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize(_IMAGE_SIZE, Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-8, 8, (*smooth.shape[:2], 1), dtype=np.int16)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{i:05}.jpg", quality=90)
