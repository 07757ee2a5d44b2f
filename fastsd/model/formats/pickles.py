"""Read the weights in a pickled file, without running anything that the file names.

torch's loader for weights builds tensors and plain containers, and refuses any other class or function. Checkpoints of trainers
also hold a few harmless objects beside the weights. Here these become stand-ins that keep nothing, so not even harmless code of
other libraries runs, and the libraries need not be installed. A file that names anything else is refused.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from fastsd.errors import UserError

_CONTAINERS = ("state_dict", "model", "module", "model_state_dict", "weights")  # keys of the weights, in order of preference


class _Nothing:
    """Stand-in for an object or a function's result. It takes any arguments and any state, and keeps none."""

    def __new__(cls, *args: object, **options: object) -> _Nothing:
        return object.__new__(cls)

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _PlainDict:
    """Stand-in for a subclass of dict. Its instances are plain dicts, so the entries that follow in the file are kept."""

    def __new__(cls, *args: object, **options: object) -> dict[object, object]:  # type: ignore[misc]
        return {}


# Everything that a file may name, besides what torch accepts itself: modules -> names, and the reason.
_HARMLESS: list[tuple[type, str, str]] = [
    # Best scores and losses of a trainer are scalars and arrays of numpy, under the module names of versions 1 and 2.
    (_Nothing, "numpy", "dtype ndarray"),
    (_Nothing, "numpy.core.multiarray", "scalar _reconstruct"),
    (_Nothing, "numpy._core.multiarray", "scalar _reconstruct"),
    # The options and paths with which a script was called.
    (_Nothing, "argparse", "Namespace"),
    (_Nothing, "types", "SimpleNamespace"),
    (_Nothing, "pathlib", "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"),
    (_Nothing, "pathlib._local", "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"),
    (_Nothing, "datetime", "date datetime timedelta timezone"),
    # The state of an optimizer, or the weights themselves. A defaultdict names the type of its default values.
    (_PlainDict, "collections", "defaultdict"),
    (_Nothing, "builtins", "bool dict float int list set str tuple"),
    # Lightning, which trained the first models: a callback's class as a key, and the hyperparameters.
    (_Nothing, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    (_Nothing, "pytorch_lightning.callbacks.early_stopping", "EarlyStopping"),
    (_PlainDict, "pytorch_lightning.utilities.parsing", "AttributeDict"),
    (_PlainDict, "lightning_fabric.utilities.data", "AttributeDict"),
    # The config of a model in the original code, which is kept as a hyperparameter.
    (_Nothing, "omegaconf.dictconfig", "DictConfig"),
    (_Nothing, "omegaconf.listconfig", "ListConfig"),
    (_Nothing, "omegaconf.base", "ContainerMetadata Metadata"),
    (_Nothing, "omegaconf.nodes", "AnyNode StringNode IntegerNode FloatNode BooleanNode"),
    (_Nothing, "typing", "Any"),
]


def unpickle(path: Path, notes: list[str]) -> dict[str, Tensor]:
    """Return the tensors of a pickled file. They are mapped from the disk if its format allows that. No code in it is executed.

    The weights may lie in entries such as `state_dict` or `model`, also one in the other. The first that has tensors is read.

    Raises:
        UserError: the file is damaged, holds no tensors, or contains code.
    """
    stand_ins = [(stand_in, f"{module}.{name}") for stand_in, module, names in _HARMLESS for name in names.split()]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged or hostile files raise many types of errors
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        if match:
            raise UserError(
                "pickle-runs-code", f"{path}: contains executable code ({match[1]}), which was not run; use a .safetensors file"
            ) from None
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(
            "weights-unreadable", f"{path}: cannot be read as weights ({type(error).__name__}: {reason}); download it again"
        ) from None

    keys, state = _weights(data)
    if not state:
        raise UserError("weights-no-tensors", f"{path}: contains no named tensors; give the weights of a model")
    level = data
    for key in keys:
        if others := ", ".join(sorted(str(name) for name in level if name != key)):
            notes.append(f"{path.name}: ignored entries beside {key}: {others}")
        level = level[key]
    if others := ", ".join(str(name) for name in level if str(name) not in state):
        notes.append(f"{path.name}: ignored entries that are no tensors: {others}")
    return state


def _weights(data: object, depth: int = 0) -> tuple[list[str], dict[str, Tensor]]:
    """Return the keys that lead to the weights, and the weights, which are empty if there are none."""
    if not isinstance(data, dict) or depth > 3:  # a dict in a file can contain itself
        return [], {}
    for key in _CONTAINERS:
        keys, state = _weights(data.get(key), depth + 1)
        if state:
            return [key, *keys], state
    return [], {str(name): tensor for name, tensor in data.items() if isinstance(tensor, Tensor)}
