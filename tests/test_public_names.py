"""The names that users and other programs rely on: commands, options, Python names, config keys. Growth is a decision.

`public_names.txt` lists them. A new name is added there in the same commit; a removed one breaks somebody.
"""

import importlib
import inspect
import sys
from pathlib import Path
from typing import get_args

import typer
from environment import ROOT
from pydantic import BaseModel

FILE = Path(__file__).with_name("public_names.txt")


def commands() -> set[str]:
    """`command --option`, or `command ARGUMENT`."""
    from fastsd import cli

    group = typer.main.get_command(cli.app)
    return {
        f"{name} {parameter.metavar if parameter.param_type_name == 'argument' else parameter.opts[0]}"
        for name, command in group.commands.items()
        for parameter in command.params
    }


def tables(annotation) -> list[type[BaseModel]]:
    """The config tables that a field's type names: `Table | None`, `list[str | Table]`."""
    if inspect.isclass(annotation) and not get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [table for argument in get_args(annotation) for table in tables(argument)]


def config_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """`table.key` for every key, `[]` where a list of tables is meant."""
    keys = set()
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        inner = tables(field.annotation)
        repeated = "[]" if str(field.annotation).startswith("list") else ""
        keys |= {k for table in inner for k in config_keys(table, f"{key}{repeated}.")} or {key}
    return keys


def python_names() -> set[str]:
    """`module.name(parameters)` for what the design promises."""
    promised = {
        "fastsd_kernels": ["REFERENCE", "TRITON"],
        "fastsd.config": ["load_config"],
        "fastsd.model.unet": ["UNet", "UNetConfig", "UNetConfig.sd15", "UNet.forward"],
        "fastsd.model.weights": ["load_diffusers_unet", "diffusers_state_dict"],
        "fastsd.train.optim": ["Lion", "DLion", "AdamW", "DLion.d"],
        "fastsd.data.cache": ["LatentCache", "LatentCache.open", "LatentCache.get", "LatentCache.__len__"],
    }
    names = set()
    for module, paths in promised.items():
        for path in paths:
            value = importlib.import_module(module)
            for part in path.split("."):
                value = getattr(value, part)
            parameters = f"({', '.join(inspect.signature(value).parameters)})" if callable(value) else ""
            names.add(f"{module}.{path}{parameters}")
    from fastsd_kernels import REFERENCE, TRITON

    for op in ("attention", "group_norm", "layer_norm", "geglu"):
        signatures = {str(list(inspect.signature(getattr(ops, op)).parameters)) for ops in (REFERENCE, TRITON)}
        names |= {f"REFERENCE.{op} = TRITON.{op}: {signature}" for signature in signatures}
    return names


def current() -> str:
    from fastsd.config.schema import Config

    sections = {"commands": commands(), "Python": python_names(), "config keys": config_keys(Config)}
    return "\n".join(f"# {title}\n" + "\n".join(sorted(names)) + "\n" for title, names in sections.items())


def test_public_names():
    assert current() == FILE.read_text(), "run `python tests/test_public_names.py` and look at the difference before committing"


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    FILE.write_text(current())
