"""Token ids made once: equal to what the tokenizer says each time, tied to their view and tokenizer, never half written."""

import tracemalloc
from pathlib import Path

import pytest
import torch

from fastsd.config.schema import ModelTable
from fastsd.data.building import tokenize_captions
from fastsd.data.building.tokenize_captions import write_tokens
from fastsd.data.tokens import Tokens
from fastsd.demo.models import write_tokenizer
from fastsd.errors import UserError
from fastsd.model.formats import load
from fastsd.model.formats.load import load_text, load_tokenizer
from fastsd.model.text_encoder import assemble, ids_of, tokenizer_hash
from fastsd.storage import sha256_of

ODD = ["", "a red circle", " ".join(["word"] * 500), "naïve 🦊 fox 🦊🦊", "A RED Circle, BLUE-ish",
       "tab\tand\u00a0space ", "<|endoftext|> x",
       "<|startoftext|>", "don't 3.5", "é", "\u200b", " ".join(["red"] * 75), " ".join(["red"] * 76)]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelTable(base=str(tiny_model)))[0]


class Texts:
    """Stands for a view: the captions of its samples."""

    def __init__(self, folder: Path, variants, sha256="1"):
        self.path, self.all, self.sha256 = folder / "views" / "view.safetensors", variants, sha256

    def __len__(self):
        return len(self.all)

    def variants(self, positions):
        return [list(self.all[i]) for i in positions]


def mixed(folder, count=40):
    """Samples with one to three variants each, more than fit a chunk."""
    return Texts(folder, [[ODD[(i + j) % len(ODD)] for j in range(1 + i % 3)] for i in range(count)])


