from fastsd.config.schema import load_config as load_config
from fastsd.data.cache import LatentCache as LatentCache
from fastsd.data.loader import Batch as Batch
from fastsd.errors import UserError as UserError
from fastsd.model.formats.load import load_model as load_model
from fastsd.run.loop import train as train_config
from fastsd.sampling.generate import generate as generate
from fastsd.sampling.generate import load_to_sample as load_to_sample
from fastsd.train.step import Step as Step

__version__: str
__all__ = [
    "Batch",
    "LatentCache",
    "Step",
    "UserError",
    "generate",
    "load_config",
    "load_model",
    "load_to_sample",
    "train_config",
]
