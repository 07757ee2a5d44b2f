"""Token ids, written once: equal to the tokenizer's, tied to their view and tokenizer, never half written."""

import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from caching import Texts
from sentences import refused, says, sentence

from fastsd.config.schema import ModelTable
from fastsd.data.building import tokenize_captions
from fastsd.data.building.tokenize_captions import write_tokens
from fastsd.data.tokens import HEADER_BYTES, Tokens, id_dtype
from fastsd.demo.models import write_tokenizer
from fastsd.model.formats import load
from fastsd.model.formats.load import load_text, load_tokenizer
from fastsd.model.text_encoder import assemble, divide, ids_of, tokenizer_hash
from fastsd.storage import sha256_of

TEXTS = ["", "a red circle", " ".join(["word"] * 500), "naïve 🦊 fox 🦊🦊", "A RED Circle, BLUE-ish", "tab\tand\u00a0space "]
TEXTS += ["<|endoftext|> x", "<|startoftext|>", "don't 3.5", "é", "\u200b", " ".join(["red"] * 75), " ".join(["red"] * 76)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelTable(base=str(tiny_model)))[0]


def odd_cache(folder, count=40):
    """Make a cache of samples that have one to three odd captions each."""
    return Texts([[TEXTS[(i + j) % len(TEXTS)] for j in range(1 + i % 3)] for i in range(count)], folder)


