"""Where Triton does not exist (macOS), kernel files must still be read, for their references lie beside the kernels.

Imported before them by the package, this puts a stand-in in Triton's place, under which decorators and constants do
nothing, until `remove_stand_in`: nobody else is to take it for Triton.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

AVAILABLE = find_spec("triton") is not None


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # no package: what else asks for Triton meanwhile finds no module in it
            raise AttributeError(name)
        return self if name == "language" else lambda it=None, **_: (lambda f: f) if it is None else it


_NAMES = ("triton", "triton.language")
if not AVAILABLE:
    sys.modules |= dict.fromkeys(_NAMES, _StandIn("triton"))


def remove_stand_in() -> None:
    """To be called once all kernel files are imported."""
    if not AVAILABLE:
        for name in _NAMES:
            del sys.modules[name]
