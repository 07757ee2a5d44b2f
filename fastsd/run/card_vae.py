"""The facts about a VAE in a model card: its latent space in training, and the one that other programs have to assume."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastsd.errors import UserError
from fastsd.model.formats.model_source import read_component
from fastsd.model.latent_space import SD15_SCALING_FACTOR, LatentSpace
from fastsd.run.folder import read_table

SDXL_SCALING_FACTOR = 0.13025


@dataclass(frozen=True)
class CardVae:
    """The VAE of a diffusers folder.

    Attributes:
        channels: of the latents.
        space: the latent space in training.
        stored: that of the folder's config. It differs if the folder's weights have a shift or statistics folded into them.
    """

    channels: int
    space: LatentSpace
    stored: LatentSpace

    @classmethod
    def of(cls, folder: Path) -> CardVae:
        """Read a folder's VAE. One whose weights cannot be read has the latent space of its config, or SD1.5's.

        Raises:
            UserError: the config has invalid constants.
        """
        stored = config = read_table(folder / "vae" / "config.json") or {}
        with suppress(UserError):
            config = read_component(folder, "vae").config
        spaces = (LatentSpace.of(table, str(folder / "vae")) for table in (config, stored))
        return cls(config.get("latent_channels", 4), *spaces)

    @property
    def factor(self) -> float:
        """The scaling factor that diffusers reads."""
        return self.stored.factor

    @property
    def has_other_factor(self) -> bool:
        """True if programs that assume SD1.5's factor would scale the folder's latents incorrectly."""
        return self.factor != SD15_SCALING_FACTOR

    @property
    def dtype(self) -> str:
        """torch's name of a dtype of 16 bits in which the VAE does not overflow. Only SD1.5's is known to fit into fp16."""
        return "float16" if self.space == LatentSpace() else "bfloat16"

    @property
    def overflow(self) -> str:
        """Words on the VAE in fp16, or ""."""
        if self.dtype == "float16":
            return ""
        return "SDXL's VAE overflows" if self.space.factor == SDXL_SCALING_FACTOR else "this VAE may overflow"

    def __str__(self) -> str:
        text = f"{self.channels} channels, {self.space}"
        if self.stored != self.space:
            return f"{text}, folded into its weights, which have SD1.5's {self.factor:g}"
        return text + (f" (SD1.5: {SD15_SCALING_FACTOR:g})" if self.has_other_factor else "")
