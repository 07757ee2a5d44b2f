"""Cards by name, and by the device in use. Used by `fastsd plan`, and for the utilisation that a run logs."""

from __future__ import annotations

import difflib
import re

import torch

from fastsd.errors import UserError
from fastsd_kernels.cards import CARDS, Card


def find_gpu(name: str, otherwise: str = "give the memory with --vram") -> Card:
    """Find a card by a name such as "4090", "rtx-4090" or "RTX 4090".

    Raises:
        UserError: it is unknown or ambiguous. If no name is close, the message ends in `otherwise`.
    """
    cards = {_letters_and_digits(card.name): card for card in CARDS.values()}
    short_name = _letters_and_digits(name)
    matches = [card for full_name, card in cards.items() if short_name and full_name.endswith(short_name)]
    if len(matches) == 1:
        return matches[0]
    close = difflib.get_close_matches(short_name, cards, n=1)
    hint = f"did you mean {cards[close[0]].name}?" if close else f"or {otherwise}"
    names = ", ".join(card.name for card in CARDS.values())
    raise UserError("unknown-card", f"--card is {name!r}; choose from {names}; {hint}")


def gpu_of(device: torch.device) -> Card | None:
    """Return the data of a device in use. None for a CPU, and for a GPU of another type, such as a laptop's."""
    if device.type != "cuda":
        return None
    name = re.sub(r"^NVIDIA |GeForce |-SXM\d|[ -]\d+GB| HBM\w*", "", torch.cuda.get_device_name(device))
    return next((card for card in CARDS.values() if card.name == name), None)


def _letters_and_digits(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
