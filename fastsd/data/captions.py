"""Caption edits between the cache and the tokenizer, as a pure function of (seed, sample position).

The steps in order: choose a variant; replace it by "" (caption dropout); shuffle sentences; shuffle tags, drop tags, limit
their number.  The tag edits have the order of kohya's trainers, which call the keys shuffle_caption, keep_tokens and
caption_tag_dropout_rate.  If no key asks for an edit, the caption stays unchanged byte for byte.

Random numbers of a position, by lane: 0 caption dropout, 1 variant; then four for each tag or sentence i of the caption,
4 + 4 i its order among the tags, 5 + 4 i its dropout, 6 + 4 i its order among the sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor

from fastsd.config.schema import StageTable
from fastsd.data.cache import LatentCache
from fastsd.errors import UserError
from fastsd_kernels.noise import Purpose, uniform

_USUAL_COUNT = 64  # tags or sentences per caption up to which one draw serves a whole batch
_CHUNK = 4096  # samples with captions read together
# A full stop before a space or the end, except after a single letter (e.g., U.S., J. Smith) or a common abbreviation.
_SENTENCE_END = re.compile(r"(?<!\b\w)(?<!\b(?:mr|ms|dr|st|vs))(?<!\bmrs)\.(?:\s+|$)", re.IGNORECASE)


def captions_for(variants_B: Sequence[Sequence[str]], positions_B: Tensor, stage: StageTable, seed: int) -> list[str]:
    """Choose and edit the captions of a batch for the model.

    Args:
        variants_B: the captions of B samples, at least one per sample; all variants are equally likely.
        positions_B: int64, the samples' global positions; together with the seed they determine all random choices.
        stage: `caption_dropout` is the share replaced by "".  `shuffle_sentences` reorders sentences, which end with full
            stops.  `shuffle_tags`, `tag_dropout` and `max_tags` edit tags, except that neither shuffling nor dropout affects
            the first `keep_tags`.  Edited tags are stripped, empty ones removed, and the rest joined with ", ".
        seed: the seed of the run.
    """
    assert len(variants_B) == len(positions_B)
    first_B2 = uniform(seed, Purpose.CAPTION, positions_B, 2).tolist()
    chosen = [variants[int(lane * len(variants))] for variants, (_, lane) in zip(variants_B, first_B2, strict=True)]
    captions = ["" if lane < stage.caption_dropout else text for text, (lane, _) in zip(chosen, first_B2, strict=True)]
    edits_tags = bool(stage.shuffle_tags or stage.tag_dropout or stage.max_tags)
    if edits_tags or stage.shuffle_sentences:
        for i, draws in enumerate(_draws(captions, positions_B, stage, seed)):
            if stage.shuffle_sentences:
                captions[i] = _shuffle_sentences(captions[i], draws[2])
            if edits_tags:
                captions[i] = _edit_tags(captions[i], stage, draws[0], draws[1])
    return captions


def _draws(captions: list[str], positions_B: Tensor, stage: StageTable, seed: int) -> Iterator[list[list[float]]]:
    """Yield four lists of random numbers per caption, each with one number per tag or sentence that it can have."""
    # Joining shuffled sentences may add one tag separator for each full stop.
    counts = [1 + text.count(stage.tag_separator) + text.count(".") for text in captions]
    usual = min(max(counts), _USUAL_COUNT)
    draws_BK = uniform(seed, Purpose.CAPTION, positions_B, 4 + 4 * usual)
    for count, position_1, draws_K in zip(counts, positions_B.split(1), draws_BK, strict=True):
        if count > usual:
            draws_K = uniform(seed, Purpose.CAPTION, position_1, 4 + 4 * count)[0]
        yield draws_K[4:].view(-1, 4).T.tolist()


def _edit_tags(text: str, stage: StageTable, order: list[float], dropout: list[float]) -> str:
    tags = [tag for words in text.split(stage.tag_separator) if (tag := words.strip())]
    numbers: Sequence[int] = range(stage.keep_tags, len(tags))
    if stage.shuffle_tags:
        numbers = sorted(numbers, key=order.__getitem__)
    kept = [tags[i] for i in numbers if dropout[i] >= stage.tag_dropout]
    return ", ".join([*tags[: stage.keep_tags], *kept][: stage.max_tags or None])


def _shuffle_sentences(text: str, order: list[float]) -> str:
    sentences = [sentence for words in _SENTENCE_END.split(text) if (sentence := words.strip())]
    if len(sentences) < 2:
        return text
    numbers = sorted(range(len(sentences)), key=order.__getitem__)
    return ". ".join(sentences[i] for i in numbers) + ("." if text.rstrip().endswith(".") else "")


def select(cache: LatentCache, include: tuple[str, ...], exclude: tuple[str, ...], separator: str) -> np.ndarray | None:
    """Select samples that have at least one tag of `include` (if it is not empty) and no tag of `exclude`.

    Tags are the text between separators in any of a sample's captions, compared without surrounding spaces and case.

    Returns:
        Sorted int64 indices, or None for all samples.

    Raises:
        UserError: no sample is left.
    """
    return _selected(cache, include, exclude, separator) if include or exclude else None


@lru_cache(maxsize=2)  # usually all stages of a run have the same arguments
def _selected(cache: LatentCache, include: tuple[str, ...], exclude: tuple[str, ...], separator: str) -> np.ndarray:
    included_tags, excluded_tags = ({tag.strip().casefold() for tag in tags} for tags in (include, exclude))
    kept_chunks = []
    for first in range(0, len(cache), _CHUNK):
        chunk = range(first, min(first + _CHUNK, len(cache)))
        kept = []
        for index, variants in zip(chunk, cache.variants(chunk), strict=True):
            tags = {tag.strip() for text in variants for tag in text.casefold().split(separator.casefold())}
            if (not included_tags or not included_tags.isdisjoint(tags)) and excluded_tags.isdisjoint(tags):
                kept.append(index)
        kept_chunks.append(np.array(kept, np.int64))
    selected = np.concatenate(kept_chunks)
    if not len(selected):
        filters = " and ".join(f"data.{key} {list(tags)}" for key, tags in (("include", include), ("exclude", exclude)) if tags)
        raise UserError(
            "filter-leaves-none",
            f"{filters} exclude all {len(cache)} images; remove tags, or write them as in the captions",
        )
    return selected
