"""Draw images with a model.

python examples/sample.py MODEL          MODEL: a diffusers folder, a hub id, a single file or a run
"""

import sys

from fastsd import generate, load_to_sample
from fastsd.config import ModelTable, SampleTable

model = load_to_sample(ModelTable(base=sys.argv[1]))
size = model.unet.cfg.sample_size * model.vae.downscale
prompts = ["a red fox in the snow", "a house by the sea"]
for i, image in enumerate(generate(model, prompts, seeds=[0, 1], table=SampleTable(steps=20, guidance=7.0), size=size)):
    image.save(f"sample-{i}.png")
    print(f"sample-{i}.png: {prompts[i]}")
