"""The names that users and other programs rely on: commands, options, Python names and config keys.

`public_names.txt` lists them. Add a new name there in the same commit. To remove one breaks a user's code or config.
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
    """Return "command --option" or "command ARGUMENT" for every parameter."""
    from fastsd import cli

    group = typer.main.get_command(cli.app)
    return {
        f"{name} {parameter.metavar if parameter.param_type_name == 'argument' else parameter.opts[0]}"
        for name, command in group.commands.items()
        for parameter in command.params
    }


def tables(annotation) -> list[type[BaseModel]]:
    """Return the config tables within a field's type, such as `Table | None` or `list[str | Table]`."""
    if inspect.isclass(annotation) and not get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [table for argument in get_args(annotation) for table in tables(argument)]


def config_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Return "table.key" for every key, or "table[].key" within a list of tables."""
    keys = set()
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        brackets = "[]" if str(field.annotation).startswith("list") else ""
        inner_keys = {k for table in tables(field.annotation) for k in config_keys(table, f"{key}{brackets}.")}
        keys |= inner_keys or {key}
    return keys


def python_names() -> set[str]:
    """Return "module.name(parameters)" for every Python name that users may rely on."""
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
