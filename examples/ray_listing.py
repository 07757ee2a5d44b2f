"""A Parquet listing of images for data.folders, made by Ray.

python examples/ray_listing.py FOLDER OUT.parquet     FOLDER: images with a .txt beside each

In the config: [data] folders = ["OUT.parquet"]
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

CHUNK = 10_000  # images in a file of the listing


@ray.remote
def write_part(files: list[str], path: str) -> int:
    """List some images in a file of their own. This runs on any machine of the cluster."""
    texts = (Path(file).with_suffix(".txt") for file in files)
    captions = [text.read_text(encoding="utf-8").strip() if text.exists() else None for text in texts]
    pq.write_table(pa.table({"file": files, "caption": pa.array(captions, pa.string())}), path)
    return len(files)


folder, out = (Path(argument).resolve() for argument in sys.argv[1:])
out.mkdir(parents=True)
ray.init(include_dashboard=False)
images = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
chunks = [images[first : first + CHUNK] for first in range(0, len(images), CHUNK)]
counts = ray.get([write_part.remote(chunk, str(out / f"{i:06}.parquet")) for i, chunk in enumerate(chunks)])
print(f"{sum(counts)} images listed in {out}")
