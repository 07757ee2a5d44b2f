"""A latent cache in a torch DataLoader.

fastsd cache CONFIG
python examples/latents.py CACHE         CACHE: the `cache.dir` of CONFIG
"""

import sys

from torch.utils.data import DataLoader

from fastsd import LatentCache

cache = LatentCache.open(sys.argv[1])
print(f"{len(cache)} samples, shapes {sorted({group.shape for group in cache.groups})}")
for batch in DataLoader(cache, batch_size=4, shuffle=True):
    print(tuple(batch["latents"].shape), batch["caption"])
    break
