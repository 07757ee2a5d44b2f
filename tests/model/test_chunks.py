"""Divide captions into windows as other tools do, and read captions of different lengths together as each alone."""

import math
import random
import re
from functools import cache
from itertools import combinations_with_replacement

import pytest
import torch
from tiny import make_tiny_model

from fastsd.config.schema import ModelTable, SampleTable
from fastsd.model.formats.load import load_model
from fastsd.model.text_encoder import AUTO_CHUNKS, chunk_limit, divide, ids_of, pad
from fastsd.sampling.generate import denoise

WORDS = [
    "red",
    "circle",
    "qvwxkzj",
    "qvwxkzjb",
    "extraordinary",
    "of",
    "(blue)",
    "star's",
    "a",
    "unbelievablenonsense",
    "x1",
    "<|endoftext|>",
    "é",
]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Return a function that loads a model with given keys of `[model]`, once."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(path)
    return cache(lambda **keys: load_model(ModelTable(base=str(path), **keys)))


def captions(count, seed, separators=(" ", " ", " ", ", ", ",")):
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, 5, 20, 40, 60, 90]) for _ in range(count)]
    return ["".join(draw.choice(WORDS) + draw.choice(separators) for _ in range(length)) for length in lengths]


def a1111(ids, comma, backtrack, capacity):
    """Windows of A1111's `tokenize_line`, which walks over the tokens. A `None` is the keyword BREAK."""
    windows, window, last_comma = [], [], -1
    for id in ids:
        if id == comma:
            last_comma = len(window)
        elif backtrack and len(window) == capacity and last_comma != -1 and len(window) - last_comma <= backtrack:
            windows, window, last_comma = [*windows, window[: last_comma + 1]], window[last_comma + 1 :], -1
        if id is None or len(window) == capacity:
            windows, window, last_comma = [*windows, window], [], -1
        window += [] if id is None else [id]
    return [*windows, window] if window or not windows else windows


def comfyui(groups, capacity):
    """Windows of ComfyUI's `tokenize_with_weights`, which packs groups of tokens. A group of 8 or more may be broken."""
    windows = [[]]
    for group in groups:
        large = len(group) >= 8
        while group:
            room = capacity - len(windows[-1])
            if len(group) <= room:
                windows[-1], group = windows[-1] + group, []
            else:
                windows[-1], group = (windows[-1] + group[:room], group[room:]) if large else (windows[-1], group)
                windows.append([])
    return windows


def windows_of(text, captions):
    """Return the ids of every window of every caption, without begin, end and padding."""
    begin, end = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id
    rows = [text.tokenize([caption])[0].view(-1, text.window).tolist() for caption in captions]
    assert all(window[0] == begin and end in window for row in rows for window in row)
    return [[window[1:-1] for window in row] for row in rows]


def padded(windows, text):
    """Pad as A1111 and ComfyUI do for SD1.5: with the end token."""
    return [[*window, *[text.tokenizer.eos_token_id] * (text.window - 2 - len(window))] for window in windows]


@pytest.mark.parametrize("seed", range(3))
def test_commas_are_those_of_a1111(model_of, seed):
    text = model_of(chunks="auto", cut="commas").text
    texts, comma = captions(40, seed), text.tokenizer.get_vocab()[",</w>"]
    expected = [a1111(ids, comma, 20, 75) for ids in ids_of(text.tokenizer, texts)]
    assert windows_of(text, texts) == [padded(windows[:AUTO_CHUNKS], text) for windows in expected]
    plain = [a1111(ids, comma, 0, 75) for ids in ids_of(text.tokenizer, texts)]  # its setting is 0
    assert windows_of(model_of(chunks="auto").text, texts) == [padded(windows[:AUTO_CHUNKS], text) for windows in plain]
    assert sum(a != b for a, b in zip(expected, plain, strict=True)) > 5 and {len(windows) for windows in expected} >= {
        1,
        2,
        3,
        4,
    }


@pytest.mark.parametrize("capacity", [20, 75])
def test_words_and_tokens_are_those_of_comfyui(model_of, capacity):
    """Earlier versions of ComfyUI tokenize word by word, today's a whole prompt. Spaces surround digits and punctuation."""
    tokenizer, differ = model_of().text.tokenizer, 0
    pattern = r"<\|endoftext\|>|'s|[^\W\d_]+|\d|[^\w\s]+"
    spaced = [" ".join(re.findall(pattern, caption)) for caption in captions(90, 3)]
    for caption in spaced:
        (ids,) = ids_of(tokenizer, [caption])
        by_word = comfyui(ids_of(tokenizer, caption.split()), capacity)
        assert divide(tokenizer, ids, capacity, "words") == by_word
        assert divide(tokenizer, ids, capacity, "tokens") == comfyui([ids] if len(ids) >= 8 else [[id] for id in ids], capacity)
        differ += by_word != divide(tokenizer, ids, capacity, "tokens")
    assert differ > 5


@pytest.mark.parametrize("cut", ["tokens", "commas", "words"])
def test_windows_lose_nothing(model_of, cut):
    tokenizer = model_of().text.tokenizer
    for capacity in (1, 2, 7, 75):
        for ids in ids_of(tokenizer, captions(20, capacity)):
            windows = divide(tokenizer, ids, capacity, cut)
            assert [id for window in windows for id in window] == ids
            assert all(0 < len(window) <= capacity for window in windows) or windows == [[]]


