"""D-Lion in another trainer's loop: any model, any parameter list, no learning rate.

python examples/dlion.py
"""

import torch
from torch import nn

from fastsd_kernels.optim import DLion

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
x = torch.randn(512, 16)
y = x.square().mean(1, keepdim=True)

optimizer = DLion(model.parameters())  # lr is a factor on the step size d that it finds; leave it at 1
for i in range(501):
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if i % 100 == 0:
        print(f"step {i}: loss {loss.item():.4f}, d {optimizer.d():.2e}")
