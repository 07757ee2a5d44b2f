"""Estimate the disk space of exports."""

from __future__ import annotations

from collections.abc import Mapping

from fastsd.config.schema import Config
from fastsd.config.stages import COMPONENTS
from fastsd.model.formats.write import DTYPE


def export_bytes(config: Config, component_bytes: Mapping[str, int]) -> int:
    """Return the bytes that exports add to the checkpoints: single files, and components that are not hard links.

    Args:
        component_bytes: bytes of each component of the model in fp32.
    """
    has_ema, lora = config.stage[-1].ema > 0, config.model.lora
    adapted = COMPONENTS[: 1 + lora.text_encoder] if lora else ()
    averaged = config.stage[-1].components if has_ema and not lora else ()
    copied = [*adapted * (1 + has_ema), *averaged]
    single_file = sum(component_bytes.values()) * DTYPE[config.export.dtype].itemsize // 4 if config.export.single_file else 0
    return sum(component_bytes[component] for component in copied) + single_file * (1 + has_ema)
