"""Measure the latent cache at scale: many files, kill -9, ten million rows, random reads compared with one file per image.

    python bench/cache.py [--only files kills rows reads] [--small] [--folder DIR] [--json FILE]

    files   encode 20,000 JPEG and PNG files of mixed sizes with the demo's VAE, run again, run after edits: speed of each step
    kills   cache 2,000 images with kill -9 at 200 random moments; a last run must write the same shards as without kills
    rows    open ten million samples in sparse shards: seconds to open, seconds to the first batch, memory; two world sizes
    reads   read random batches of 64 from 4 GB of 512 px latents, and from .npz and torch.save files per image, warm and cold

Needs about 20 GB of disk. Correctness is asserted; speeds are printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsd.bench import counters
from fastsd.bench.data import freeze_random, write_cache
from fastsd.commands.cache import cache
from fastsd.config.schema import Config, StageTable, parse_config
from fastsd.data.building.build import build_cache
from fastsd.data.building.store import Store
from fastsd.data.building.upkeep import verify
from fastsd.data.cache import SHARD_ROWS, LatentCache
from fastsd.data.order import Order
from fastsd.data.rows import row_check
from fastsd.demo.demo import MODELS
from fastsd.model.formats.load import load_vae
from fastsd.storage import replace_file

DEMO = MODELS / "base"
ROW = (4, 64, 64)  # 32 KiB in fp16: a latent of 512 px
BATCH = 64


def job(folder: Path, **cache_settings: Any) -> Config:
    raw = {
        "model": {"base": str(DEMO)},
        "data": {"folders": [str(folder / "images")], "resolution": 64},
        "cache": {"dir": str(folder / "cache"), "batch": 32} | cache_settings,
        "stage": [{"train": ["unet"], "until": 1}],
        "device": "cpu",
    }
    return parse_config(raw, "bench")


def write_image(path: Path, seed: int) -> None:
    """Write a smooth picture with grain, and its caption. The seed determines the size."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(64, 640, 2))
    colors = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = colors.resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(-8, 8, (height, width, 1))
    image = Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))
    options = {"quality": 90} if path.suffix == ".jpg" else {"compress_level": 1}
    image.save(path, **options)
    path.with_suffix(".txt").write_text(f"picture, number {seed}")


def write_image_range(folder: Path, numbers: range) -> None:
    for i in numbers:
        subfolder = folder / "images" / f"{i // 1000:03}"
        subfolder.mkdir(parents=True, exist_ok=True)
        write_image(subfolder / f"{i:06}.{'jpg' if i % 2 else 'png'}", i)


def write_images(folder: Path, count: int) -> None:
    ranges = [range(begin, min(begin + 500, count)) for begin in range(0, count, 500)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_image_range, itertools.repeat(folder), ranges))


def files(folder: Path, small: bool) -> dict[str, Any]:
    count = 300 if small else 20_000
    write_images(folder, count)
    config = job(folder)
    figures: dict[str, Any] = {"images": count}

    def run_cache(name: str) -> Any:
        start = time.perf_counter()
        counts = cache(config)
        figures[name] = {"seconds": time.perf_counter() - start, "encoded": counts.encoded, "img_per_s": counts.rates}
        return counts

    counts = run_cache("first run")
    assert counts.encoded == counts.cached == count and counts.rejected == 0
    assert run_cache("second run").encoded == 0

    paths = sorted((folder / "images").rglob("*.jpg"))
    for i in range(3):
        write_image(paths[i], count + i)
    for i in range(5):
        write_image(folder / "images" / f"new-{i}.png", count + 10 + i)
    for path in paths[10:17]:
        for file in (path, path.with_suffix(".txt")):
            file.rename(file.with_stem(f"renamed-{file.stem}"))
    for path in paths[20:22]:
        path.unlink()
    counts = run_cache("3 edited, 5 new, 7 renamed, 2 deleted")
    assert (counts.encoded, counts.cached) == (8, count + 3), counts
    return figures


