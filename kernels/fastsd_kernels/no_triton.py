"""A stand-in for Triton where it does not exist (macOS): kernel files also contain the references and must be importable.

The package imports this module before the kernel files. It puts the stand-in in Triton's place; decorators and constants
then do nothing. `remove_stand_in` removes it again, so no other code mistakes it for Triton.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

AVAILABLE = find_spec("triton") is not None


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # not a package: other code that imports Triton meanwhile finds no module in it
            raise AttributeError(name)
        return self if name == "language" else lambda function=None, **_: (lambda f: f) if function is None else function


_NAMES = ("triton", "triton.language")
if not AVAILABLE:
    sys.modules |= dict.fromkeys(_NAMES, _StandIn("triton"))


def remove_stand_in() -> None:
    """Remove the stand-in. Call this once all kernel files are imported."""
    if not AVAILABLE:
        for name in _NAMES:
            del sys.modules[name]
