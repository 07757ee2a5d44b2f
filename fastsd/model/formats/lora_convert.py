"""Convert a LoRA file between kohya's and diffusers' names, and say which tools read the result wrongly.

Read next: `lora_files.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model.formats.lora_files import (
    LoraFile,
    fold_alpha,
    most_common,
    read_lora,
    weights_file,
    write_kohya,
    write_peft,
)
from fastsd.model.formats.write import DTYPE
from fastsd.storage import check_finite, new_file
from fastsd.terminal.texts import WARNING


def convert_lora(source: Path, out: Path, to: str, dtype: str = "") -> list[str]:
    """Write a LoRA with the names of another tool. Return notes that describe it.

    Args:
        to: the naming scheme to write, "lora-kohya" or "lora-peft".
        dtype: fp32, fp16 or bf16; "" = unchanged.

    Raises:
        UserError: as `read_lora`; also if `out` exists or is not a .safetensors name, or a number is not finite in `dtype`.
        OSError: the disk is full, or the folder cannot be written.
    """
    lora = read_lora(source)
    if out.exists():
        raise UserError("lora-out-exists", f"{out} already exists; choose a new name, or remove it")
    if out.suffix != ".safetensors":
        raise UserError("lora-ending", f"{out}: a LoRA is one file; choose a name that ends in .safetensors")

    notes = [f"{source}: {describe(lora)}"]
    if dtype:
        cast = {name: tensor.to(DTYPE[dtype]) for name, tensor in lora.tensors.items()}
        for name, tensor in cast.items():
            check_finite(name, tensor, str(source), f" in {dtype}; choose another dtype")
        lora = replace(lora, tensors=cast)

    with new_file(out) as temporary:
        if to == "lora-peft":
            write_peft(temporary, fold_alpha(lora, str(source)))
            notes += _peft_warnings(lora)
        else:
            modified = datetime.fromtimestamp(int(weights_file(source).stat().st_mtime)).isoformat()
            write_kohya(temporary, lora, {"modelspec.date": modified})
            notes += _kohya_warnings(lora)
    return notes


def _peft_warnings(lora: LoraFile) -> list[str]:
    warnings = []
    if any(module.startswith("unet.") and ".attn" in module for module in lora.alphas):
        # ComfyUI's `model_lora_keys_unet` has names with `.processor.to_q` for attention, so it does not find `.to_q`.
        warnings.append(
            f"{WARNING}ComfyUI ignores the UNet's attention layers in a LoRA with diffusers' names; for ComfyUI and A1111, "
            "convert with --to lora-kohya"
        )
    if any(module.startswith("text_encoder.") for module in lora.alphas):
        # It reads `text_encoder.` as `text.encoder.`, which is no layer of its models (`bench/clients.py`).
        warnings.append(
            f"{WARNING}stable-diffusion.cpp ignores the text encoder's layers in a LoRA with diffusers' names; for it, convert "
            "with --to lora-kohya"
        )
    if any(len({lora.ranks[m] for m in lora.alphas if m.startswith(f"{component}.")}) > 1 for component in COMPONENTS):
        # Without the header entry, diffusers' `get_peft_kwargs` takes the first rank as alpha of all modules.
        warnings.append(
            f"{WARNING}the rank differs by module, so diffusers before 0.34 applies wrong strengths; "
            "use a newer version, or merge the LoRA into a model with --merge"
        )
    return warnings


def _kohya_warnings(lora: LoraFile) -> list[str]:
    warnings = []
    if lora.alphas.keys() & {"unet.conv_in", "unet.conv_out"}:
        # It takes the underscore of these names for a dot. All other convolutions are read exactly (`bench/clients.py`).
        warnings.append(
            f"{WARNING}diffusers 0.24 cannot load conv_in and conv_out with kohya's names; use a newer version, or merge the "
            "LoRA into a model with --merge"
        )
    # diffusers' `get_peft_kwargs` stores the less common alphas under names that no attention layer has.
    for component in COMPONENTS:
        alphas = {module: alpha for module, alpha in lora.alphas.items() if module.startswith(f"{component}.")}
        if any("attn" in module and alpha != most_common(alphas.values()) for module, alpha in alphas.items()):
            return [
                *warnings,
                f"{WARNING}alpha differs by module, but diffusers (0.42) applies the most common one to all attention layers "
                "if names are kohya's; for diffusers, convert with --to lora-peft",
            ]
    return warnings


def describe(lora: LoraFile) -> str:
    """Describe a LoRA in one line."""
    counts = Counter(module.partition(".")[0].replace("_", " ").replace("unet", "UNet") for module in lora.alphas)
    layers = ", ".join(f"{component} {count}" for component, count in counts.items())
    ranks = ", ".join(f"{rank:g}" for rank in sorted(set(lora.ranks.values())))
    alphas = ", ".join(f"{alpha:g}" for alpha in sorted(set(lora.alphas.values())))
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in lora.tensors.values()})
    ignored = f"; ignored {', '.join(lora.ignored)}" if lora.ignored else ""
    return f"a LoRA with {lora.kind} names, layers: {layers}, rank {ranks}, alpha {alphas}, {' and '.join(dtypes)}{ignored}"