def kills(folder: Path, small: bool) -> dict[str, Any]:
    count, num_kills = (120, 8) if small else (2000, 200)
    write_images(folder, count)
    config = job(folder, batch=4, workers=2)
    torch.set_num_threads(1)  # a forked process must not inherit locks of threads it does not have
    vae = load_vae(config.model)
    start = time.perf_counter()
    view = build_cache(config, vae).view
    duration = time.perf_counter() - start
    expected = {path.relative_to(folder): path.read_bytes() for path in (folder / "cache").glob("*s/*.safetensors")}
    shutil.rmtree(folder / "cache")

    rng = random.Random(0)
    # A process is killed while it searches the folders, plans, or encodes one of the first blocks.
    max_delay = 0.3 + duration / num_kills
    killed = 0
    while killed < num_kills:
        delay = rng.uniform(0, max_delay)
        child = os.fork()
        if child == 0:
            build_cache(config, vae)
            os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] != 0

    counts = build_cache(config, vae)
    actual = {path.relative_to(folder): path.read_bytes() for path in (folder / "cache").glob("*s/*.safetensors")}
    latents = LatentCache.open(folder / "cache", view)
    captions = latents.captions(range(len(latents)))
    assert len(set(captions)) == len(captions) == count, "an image is missing or duplicated"
    different = [path for path in {*actual, *expected} if actual.get(path) != expected.get(path)]
    assert not any("shards" in path.parts for path in different), "shards differ"
    assert not different and verify(folder / "cache") == []
    return {"images": count, "kills": killed, "left to the last run": counts.encoded, "shards equal": True}


