"""Examples at the end of each command's help."""

from __future__ import annotations


def examples(*commands: str) -> str:
    """Return the end of a command's help. Typer leaves a paragraph after a backspace character as it is."""
    return "\n".join(["\b", "Examples:", *(f"  fastsd {command}" for command in commands)])


EXAMPLES = {
    "init": examples(
        "init",
        "init --images photos --card 4090",
        "init my.toml --images photos --goal lora --card 12",
    ),
    "train": examples(
        "train configs/xlsd.toml",
        "train --precision bf16 configs/xlsd.toml run=runs/test stage.batch=16",
        "train configs/xlsd.toml --from step-00001000",
    ),
    "cache": examples(
        "cache configs/xlsd.toml",
        "cache configs/xlsd.toml --verify",
        "cache configs/xlsd.toml --machine node-1",
        "cache configs/xlsd.toml --audit --against stabilityai/sd-vae-ft-mse",
    ),
    "sample": examples(
        'sample runs/xlsd --prompt "a red fox in the snow"',
        "sample runs/xlsd --prompts prompts.txt --ema --out drawn",
        'sample model.safetensors -p "a red fox" --width 768 --height 512',
    ),
    "validate": examples(
        "validate runs/xlsd configs/xlsd.toml",
        "validate runs/xlsd/model configs/xlsd.toml --json loss.json",
    ),
    "check": examples(
        "check configs/xlsd.toml",
    ),
    "plan": examples(
        "plan configs/xlsd.toml --card 4090",
        "plan configs/xlsd.toml --vram 12 --precision bf16",
        "plan configs/xlsd.toml --gpus 8 --interconnect nvlink",
    ),
    "bench": examples(
        "bench",
        "bench memory",
        "bench step configs/xlsd.toml --precision bf16 --json step.json",
    ),
    "compare": examples(
        "compare runs/a runs/b --out report.html",
        "compare runs/a --checkpoints",
        "compare runs/a --draw clip_skip=0,1",
    ),
    "watch": examples(
        "watch runs/xlsd",
        "watch runs/a runs/b --port 8500",
    ),
    "sweep": examples(
        "sweep configs/xlsd.toml stage.lr=1e-5,3e-5 model.clip_skip=0,1",
    ),
    "lr-probe": examples(
        "lr-probe configs/xlsd.toml --steps 400",
    ),
    "long-clip": examples(
        "long-clip runs/xlsd/model long",
    ),
    "swap-vae": examples(
        "swap-vae base.safetensors stabilityai/sdxl-vae start --images photos",
        "swap-vae base.safetensors flux-vae start --normalise cache",
    ),
    "average": examples(
        "average runs/xlsd --sigma-rel 0.07",
        "average runs/xlsd/checkpoints/step-00500000 --sigma-rel 0.07",
    ),
    "convert": examples(
        "convert runs/xlsd xlsd.safetensors --dtype fp16",
        "convert model.safetensors folder",
        "convert base.safetensors out.safetensors --merge lora.safetensors:0.8",
    ),
    "config": examples(
        "config",
        "config lr",
        "config validate",
    ),
    "convert-config": examples(
        "convert-config config.toml xl.toml",
    ),
    "redraw": examples(
        "redraw runs/xlsd configs/xlsd.toml redrawn --limit 1000",
    ),
    "demo": examples(
        "demo",
        "demo --out /tmp/demo",
    ),
}
