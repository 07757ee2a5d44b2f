"""Floor 0.5: what a config may say, and the only defaults there are."""

from fastsd.config.schema import Config as Config
from fastsd.config.schema import load_config as load_config
