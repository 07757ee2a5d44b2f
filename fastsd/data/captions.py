"""Caption edits between the cache and the tokenizer, as a pure function of (seed, sample position).

The edits are made in this order: choose a variant, replace it by "" (caption dropout), shuffle its sentences, shuffle its tags,
drop tags, limit their number.  kohya's trainers edit tags in the same order and call the keys shuffle_caption, keep_tokens and
caption_tag_dropout_rate.  If no key asks for an edit, the caption stays unchanged byte for byte.

Each position has its own random numbers.  Number 0 decides on caption dropout, and number 1 chooses the variant.  Tag i is
ordered by number 4 + 4 i and dropped by number 5 + 4 i.  Sentence i is ordered by number 6 + 4 i.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor

from fastsd.config.schema import StageTable
from fastsd.data.cache import LatentCache
from fastsd.errors import UserError
from fastsd.terminal.texts import numbered
from fastsd_kernels.noise import Purpose, uniform

_SHARED_COUNT = 64  # one draw serves all captions of a batch that have at most this many tags and sentences
_CHUNK = 4096  # samples whose captions are read together
# A full stop before a space or the end ends a sentence, except after a single letter (U.S., J. Smith) or an abbreviation.
_SENTENCE_END = re.compile(r"(?<!\b\w)(?<!\b(?:mr|ms|dr|st|vs))(?<!\bmrs)\.(?:\s+|$)", re.IGNORECASE)


def captions_for(variants_B: Sequence[Sequence[str]], positions_B: Tensor, stage: StageTable, seed: int) -> list[str]:
    """Choose and edit the captions of a batch for the model.

    Args:
        variants_B: the captions of B samples, at least one per sample. All variants are equally likely.
        positions_B: the samples' global positions, int64. With the seed, they determine all random choices.
        stage: `caption_dropout` is the fraction of captions that are replaced by "".  `shuffle_sentences` reorders
            sentences, which end with full stops.  `shuffle_tags`, `tag_dropout` and `max_tags` edit tags, but the first
            `keep_tags` tags are neither shuffled nor dropped.  Edited tags are stripped and joined with the separator and a
            space.
        seed: the seed of the run.
    """
    assert len(variants_B) == len(positions_B)
    draws_B2 = uniform(seed, Purpose.CAPTION, positions_B, 2).tolist()
    captions = []
    for variants, (dropout, choice) in zip(variants_B, draws_B2, strict=True):
        captions.append("" if dropout < stage.caption_dropout else variants[int(choice * len(variants))])
    edits_tags = bool(stage.shuffle_tags or stage.tag_dropout or stage.max_tags)
    if edits_tags or stage.shuffle_sentences:
        for i, (tag_order, tag_dropout, sentence_order, _) in enumerate(_draws(captions, positions_B, stage, seed)):
            if stage.shuffle_sentences:
                captions[i] = _shuffle_sentences(captions[i], sentence_order)
            if edits_tags:
                captions[i] = _edit_tags(captions[i], stage, tag_order, tag_dropout)
    return captions


def _draws(captions: list[str], positions_B: Tensor, stage: StageTable, seed: int) -> Iterator[list[list[float]]]:
    """Yield four lists of random numbers for each caption. Each list has a number for every possible tag or sentence."""
    # When sentences are shuffled, a full stop can become a tag separator.
    counts = [1 + text.count(stage.tag_separator) + text.count(".") for text in captions]
    shared_count = min(max(counts), _SHARED_COUNT)
    draws_BK = uniform(seed, Purpose.CAPTION, positions_B, 4 + 4 * shared_count)
    for count, position_1, draws_K in zip(counts, positions_B.split(1), draws_BK, strict=True):
        if count > shared_count:
            draws_K = uniform(seed, Purpose.CAPTION, position_1, 4 + 4 * count)[0]
        yield draws_K[4:].view(-1, 4).T.tolist()


def _edit_tags(text: str, stage: StageTable, order: list[float], dropout: list[float]) -> str:
    tags = [tag for entry in text.split(stage.tag_separator) if (tag := entry.strip())]
    indices: Sequence[int] = range(stage.keep_tags, len(tags))
    if stage.shuffle_tags:
        indices = sorted(indices, key=order.__getitem__)
    kept = [tags[i] for i in indices if dropout[i] >= stage.tag_dropout]
    separator = stage.tag_separator if stage.tag_separator[-1].isspace() else f"{stage.tag_separator} "
    return separator.join([*tags[: stage.keep_tags], *kept][: stage.max_tags or None])


def _shuffle_sentences(text: str, order: list[float]) -> str:
    sentences = [sentence for text_between in _SENTENCE_END.split(text) if (sentence := text_between.strip())]
    if len(sentences) < 2:
        return text
    indices = sorted(range(len(sentences)), key=order.__getitem__)
    return ". ".join(sentences[i] for i in indices) + ("." if text.rstrip().endswith(".") else "")


def several_captions(cache: LatentCache) -> str:
    """Return a sentence on the samples that have several captions, or "" if there are none."""
    counts: Counter[int] = Counter()
    for first in range(0, len(cache), _CHUNK):
        counts.update(map(len, cache.variants(range(first, min(first + _CHUNK, len(cache))))))
    several = counts.total() - counts[1]
    advice = 'training picks one each time; data.caption_lines = "join" makes one of all lines of a text file'
    return f"{numbered(several, 'image has', 'images have')} several captions, up to {max(counts)}: {advice}" if several else ""


def select(cache: LatentCache, include: tuple[str, ...], exclude: tuple[str, ...], separator: str) -> np.ndarray | None:
    """Select the samples that have a tag of `include` and no tag of `exclude`. An empty `include` accepts all samples.

    The tags of a sample are the parts of all its captions between separators. Case and surrounding spaces do not matter.

    Returns:
        Sorted int64 indices, or None if there is no filter.

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
