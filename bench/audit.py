"""Check the audit of a cache at scale: the order of images with known detail, kill -9, and a million images.

    python bench/audit.py [--only ranking kills rows] [--folder DIR] [--json FILE]

    ranking  audit 200 pictures like photographs, of which 10 are pages of small text, with the demo's VAE and with one that was
             trained on other such pictures: rank correlation of detail and error, places of the pages
    kills    audit the same pictures with kill -9 after random numbers of results; the files must equal those of a
             whole audit
    rows     write the table of a million images from stored results: seconds and memory

Correctness is asserted; speeds and correlations are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detailed_images import photograph, write_photographs

from fastsd.bench import counters
from fastsd.compare.audit import audit, write_table
from fastsd.config.schema import Config, ModelTable, load_config
from fastsd.data.building.round_trip import Audit, open_audit
from fastsd.demo.demo import MODELS
from fastsd.demo.models import save_vae, to_tensor
from fastsd.model.formats.load import load_vae
from fastsd.storage import replace_file

IMAGES, PAGES = 200, 10
SIZES = (96, 96), (128, 64), (64, 128)
ROWS = 1_000_000
FURTHER = 60  # results that are stored between two kills, at most
_OTHER_SEEDS = 1_000_000  # pictures that the VAE is trained on


def write_config(folder: Path, vae: Path, resolution: int) -> Path:
    """Write a config whose cache lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.toml"
    text = f"""device = "cpu"
[model]
base = "{MODELS / "base"}"
vae = "{vae}"
[data]
folders = ["{folder.parent / "images"}"]
resolution = {resolution}
[data.buckets]
min = {resolution // 2}
max = {resolution * 3 // 2}
step = 16
[cache]
dir = "{folder / "cache"}"
[[stage]]
train = ["unet"]
until = 1
"""
    path.write_text(text)
    return path