def rows(folder: Path, small: bool) -> dict[str, Any]:
    count = 100_000 if small else 10_000_000
    start = time.perf_counter()
    write_sparse_rows(folder / "cache", count)
    write_seconds = time.perf_counter() - start
    code = "import sys; from pathlib import Path; import cache; cache.open_rows(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(folder / "cache")]
    result = subprocess.run(command, cwd=Path(__file__).parent, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    figures = {"rows": count, "seconds to write the index": write_seconds, **json.loads(result.stdout)}
    config = parse_config({"model": {"base": "x"}, "data": {"folders": ["a"]}, "stage": [{"train": ["unet"], "until": 1}]}, "x")
    latents = LatentCache.open(folder / "cache")
    order = Order(latents.groups, config.data.roots, 0, batch=BATCH)
    steps = [0, 1, 2, count // BATCH - 1, count // BATCH, 3 * count // BATCH, *range(1000, 1032)]
    start = time.perf_counter()
    for step in steps:
        samples = order.batch(step * BATCH, BATCH)
        assert len(samples) == BATCH and int(samples.max()) < count
    figures["ms for the order of a batch at random places"] = (time.perf_counter() - start) / len(steps) * 1e3
    return figures


def write_sparse_rows(folder: Path, count: int) -> None:
    """Write a cache with a complete index and sparse shards, in which every row is zeros."""
    zeros = bytes(32768)
    shards = []
    with Store.open(folder, create=True) as store:
        space = store.space("made", {"vae": "made"}, "fp16")
        for begin in range(0, count, SHARD_ROWS):
            with store.transaction():
                store.db.execute(
                    "INSERT INTO shard (space, name, rows, shape) VALUES (?, ?, ?, ?)",
                    (space, f"made-{begin}", min(SHARD_ROWS, count - begin), json.dumps(ROW)),
                )
        fallocate = os.posix_fallocate
        os.posix_fallocate = lambda *arguments: None  # keeps the files sparse
        try:
            for shard in store.shards(space):
                shard.create()
                shards.append([shard.name, shard.shape])
        finally:
            os.posix_fallocate = fallocate

    indices = np.arange(count, dtype=np.int64)
    texts = np.char.add("a picture, number ", indices.astype(str)).astype(bytes)
    arrays = {
        "shard": (indices // SHARD_ROWS).astype(np.int32),
        "row": (indices % SHARD_ROWS).astype(np.int32),
        "check": np.full(count, row_check(zeros)),
        "caption_offsets": np.concatenate([[0], np.cumsum(np.char.str_len(texts))]).astype(np.int64),
        "captions": np.frombuffer(b"".join(texts.tolist()), np.uint8),
    }
    freeze_random(folder, ROW, arrays, shards)


def open_rows(folder: Path) -> None:
    """Open a loader, compare batches at two world sizes with its own, and print times and memory. Runs in its own process."""
    import psutil

    from fastsd.data.loader import Loader

    resident_before = psutil.Process().memory_info().rss
    stage = StageTable(train=["unet"], until=1, batch=BATCH)
    tokenize = lambda captions: torch.zeros(len(captions), 77, dtype=torch.int64)  # noqa: E731
    start = time.perf_counter()
    latents = LatentCache.open(folder)
    single = Loader(latents, tokenize, 0, stage)
    opened = time.perf_counter()
    single.batch(0, BATCH)
    first_batch_read = time.perf_counter()

    positions = [*range(0, 20 * BATCH, BATCH), len(latents) // BATCH * BATCH, 2 * len(latents) // BATCH * BATCH]
    for world in (2, 8):
        loaders = [Loader(latents, tokenize, 0, stage, rank=rank, world=world) for rank in range(world)]
        for position in positions:
            rank_batches = [loader.batch(position, BATCH) for loader in loaders]
            global_batch = single.batch(position, BATCH)
            assert torch.equal(torch.cat([batch.positions_B for batch in rank_batches]), global_batch.positions_B)
            assert [caption for batch in rank_batches for caption in batch.captions] == global_batch.captions

    resident = psutil.Process().memory_info().rss
    figures = {"seconds to open": opened - start, "seconds to the first batch": first_batch_read - opened}
    figures |= {"resident MB": resident / 1e6, "of which libraries": resident_before / 1e6}
    figures["global batches equal for worlds of 1, 2, 8"] = True
    print(json.dumps(figures))


def reads(folder: Path, small: bool) -> dict[str, Any]:
    count, max_batches = (2048, 8) if small else (131_072, 100)
    folder.mkdir(parents=True, exist_ok=True)
    write_read_formats(folder, count)
    latents, rng = LatentCache.open(folder / "cache"), np.random.default_rng(1)

    def npz(i: int) -> torch.Tensor:
        with np.load(folder / f"npz/{i // 1000}/{i}.npz") as file:
            return torch.from_numpy(file["latents"])

    def pt(i: int) -> torch.Tensor:
        return torch.load(folder / f"pt/{i // 1000}/{i}.pt")

    threads = ThreadPoolExecutor(8)
    readers = {
        "ours": lambda indices: latents.get(indices)["latents"],
        "npz": lambda indices: torch.stack([npz(i) for i in indices]),
        "torch.load": lambda indices: torch.stack([pt(i) for i in indices]),
        "npz, 8 threads": lambda indices: torch.stack(list(threads.map(npz, indices))),
        "torch.load, 8 threads": lambda indices: torch.stack(list(threads.map(pt, indices))),
    }
    figures: dict[str, Any] = {"samples": count, "gb": count * 32768 / 1e9, "cold by": drop_page_cache()}
    indices = rng.integers(0, count, BATCH).tolist()
    for name in ("npz", "torch.load"):
        assert torch.equal(readers["ours"](indices), readers[name](indices))

    warm_indices = rng.choice(count, min(count, 8192), replace=False)  # samples that warm rounds read from memory
    for cold in (True, False):
        speeds: dict[str, list[float]] = {name: [] for name in readers}
        for round_, (name, reader) in itertools.product(range(3), readers.items()):
            if cold:
                drop_page_cache()
            elif round_ == 0:  # read the samples into memory
                for chunk in np.array_split(warm_indices, len(warm_indices) // BATCH):
                    reader(chunk.tolist())

            num_batches = max(max_batches // 4, 1) if cold and name != "ours" else max_batches
            population = count if cold else warm_indices
            batches = [rng.choice(population, BATCH).tolist() for _ in range(num_batches)]
            start = time.perf_counter()
            for indices in batches:
                reader(indices)
            speeds[name].append(num_batches * BATCH / (time.perf_counter() - start))

        medians = {name: statistics.median(values) for name, values in speeds.items()}
        ratios = {name: medians["ours"] / value for name, value in medians.items()}
        figures["cold" if cold else "warm"] = {"samples_per_s": medians, "ours over": ratios}
    return figures


def write_read_formats(folder: Path, count: int) -> None:
    """Write the same random latents as a cache, as .npz files and as torch.save files. A folder holds a thousand files."""

    def write_files() -> Iterator[bytes]:
        generator = torch.Generator().manual_seed(0)
        for i in range(count):
            for suffix in ("npz", "pt") if i % 1000 == 0 else ():
                (folder / f"{suffix}/{i // 1000}").mkdir(parents=True)
            latent = torch.randn(ROW, generator=generator).half()
            np.savez(folder / f"npz/{i // 1000}/{i}.npz", latents=latent.numpy())
            torch.save(latent, folder / f"pt/{i // 1000}/{i}.pt")
            yield latent.numpy().tobytes()

    write_cache(folder / "cache", ROW, write_files(), [b""] * count).close()


def drop_page_cache() -> str:
    """Empty the page cache. Return the method, or "" if it is not permitted; figures marked "cold" are then warm."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return ""
    return "drop_caches"


SECTIONS = {"files": files, "kills": kills, "rows": rows, "reads": reads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--small", action="store_true", help="small sizes: a check in seconds that everything runs")
    parser.add_argument("--folder", type=Path, help="working folder (default: a temporary folder, deleted at the end)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file, which keeps those of other sections")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        figures = json.loads(arguments.json.read_text())
    for name in arguments.only:
        folder = Path(tempfile.mkdtemp(prefix=f"fastsd-cache-{name}-", dir=arguments.folder))
        try:
            figures[name] = {"stamp": counters.stamp(torch.device("cpu")), **SECTIONS[name](folder / "data", arguments.small)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(name, json.dumps(figures[name], indent=1), flush=True)
        if arguments.json:
            replace_file(arguments.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