def asked(tokenizer, texts, length=77):
    """The tokenizer's own way of cutting and padding."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


@pytest.mark.parametrize("length", [77, 248, 3])
def test_assembled_ids_are_the_tokenizers(tokenizer, length):
    expected = asked(tokenizer, ODD, length)
    ids = ids_of(tokenizer, ODD)
    assert torch.equal(assemble(tokenizer, ids, length), expected)
    assert torch.equal(torch.cat([assemble(tokenizer, ids_of(tokenizer, [text]), length) for text in ODD]), expected)
    assert len(ids[2]) > 400 and ids[0] == [] and ids_of(tokenizer, []) == []
    assert assemble(tokenizer, [], length).shape == (0, length)


def test_padding_may_be_another_token(tmp_path):
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, pad_token="!")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert torch.equal(assemble(tokenizer, ids_of(tokenizer, ODD), 77), asked(tokenizer, ODD))


def test_the_text_encoder_tokenizes_as_its_tokenizer(tiny_model, tokenizer):
    text = load_text(ModelTable(base=str(tiny_model)), tiny_model)
    assert torch.equal(text.tokenize(ODD), asked(tokenizer, ODD))


def test_the_hash_is_the_vocabularys(tokenizer, tiny_model, tmp_path):
    key = tokenizer_hash(tokenizer)
    asked(tokenizer, ["x"])  # leaves the tokenizer told to cut and pad
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
    (tmp_path / "one.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="has no tokenizer; set model.tokenizer"):
        load_tokenizer(ModelTable(base=str(tmp_path / "one.safetensors")))


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_rows_are_what_tokenizing_gives(tokenizer, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(tokenize_captions, "_CHUNK", chunk)
    cache, done = mixed(tmp_path), []
    assert write_tokens(cache, tokenizer, done.append)
    assert done[-1] == 40 and done == sorted(done)
    tokens = Tokens(cache, tokenizer, 77)
    for i, variants in enumerate(cache.all):
        rows = torch.stack([tokens.row(i, variant) for variant in range(len(variants))])
        assert rows.dtype == torch.int64 and torch.equal(rows, asked(tokenizer, variants))
    monkeypatch.undo()
    again = mixed(tmp_path / "again")
    again.path.parent.mkdir(parents=True)
    write_tokens(again, tokenizer)
    assert sha256_of(tokens.path) == sha256_of(Tokens(again, tokenizer, 77).path)  # whatever the chunk


def test_captions_over_length_are_counted(tokenizer, tmp_path):
    write_tokens(mixed(tmp_path, 39), tokenizer)
    texts = [text for variants in mixed(tmp_path, 39).all for text in variants]
    for length in (77, 78, 6):
        expected = sum(len(ids) > length - 2 for ids in ids_of(tokenizer, texts))
        assert Tokens(mixed(tmp_path, 39), tokenizer, length).over_length() == expected


def test_what_is_there_is_not_made_again(tokenizer, tmp_path):
    cache = mixed(tmp_path)
    write_tokens(cache, tokenizer)
    path = Tokens(cache, tokenizer, 77).path
    before = path.stat()
    assert not write_tokens(cache, tokenizer) and path.stat().st_ino == before.st_ino
    cache.sha256, cache.all = "2", cache.all[1:]
    assert write_tokens(cache, tokenizer) and [file.name for file in path.parent.iterdir()] == [path.name]
    assert torch.equal(Tokens(cache, tokenizer, 77).row(0, 1), asked(tokenizer, cache.all[0])[1])


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(at, by=0xFF):
    def change(path):
        data = bytearray(path.read_bytes())
        data[at] ^= by
        path.write_bytes(data)

    return change


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip(0), flip(20), lambda path: path.write_bytes(b"")])
def test_missing_and_damaged_files_are_said_and_made_again(tokenizer, tmp_path, damage):
    cache = mixed(tmp_path)
    write_tokens(cache, tokenizer)
    path = Tokens(cache, tokenizer, 77).path
    damage(path)
    with pytest.raises(UserError, match=r"tokens/view-\w+\.safetensors .*run `fastsd cache CONFIG` again"):
        Tokens(cache, tokenizer, 77)
    assert write_tokens(cache, tokenizer) and Tokens(cache, tokenizer, 77).is_sound()


def test_another_view_or_tokenizer_is_not_taken(tokenizer, tmp_path, tiny_model):
    cache = mixed(tmp_path)
    write_tokens(cache, tokenizer)
    with pytest.raises(UserError, match="belongs to captions as they were before"):
        Tokens(Texts(tmp_path, cache.all, sha256="2"), tokenizer, 77)
    write_tokenizer(tmp_path / "other")
    (tmp_path / "other/merges.txt").write_text("#version: 0.2\n")
    other = load_tokenizer(ModelTable(base=str(tiny_model), tokenizer=str(tmp_path / "other")))[0]
    with pytest.raises(UserError, match="is missing"):
        Tokens(cache, other, 77)


def test_a_flipped_bit_is_found(tokenizer, tmp_path):
    cache = Texts(tmp_path, [["a red circle"], ["blue"]])
    write_tokens(cache, tokenizer)
    path = Tokens(cache, tokenizer, 77).path
    first_id = 4096 + 3 * 8
    # An id beyond the vocabulary, an end that is none, an offset; an id that becomes another's, which only the sum tells.
    for at, bit, shows in (
        (first_id + 1, 0x40, True),
        (first_id + 7, 0x40, True),
        (4096 + 9, 0x40, True),
        (first_id, 1, False),
    ):
        opened = Tokens(cache, tokenizer, 77)
        flip(at, bit)(path)
        with pytest.raises(UserError, match="does not match its sha256"):
            Tokens(cache, tokenizer, 77)
        if shows:
            with pytest.raises(UserError, match="is damaged at sample 0|is cut short"):
                opened.row(0, 0)
        flip(at, bit)(path)
    assert Tokens(cache, tokenizer, 77).is_sound()


def test_an_interrupted_write_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    cache = mixed(tmp_path)
    monkeypatch.setattr(tokenize_captions, "_CHUNK", 8)

    def stop(done):
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(cache, tokenizer, stop)
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
            return type("Found", (), {"input_ids": [[65_535, 69_999] * len(text) for text in texts]})

    cache = Texts(tmp_path, [["ab"], [""]])
    write_tokens(cache, Wide())
    assert Tokens(cache, Wide(), 6).row(0, 0).tolist() == [70_000, 65_535, 69_999, 65_535, 69_999, 70_001]
    assert Tokens(cache, Wide(), 3).row(1, 0).tolist() == [70_000, 70_001, 70_001]


def test_writing_takes_as_much_memory_for_many_as_for_few(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_captions, "_CHUNK", 32)

    def peak(count, name):
        (tmp_path / name).mkdir()
        tracemalloc.start()
        write_tokens(Texts(tmp_path / name, [["a red circle " * 40]] * count), tokenizer)
        return (tracemalloc.get_traced_memory()[1], tracemalloc.stop())[0]

    peak(64, "first")  # what is made once
    assert peak(2000, "many") < 1.2 * peak(100, "few")
