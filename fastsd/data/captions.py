"""What happens to a caption between the cache and the tokenizer: a pure function of (seed, sample position)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsd.config import StageTable
from fastsd_kernels.noise import Purpose, uniform


def captions_for(texts: Sequence[str], positions_B: Tensor, stage: StageTable, seed: int) -> list[str]:
    """Captions as the model is to see them.

    Args:
        texts: B captions.
        positions_B: int64, their global sample positions; they alone decide which captions drop out.
        stage: `max_tags` keeps the first n tags, joined by ", "; `caption_dropout` is the share replaced by "".
        seed: the run's.
    """
    assert len(texts) == len(positions_B)
    if stage.caption_dropout > 0:
        dropped = (uniform(seed, Purpose.CAPTION, positions_B)[:, 0] < stage.caption_dropout).tolist()
    else:
        dropped = [False] * len(texts)
    return ["" if drop else _first_tags(text, stage) for text, drop in zip(texts, dropped, strict=True)]


def edit(caption: str, position: int, stage: StageTable, seed: int) -> str:
    """`captions_for` a single caption at a global sample position."""
    return captions_for([caption], torch.tensor([position]), stage, seed)[0]


def _first_tags(text: str, stage: StageTable) -> str:
    if not stage.max_tags:
        return text
    tags = [tag.strip() for tag in text.split(stage.tag_separator)]
    return ", ".join([tag for tag in tags if tag][: stage.max_tags])
