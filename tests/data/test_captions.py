"""Caption edits: the effect of each key, randomness as a function of (seed, position), and the filter by tag."""

from collections import Counter

import numpy as np
import pytest
import torch
from caching import Texts
from sentences import refused

from fastsd.config.schema import StageTable
from fastsd.data.captions import captions_for, select
from fastsd_kernels.noise import Purpose, uniform


def edited(variants, count=1, seed=5, first=0, **keys):
    """Return the edited captions of a sample at positions [first, first + count)."""
    stage = StageTable(train=["unet"], until=1, **keys)
    variants = [variants] if isinstance(variants, str) else variants
    return captions_for([variants] * count, torch.arange(first, first + count), stage, seed)


ODD_CAPTIONS = ["a ,b,,  c, d", "", " two  spaces. And\ttabs ,", "e.g. 3.5 m,\n", ", ,", "."]


@pytest.mark.parametrize("text", ODD_CAPTIONS)
def test_captions_stay_unchanged_without_edits(text):
    assert edited(text, keep_tags=2, tag_separator=";") == [text]


def test_max_tags_keeps_the_first_and_normalises_the_separators():
    assert edited("a ,b,,  c, d", max_tags=3) == ["a, b, c"]
    assert edited("a|b, still b|c", max_tags=2, tag_separator="|") == ["a| b, still b"]
    assert edited("a; b;c;d", max_tags=3, tag_separator=";") == ["a; b; c"]
    assert edited("a  b c d", max_tags=3, tag_separator=" ") == ["a b c"]
    assert edited("", max_tags=2) == [""]


def test_variants_are_equally_likely_and_drawn_by_position():
    drawn = edited(["x", "y", "z"], 6000)
    assert all(abs(count - 2000) < 200 for count in Counter(drawn).values()) and len(set(drawn)) == 3
    assert edited(["x", "y", "z"], 100, first=900) == drawn[900:1000]
    assert edited(["x", "y", "z"], 6000, seed=6) != drawn


def test_caption_dropout_is_a_function_of_seed_and_position():
    dropped = [text == "" for text in edited("x", 4000, caption_dropout=0.25)]
    assert dropped == (uniform(5, Purpose.CAPTION, torch.arange(4000))[:, 0] < 0.25).tolist()
    assert abs(sum(dropped) / 4000 - 0.25) < 0.03
    assert edited("x", 50, first=7, caption_dropout=0.25) == ["" if drop else "x" for drop in dropped[7:57]]
    assert [text == "" for text in edited("x", 4000, seed=6, caption_dropout=0.25)] != dropped
    assert edited("x", 4000, caption_dropout=1.0) == [""] * 4000


def test_tags_are_shuffled_after_the_kept_ones():
    shuffled = edited("a, b, c ,d,e", 4000, shuffle_tags=True, keep_tags=2)
    assert all(text.startswith("a, b, ") for text in shuffled)
    counts = Counter(shuffled)
    assert len(counts) == 6 and all(abs(count - 4000 / 6) < 150 for count in counts.values())
    assert edited("a, b, c ,d,e", 10, first=90, shuffle_tags=True, keep_tags=2) == shuffled[90:100]
    assert edited("a, b", shuffle_tags=True, keep_tags=9) == ["a, b"]


def test_tags_drop_out_independently():
    left = edited("a, b, c, d", 4000, tag_dropout=0.3, keep_tags=1)
    for tag in "bcd":
        assert abs(sum(tag in text for text in left) / 4000 - 0.7) < 0.04
    assert all(text.split(", ") == sorted(text.split(", ")) and text.startswith("a") for text in left)
    assert set(edited("a, b", 20, tag_dropout=1.0)) == {""}


def test_max_tags_is_applied_last():
    cut = edited("a, b, c, d, e", 500, shuffle_tags=True, keep_tags=1, tag_dropout=0.2, max_tags=3)
    assert all(len(text.split(", ")) <= 3 and text.startswith("a") for text in cut)
    assert set("".join(cut)) - set(", ") == set("abcde")  # shuffling may move any tag before the limit


def test_sentences_are_shuffled():
    text = "A dog of 3.5 kg. It is 2 m. away from J. Smith, e.g. here\nDr. No. vs. us. The end"
    sentences = {"A dog of 3.5 kg", "It is 2 m. away from J. Smith, e.g. here\nDr. No", "vs. us", "The end"}
    shuffled = edited(text, 600, shuffle_sentences=True)
    assert len(set(shuffled)) == 24
    assert all(part in text for text in shuffled for part in sentences)
    assert set(edited("One two. Three.", 20, shuffle_sentences=True)) == {"One two. Three.", "Three. One two."}
    assert edited(" only one. ", shuffle_sentences=True) == [" only one. "]


def test_sentences_are_shuffled_before_tags():
    # Joining the shuffled sentences adds a separator.
    both = edited("one two.\nthree four", 300, shuffle_sentences=True, shuffle_tags=True, tag_separator=" ")
    tags = {tuple(sorted(text.split(" "))) for text in both}
    assert tags == {("four", "one", "three", "two."), ("four.", "one", "three", "two")}
    assert len(set(both)) > 30


def test_a_very_long_caption_does_not_change_the_others_of_its_batch():
    stage = StageTable(train=["unet"], until=1, shuffle_tags=True, tag_dropout=0.5)
    texts = ["a, b, c", ", ".join(map(str, range(5000))), "", "d, e"]
    together = captions_for([[text] for text in texts], torch.arange(4) + 10, stage, 5)
    alone = [captions_for([[text]], torch.tensor([10 + i]), stage, 5)[0] for i, text in enumerate(texts)]
    assert together == alone and 2200 < together[1].count(",") < 2800


def test_samples_are_selected_by_tag():
    cache = Texts([["Red, round"], ["blue , round"], ["blue", "x,  RED "], [""], ["reddish, round"]])

    def selected(include=(), exclude=(), separator=","):
        return select(cache, include, exclude, separator).tolist()

    assert selected(include=("red",)) == [0, 2]
    assert selected(include=(" Round ", "x")) == [0, 1, 2, 4]
    assert selected(exclude=("RED",)) == [1, 3, 4]
    assert selected(include=("round",), exclude=("blue",)) == [0, 4]
    assert selected(include=("blue , round",), separator=";") == [1]
    assert select(cache, (), (), ",") is None


def test_selection_reads_a_large_cache_in_chunks():
    cache = Texts([["a"], ["b"], ["a, c"]], copies=10_000)
    selected = select(cache, ("a",), ("c",), ",")
    assert selected.dtype == np.int64 and np.array_equal(selected, np.arange(0, 30_000, 3))


def test_a_filter_that_excludes_all_images_is_an_error():
    with refused("filter-leaves-none", filters="data.include ['c'] and data.exclude ['a']", images=1):
        select(Texts([["a"]]), ("c",), ("a",), ",")
