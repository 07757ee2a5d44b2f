"""Numeric health of a run: updates that are not finite, spikes, checkpoints kept by health, rollback and the canary."""

from io import StringIO
from pathlib import Path

import pytest
from runs import checkpoint_steps, rows_of
from safetensors.torch import load_file
from tiny import job

from fastsd.commands.cache import cache
from fastsd.config.schema import load_config
from fastsd.console import Console
from fastsd.run.loop import train

pytestmark = pytest.mark.slow

STAGE = """
[[stage]]
train = ["unet"]
until = 6
batch = 4
checkpoint_every = 1
keep_checkpoints = 9
"""
ABSURD = {
    "lion": 'optimizer = "lion"\nlr = 1e38\n',
    "dlion": "d0 = 1e38\n",
    "adamw": 'optimizer = "adamw"\nlr = 1e38\n',
    "adamw with huge gradients": 'optimizer = "adamw"\nlr = 1e-3\n',
}


OPTIONS = {"": "auto", 'precision = "bf16"\n': "auto", "fused_backward = true\n": "reference", "ema = 0.5\n": "reference"}


@pytest.mark.parametrize("options, kernels", OPTIONS.items())
@pytest.mark.parametrize("absurd", ABSURD)
def test_absurd_settings_leave_finite_checkpoints(absurd, options, kernels, tmp_path, tiny_model, images):
    overrides = [f'kernels="{kernels}"', "log.every=10"]
    if "gradients" in absurd:
        overrides.append(f'data.folders=[{{path="{images}", loss_weight=1e24}}]')
    config = load_config(job(tmp_path, tiny_model, images, STAGE + ABSURD[absurd] + options), overrides)
    cache(config, Console(file=StringIO()))
    train(config, Console(file=StringIO()), export=False)
    folder = Path(config.run)
    assert checkpoint_steps(folder) == [1, 2, 3, 4, 5, 6]
    for path in (folder / "checkpoints").rglob("*.safetensors"):
        assert not [name for name, tensor in load_file(path).items() if not tensor.isfinite().all()], path
    assert rows_of(folder)[-1]["skipped"] > 0