def details() -> list[float]:
    """Return the share of detail of each picture: up to 60 %, and 100 % for `PAGES` of them."""
    shares = np.random.default_rng(0).uniform(0, 0.6, IMAGES)
    shares[:: IMAGES // PAGES] = 1
    return shares.tolist()


def train_on_photographs(folder: Path, steps: int) -> None:
    """Train the demo's VAE on pictures that are not audited, by the absolute error of its own means."""
    torch.manual_seed(0)
    rng = np.random.default_rng(_OTHER_SEEDS)
    vae = load_vae(ModelTable(base=str(MODELS / "base"))).module.requires_grad_(requires_grad=True)
    optimizer = torch.optim.AdamW(vae.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        images = [photograph(_OTHER_SEEDS + 8 * step + i, rng.uniform(0, 0.6), 64, 64) for i in range(8)]
        pixels = to_tensor(images).to(memory_format=torch.channels_last)
        loss = (vae.decode(vae.encode(pixels).latent_dist.mean).sample - pixels).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"  step {step + 1}: mean absolute error {127.5 * loss.item():.1f}", flush=True)
    save_vae(folder, vae.eval())


def columns(page: Path) -> dict[str, np.ndarray]:
    """Read the numbers of an audit's table, by column, and the names of the images."""
    head, *rows = (line.split("\t") for line in page.with_suffix(".tsv").read_text().splitlines())
    table = dict(zip(head, zip(*rows, strict=True), strict=True))
    names = {"name": np.array([Path(path).stem for path in table.pop("# path")], int)}
    return names | {key: np.array(values, float) for key, values in table.items() if "tiles" not in key}


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's coefficient."""
    ranks = [np.searchsorted(np.sort(values), values) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def measure_ranking(folder: Path) -> dict[str, Any]:
    config = load_config(write_config(folder / "ranking", folder / "photo-vae", 96))
    start = time.perf_counter()
    table = columns(audit(config, str(MODELS / "vae")))
    seconds = time.perf_counter() - start
    shares = np.array(details())[table["name"]]
    figures: dict[str, Any] = {"images": IMAGES, "seconds with two VAEs": seconds}
    for name, prefix in (("trained on photographs", ""), ("demo's", "against_")):
        for error in ("error", "fine"):
            values = table[f"{prefix}{error}"]
            figures[f"rank correlation of detail and {error}, VAE {name}"] = rank_correlation(shares, values)
            figures[f"pages of text among the {PAGES} worst by {error}, VAE {name}"] = int(
                (shares[np.argsort(-values)[:PAGES]] == 1).sum()
            )
        figures[f"median error, VAE {name}"] = float(np.median(table[f"{prefix}error"]))
    figures["images better with the VAE that was trained on photographs"] = int((table["gain"] > 0).sum())
    figures["the same, by fine errors"] = int((table["fine"] < table["against_fine"]).sum())
    return figures


def stored_results(store: Path) -> int:
    """Return the number of results that an audit has stored so far."""
    if not store.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
        try:
            return int(db.execute("SELECT count(*) FROM audit").fetchone()[0])
        except sqlite3.OperationalError:  # the table does not exist yet
            return 0


def measure_kills(folder: Path) -> dict[str, Any]:
    """Kill an audit again and again, after random numbers of results. Compare its files with a whole one's."""
    words = ["--audit", "--worst", "4", "--against", str(MODELS / "vae")]
    outputs, kills = [], 0
    for name in ("whole", "killed"):
        shutil.rmtree(folder / name, ignore_errors=True)
        command = [sys.executable, "-m", "fastsd", "cache", str(write_config(folder / name, folder / "photo-vae", 64)), *words]
        rng, store = random.Random(0), folder / name / "cache/cache.sqlite"
        while True:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            until = stored_results(store) + rng.randrange(FURTHER) if name == "killed" else math.inf
            while process.poll() is None and stored_results(store) < until:
                time.sleep(rng.uniform(0, 0.1))
            if process.poll() is not None:
                assert process.returncode == 0
                break
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        pages = (folder / name / "cache/audit").iterdir()
        outputs.append({path.suffix: path.read_bytes() for path in pages})
    assert outputs[0] == outputs[1], "the files differ"
    return {"images": IMAGES, "VAEs": 2, "kills": kills, "files equal": True}


def measure_rows(folder: Path) -> dict[str, Any]:
    """Store random results for a million images that do not exist, and write their table."""
    config = load_config(write_config(folder / "rows", folder / "photo-vae", 256))
    vae = load_vae(config.model)
    with open_audit(config, [vae], lambda event: None, print) as images:
        _fill(images, config)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        count = images.errors().shape[2]
        write_table(path := folder / "rows/table.tsv", images, count)
        seconds = time.perf_counter() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with path.open() as file:
        assert sum(1 for _ in file) == count + 1 == ROWS + 1
    return {
        "rows": count,
        "seconds": seconds,
        "MiB of memory that this takes": grown / 1024,
        "MiB of the table": path.stat().st_size >> 20,
    }


def _fill(images: Audit, config: Config) -> None:
    rng, codec, tiles = np.random.default_rng(0), images.codecs[0], np.ones((2, 4, 4), np.float16).tobytes()
    images.db.execute("DELETE FROM sample")
    with images.store.transaction():
        for number in range(ROWS):
            content = number.to_bytes(32, "big")
            sample = (f"/photographs/{number:08}.jpg".encode(), content)
            insert = (
                "INSERT INTO sample (path, root, file, offset, length, content, width, height, bucket_width, bucket_height)"
            )
            images.db.execute(f"{insert} VALUES (?1, 0, ?1, 0, -1, ?2, 256, 256, 256, 256)", sample)
            images.db.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?)", (codec, content, *rng.random(2).tolist(), tiles))


PARTS = {"ranking": measure_ranking, "kills": measure_kills, "rows": measure_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="where the pictures and caches are; default: a temporary folder")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the VAE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        if not (folder / "images").exists():
            write_photographs(folder / "images", details(), SIZES)
        if not (folder / "photo-vae").exists():
            train_on_photographs(folder / "photo-vae", options.steps)
        results = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
        for name in options.only:
            results[name] = {"stamp": counters.stamp(torch.device("cpu")), **PARTS[name](folder)}
            print(
                name, json.dumps({key: value for key, value in results[name].items() if key != "stamp"}, indent=1), flush=True
            )
            if options.json:
                replace_file(options.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
