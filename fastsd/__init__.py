"""fastsd: a lean training engine that retrains Stable Diffusion 1.5 on one GPU. Start reading at `fastsd/run/loop.py`.

As a library, with names that are imported when they are first used:

    from fastsd import load_config, train_config       # a whole run, as `fastsd train CONFIG`
    from fastsd import load_model, Step, Batch         # training steps by hand
    from fastsd import LatentCache                     # a latent cache as a torch dataset
    from fastsd import load_to_sample, generate        # images

`examples/` has a short program for each.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Batch": "fastsd.data.loader:Batch",
    "LatentCache": "fastsd.data.cache:LatentCache",
    "Step": "fastsd.train.step:Step",
    "UserError": "fastsd.errors:UserError",
    "generate": "fastsd.sampling.generate:generate",
    "load_config": "fastsd.config.schema:load_config",
    "load_model": "fastsd.model.formats.load:load_model",
    "load_to_sample": "fastsd.sampling.generate:load_to_sample",
    "train_config": "fastsd.run.loop:train",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastsd' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
