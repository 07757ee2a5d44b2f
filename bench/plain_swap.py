"""The demo's job from a plain swap of the VAE, on which D-Lion trains the UNet. `fastsd demo` itself starts aligned."""

from pathlib import Path


def plain_swap(folder: Path) -> list[str]:
    """Return the overrides of the demo's config in `folder`, where `demo._lay_out` has written the models."""
    settings = {"optimizer": "dlion", "lr": 1, "warmup": 0.075, "schedule": "constant", "lr_floor": 0}
    model = [f"model.base={folder / 'models' / 'base'}", f"model.vae={folder / 'models' / 'vae'}", "validate.held_out=0"]
    return model + [f"stage.unet.{key}={value}" for key, value in settings.items()]
