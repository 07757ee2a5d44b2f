"""Training steps by hand: a model, a stage, batches.

python examples/one_step.py MODEL        MODEL: a diffusers folder, a hub id or a single file of SD1.5
"""

import sys

import torch

from fastsd import Batch, Step, load_model
from fastsd.config import ModelTable, StageTable

model = load_model(ModelTable(base=sys.argv[1]))
stage = StageTable(train=["unet"], until=3, batch=2, optimizer="lion", lr=1e-5)
step = Step(model, stage, total=3, seed=0)

captions = ["a red fox in the snow", "a house by the sea"]
channels, side = model.unet.cfg.in_channels, model.unet.cfg.sample_size
for i in range(3):
    batch = Batch(
        latents_BCHW=torch.randn(2, channels, side, side),  # what the VAE encodes, unscaled
        token_ids_BL=model.text.tokenize(captions),
        positions_B=torch.arange(2 * i, 2 * i + 2),  # numbers of the samples in the run: they determine noise and timesteps
        captions=captions,
    )
    result = step(batch, i)
    print(f"step {i + 1}: loss {float(result.loss):.4f}, gradient norm {float(result.grad_norm):.4f}")
step.release()