def reference_ids(tokenizer, texts, length=77):
    """Tokenize texts. The tokenizer itself truncates and pads them."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


@pytest.mark.parametrize("length", [77, 248, 3])
def test_assembled_ids_equal_those_of_the_tokenizer(tokenizer, length):
    expected = reference_ids(tokenizer, TEXTS, length)
    ids = ids_of(tokenizer, TEXTS)
    assert torch.equal(assemble(tokenizer, ids, length), expected)
    assert torch.equal(torch.cat([assemble(tokenizer, ids_of(tokenizer, [text]), length) for text in TEXTS]), expected)
    assert len(ids[2]) > 400 and ids[0] == [] and ids_of(tokenizer, []) == []
    assert assemble(tokenizer, [], length).shape == (0, length)


def test_padding_may_be_another_token(tmp_path):
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, pad_token="!")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert torch.equal(assemble(tokenizer, ids_of(tokenizer, TEXTS), 77), reference_ids(tokenizer, TEXTS))


def test_the_text_encoder_tokenizes_like_its_tokenizer(tiny_model, tokenizer):
    text = load_text(ModelTable(base=str(tiny_model)), tiny_model)
    assert torch.equal(text.tokenize(TEXTS), reference_ids(tokenizer, TEXTS))


def test_the_tokenizer_hash_depends_only_on_the_vocabulary(tokenizer, tiny_model, tmp_path):
    key = tokenizer_hash(tokenizer)
    reference_ids(tokenizer, ["x"])  # from now on the tokenizer truncates and pads
    assert tokenizer_hash(tokenizer) == key == tokenizer_hash(load_tokenizer(ModelTable(base=str(tiny_model)))[0])
    write_tokenizer(tmp_path)
    merges = tmp_path / "merges.txt"
    merges.write_text("\n".join(merges.read_text().splitlines()[:-1]) + "\n")
    assert tokenizer_hash(load_tokenizer(ModelTable(base=str(tiny_model), tokenizer=str(tmp_path)))[0]) != key


def test_the_tokenizer_loads_without_the_text_encoder(tiny_model, monkeypatch, tmp_path):
    for name in ("open_file", "read_component"):
        monkeypatch.setattr(load, name, lambda path, *others: 1 / 0)
    tokenizer, folder = load_tokenizer(ModelTable(base=str(tiny_model)))
    assert folder == tiny_model / "tokenizer" and len(tokenizer) > 0
    (tmp_path / "base.safetensors").write_bytes(b"")
    with refused("single-file-tokenizer"):
        load_tokenizer(ModelTable(base=str(tmp_path / "base.safetensors")))


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_stored_rows_equal_the_ids_of_the_tokenizer(tokenizer, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(tokenize_captions, "_CHUNK", chunk)
    cache = odd_cache(tmp_path)
    write_tokens(cache, tokenizer)
    tokens = Tokens(cache, tokenizer, 77)
    for i, variants in enumerate(cache.all):
        rows = torch.stack([tokens.row(i, variant) for variant in range(len(variants))])
        assert rows.dtype == torch.int64 and torch.equal(rows, reference_ids(tokenizer, variants))
    monkeypatch.undo()
    copy = odd_cache(tmp_path / "copy")
    copy.path.parent.mkdir(parents=True)
    write_tokens(copy, tokenizer)
    assert sha256_of(tokens.path) == sha256_of(Tokens(copy, tokenizer, 77).path)  # for any chunk size


@pytest.mark.parametrize("cut", ["tokens", "commas", "words"])
def test_truncated_captions_are_counted(tokenizer, tmp_path, cut):
    write_tokens(odd_cache(tmp_path, 39), tokenizer)
    texts = [text for variants in odd_cache(tmp_path, 39).all for text in variants]
    counts = set()
    for length, chunks, limit in ((77, 1, 1), (78, 1, 1), (6, 1, 1), (6, 3, 3), (32, "auto", 3), (8, "auto", 3)):
        count = sum(len(divide(tokenizer, ids, length - 2, cut)) > limit for ids in ids_of(tokenizer, texts))
        text = Tokens(odd_cache(tmp_path, 39), tokenizer, length, chunks, cut).truncation()
        fields = {"captions": count, "capacity": length - 2} | ({"chunks": limit} if limit > 1 else {})
        name = "truncated-captions" if limit == 1 else "truncated-chunks"
        assert text == (sentence(name, **fields) if count else "")
        counts.add(count)
    assert len(counts) > 3


def test_existing_token_ids_are_not_written_again(tokenizer, tmp_path):
    cache = odd_cache(tmp_path)
    write_tokens(cache, tokenizer)
    path = Tokens(cache, tokenizer, 77).path
    before = path.stat()
    write_tokens(cache, tokenizer)
    assert path.stat().st_ino == before.st_ino
    cache.sha256, cache.all = "2", cache.all[1:]
    write_tokens(cache, tokenizer)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert torch.equal(Tokens(cache, tokenizer, 77).row(0, 1), reference_ids(tokenizer, cache.all[0])[1])


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(position, bits=0xFF):
    def change(path):
        data = bytearray(path.read_bytes())
        data[position] ^= bits
        path.write_bytes(data)

    return change


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip(0), flip(20), lambda path: path.write_bytes(b"")])
def test_missing_and_damaged_files_are_reported_and_rebuilt(tokenizer, tmp_path, damage):
    cache = odd_cache(tmp_path)
    write_tokens(cache, tokenizer)
    path = Tokens(cache, tokenizer, 77).path
    damage(path)
    with refused("frozen-file-damaged", path=path):
        Tokens(cache, tokenizer, 77)
    write_tokens(cache, tokenizer)
    assert Tokens(cache, tokenizer, 77).is_sound()


def test_token_ids_of_another_view_or_tokenizer_are_refused(tokenizer, tmp_path, tiny_model):
    cache = odd_cache(tmp_path)
    write_tokens(cache, tokenizer)
    with refused("frozen-file-damaged", damage=sentence("damage-outdated")):
        Tokens(Texts(cache.all, tmp_path, sha256="2"), tokenizer, 77)
    write_tokenizer(tmp_path / "other")
    (tmp_path / "other/merges.txt").write_text("#version: 0.2\n")
    other = load_tokenizer(ModelTable(base=str(tiny_model), tokenizer=str(tmp_path / "other")))[0]
    with refused("frozen-file-damaged", damage=sentence("damage-missing")):
        Tokens(cache, other, 77)


def test_a_flipped_bit_is_detected(tokenizer, tmp_path):
    cache = Texts([["a red circle"], ["blue"]], tmp_path)
    write_tokens(cache, tokenizer)
    path = Tokens(cache, tokenizer, 77).path
    ids_start = 4096 + 3 * 8
    # An id beyond the vocabulary, a false END, and a wrong offset. The last is a valid id, which only the sha256 detects.
    cases = (ids_start + 1, 0x40, True), (ids_start + 7, 0x40, True), (4096 + 9, 0x40, True), (ids_start, 1, False)
    for position, bit, row_detects in cases:
        opened = Tokens(cache, tokenizer, 77)
        flip(position, bit)(path)
        with refused("frozen-file-damaged", path=path, damage=sentence("damage-sha256")):
            Tokens(cache, tokenizer, 77)
        if row_detects:
            with refused("frozen-file-damaged", path=path) as error:
                opened.row(0, 0)
            assert says(str(error.value), "damage-sample", sample=0) or says(str(error.value), "damage-truncated")
        flip(position, bit)(path)
    assert Tokens(cache, tokenizer, 77).is_sound()


def test_an_interrupted_write_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    cache = odd_cache(tmp_path)
    monkeypatch.setattr(tokenize_captions, "_CHUNK", 8)
    answers = [ids_of, ids_of, Mock(side_effect=KeyboardInterrupt)]  # the third chunk is interrupted
    monkeypatch.setattr(tokenize_captions, "ids_of", lambda *args: answers.pop(0)(*args))
    with pytest.raises(KeyboardInterrupt):
        write_tokens(cache, tokenizer)
    assert not list((tmp_path / "tokens").iterdir())


def test_a_large_vocabulary_takes_32_bits(tmp_path):
    class Wide:
        bos_token_id, eos_token_id, pad_token_id = 70_000, 70_001, 70_001

        def __len__(self):
            return 70_002

        def get_vocab(self):
            return {"a": 0}

        bpe_ranks = {("a", "b"): 0}

        def __call__(self, texts, **_):
            return type("Encoding", (), {"input_ids": [[65_535, 69_999] * len(text) for text in texts]})

    cache = Texts([["ab"], [""]], tmp_path)
    write_tokens(cache, Wide())
    assert Tokens(cache, Wide(), 6).row(0, 0).tolist() == [70_000, 65_535, 69_999, 65_535, 69_999, 70_001]
    assert Tokens(cache, Wide(), 3).row(1, 0).tolist() == [70_000, 70_001, 70_001]


def test_memory_does_not_grow_with_the_number_of_captions(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_captions, "_CHUNK", 32)

    def peak(count, name):
        (tmp_path / name).mkdir()
        tracemalloc.start()
        write_tokens(Texts([["a red circle " * 40]] * count, tmp_path / name), tokenizer)
        return (tracemalloc.get_traced_memory()[1], tracemalloc.stop())[0]

    peak(64, "first")  # allocates what is allocated only once
    assert peak(2000, "many") < 1.2 * peak(100, "few")


def test_ids_that_no_token_has_are_damage(tokenizer, tmp_path):
    cache = Texts([["red circle"]], tmp_path)
    write_tokens(cache, tokenizer)
    tokens = Tokens(cache, tokenizer, 77)
    for number, is_token in ((len(tokenizer) - 1, True), (len(tokenizer), False)):
        with tokens.path.open("r+b") as file:  # damage after the file was opened and checked
            file.seek(HEADER_BYTES + 8 * 2)
            file.write(np.array([number], id_dtype(tokenizer)).tobytes())
        if is_token:
            assert tokens.row(0, 0)[1] == number
        else:
            with refused("frozen-file-damaged", damage=sentence("damage-sample", sample=0)):
                tokens.row(0, 0)


def test_a_file_for_another_number_of_samples_is_refused(tokenizer, tmp_path):
    cache = odd_cache(tmp_path, 4)
    write_tokens(cache, tokenizer)
    for count in (3, 5):
        with refused("frozen-file-damaged", path=Tokens(cache, tokenizer, 77).path) as error:
            Tokens(odd_cache(tmp_path, count), tokenizer, 77)
        assert "inconsistent lengths" in str(error.value)