@pytest.mark.parametrize("cut", ["tokens", "commas", "words"])
def test_a_whole_number_of_chunks_is_the_reading_that_the_card_describes(model_of, cut):
    """In A1111 with one BREAK more than chunks are missing, in ComfyUI with empty prompts behind the prompt."""
    text = model_of(chunks=3, cut=cut).text
    texts, empty = captions(30, 5), text.tokenize([""])[0, : text.window]
    for caption, (ids,) in ((caption, ids_of(text.tokenizer, [caption])) for caption in texts):
        windows = divide(text.tokenizer, ids, 75, cut)
        if len(windows) < 3:
            breaks = a1111([*ids, *[None] * (3 - len(windows) + 1)], text.tokenizer.get_vocab()[",</w>"], 0, 75)
            if cut == "tokens":
                assert windows_of(text, [caption]) == [padded(breaks, text)]
            concatenated = [row_of(text, window) for window in windows] + [empty] * (3 - len(windows))
            assert torch.equal(text.tokenize([caption])[0], torch.cat(concatenated))


def row_of(text, ids):
    begin, end = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id
    return torch.tensor([begin, *ids, *[end] * (text.window - 1 - len(ids))])


def test_an_automatic_number_of_windows_is_that_of_the_caption(model_of):
    auto, texts = model_of(chunks="auto").text, captions(40, 7)
    for caption, ids in zip(texts, ids_of(auto.tokenizer, texts), strict=True):
        needed = min(max(math.ceil(len(ids) / 75), 1), AUTO_CHUNKS)
        alone = auto.tokenize([caption])
        assert torch.equal(alone, model_of(chunks=needed).text.tokenize([caption])), len(ids)
    assert auto.tokenize([]).shape == (0, 77)


def test_few_lengths_can_occur(model_of):
    """A CUDA graph is captured for each."""
    text = model_of(chunks="auto").text
    by_count = {len(text.tokenize([caption])[0]): caption for caption in captions(40, 7)}
    assert len(by_count) == AUTO_CHUNKS == chunk_limit("auto")
    sizes = (1, 2, 3, 4)
    batches = [list(batch) for size in sizes for batch in combinations_with_replacement(by_count.values(), size)]
    assert sorted({text.tokenize(batch).shape[1] for batch in batches}) == text.lengths == [77, 154, 231, 462]
    assert model_of(chunks=2).text.lengths == [154] and len(text.lengths) <= 8


@pytest.mark.parametrize("cut", ["tokens", "commas", "words"])
def test_a_caption_in_a_batch_is_read_as_alone(model_of, cut):
    """The attention's output for repeated windows is that for the windows once. With empty windows it would differ."""
    model = model_of(chunks="auto", cut=cut)
    unet, text, texts = model.unet, model.text, captions(12, 9)
    assert {len(text.tokenize([caption])[0]) for caption in texts} == {77, 154, 231}
    latents, t = torch.randn(len(texts), 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(len(texts)) * 80
    with torch.no_grad():
        ids = text.tokenize(texts)
        assert ids.shape[1] == 462
        together = unet(latents, t, text.encode(ids))
        empty, deviation = text.tokenize([""])[0], 0.0
        for i, caption in enumerate(texts):
            (alone,) = text.tokenize([caption])
            assert torch.equal(ids[i, : len(alone)], alone)  # bit for bit, and then repeated
            expected = unet(latents[i : i + 1], t[i : i + 1], text.encode(alone[None]))[0]
            torch.testing.assert_close(together[i], expected, rtol=1e-4, atol=1e-5)
            with_empty = torch.cat([alone, *[empty] * ((462 - len(alone)) // 77)])[None]
            other = unet(latents[i : i + 1], t[i : i + 1], text.encode(with_empty))[0]
            deviation = max(deviation, (other - expected).abs().max().item())
    assert deviation > 1e-3


def test_gradients_in_a_batch_are_those_of_each_caption_alone(model_of):
    model = model_of(chunks="auto")
    text, texts = model.text, ["red circle " * count for count in (1, 50, 90, 110, 0)]
    latents, t = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(5) * 150
    assert text.tokenize(texts).shape[1] > max(len(text.tokenize([caption])[0]) for caption in texts)

    def gradients(batches):
        for module in (model.unet, text.module):
            module.zero_grad(set_to_none=True)
        for batch in batches:
            output = model.unet(latents[batch], t[batch], text.encode(text.tokenize([texts[i] for i in batch])))
            output.square().sum().backward()
        return [torch.cat([p.grad.flatten() for p in module.parameters()]) for module in (model.unet, text.module)]

    for together, alone in zip(gradients([[0, 1, 2, 3, 4]]), gradients([[i] for i in range(5)]), strict=True):
        assert (together - alone).norm() < 1e-5 * alone.norm()


def test_rows_are_repeated_to_a_common_length():
    rows = [torch.arange(length * 2).view(length, 2) for length in (2, 3)]
    assert torch.equal(pad(rows), torch.stack([rows[0].repeat(3, 1), rows[1].repeat(2, 1)]))
    assert torch.equal(pad(rows[:1], 4), rows[0].repeat(2, 1)[None])


def test_a_prompt_and_its_negative_prompt_are_drawn_as_each_alone(model_of):
    model, long, longer = model_of(chunks="auto"), "red circle " * 50, "blue star " * 90
    eps = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def drawn(prompts, negative, guidance, rows=slice(None)):
        table = SampleTable(steps=3, guidance=guidance, negative=negative)
        return denoise(model, prompts, eps[rows], list(range(len(eps[rows]))), table)

    prompts = [long, "blue", longer]
    together = drawn(prompts, "", 1.0)
    for i, prompt in enumerate(prompts):
        alone = drawn([prompt], "", 1.0, slice(i, i + 1))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)
        only_negative = drawn(["blue"], prompt, 0.0, slice(i, i + 1))
        torch.testing.assert_close(only_negative, alone, rtol=1e-3, atol=1e-3)
