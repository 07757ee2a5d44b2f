"""Floor 0.5: the schema of config files and all of its defaults."""

from fastsd.config.schema import Config as Config
from fastsd.config.schema import DataTable as DataTable
from fastsd.config.schema import ModelTable as ModelTable
from fastsd.config.schema import SampleTable as SampleTable
from fastsd.config.schema import load_config as load_config
from fastsd.config.stages import StageTable as StageTable
