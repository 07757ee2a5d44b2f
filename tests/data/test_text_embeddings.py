"""Cached states of the text encoder: the same training as without them, encoded once, never another encoder's."""

import os
import shutil
import signal
import threading
import tracemalloc
from io import StringIO
from pathlib import Path

import pytest
import torch
from caching import StubVae, config, draw, draw_many, flip
from commandline import function_process
from rich.console import Console
from runs import final, same
from tiny import job, write_images

from fastsd.commands.cache import cache
from fastsd.config.schema import ModelTable, StageTable, load_config
from fastsd.data import cache as cache_module
from fastsd.data.building import embed_captions
from fastsd.data.building.build import build_cache
from fastsd.data.building.embed_captions import EmbeddingCounts, write_text_embeddings
from fastsd.data.building.tokenize_captions import write_tokens
from fastsd.data.building.upkeep import prune, stats, verify
from fastsd.data.cache import LatentCache
from fastsd.data.loader import Batch, Loader
from fastsd.data.text_embeddings import TextEmbeddings, encoder_hash
from fastsd.errors import UserError
from fastsd.model.formats.load import load_model, load_text
from fastsd.model.shapes import Shapes
from fastsd.plan.plan import plan_stage
from fastsd.run import checkpoint
from fastsd.run.loop import train
from fastsd.train.step import Step
from fastsd_kernels import REFERENCE, TRITON

TABLE = ModelTable(base="none")


def load(model, **settings):
    return load_text(TABLE.model_copy(update=settings), model)


def write(root, text, report=lambda event: None, **keys):
    """Cache the images of `root` and the states of their captions."""
    made = config(root, **keys)
    view = build_cache(made, StubVae()).view
    latents = LatentCache.open(made.cache.dir, view)
    write_tokens(latents, text.tokenizer)
    return write_text_embeddings(made.cache, latents, text, report)


def opened(root, text, **keys):
    made = config(root, **keys)
    latents = LatentCache.open(made.cache.dir)
    return latents, TextEmbeddings(made.cache, latents, text)


def encoded(text, captions):
    with torch.no_grad():
        return text.encode(text.tokenize(captions))


def files(root, kind):
    return {path.name: path.read_bytes() for path in (root / "cache" / kind).iterdir()}


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_what_is_stored_is_what_the_encoder_says(tmp_path, tiny_model, clip_skip):
    text = load(tiny_model, clip_skip=clip_skip)
    draw_many(tmp_path, 9)
    (tmp_path / "images/003.txt").write_text("red circle\nblue star, green\n")
    (tmp_path / "images/004.txt").unlink()
    (tmp_path / "images/005.txt").write_text("picture 6")
    events = []
    assert write(tmp_path, text, events.append, dtype="fp32") == EmbeddingCounts(captions=10, encoded=9)  # two are as others
    assert (events[-1].phase, events[-1].done, events[-1].total) == ("states", 9, 9)
    latents, states = opened(tmp_path, text, dtype="fp32")
    samples, variants = [3, 0, 3, 4, 8, 8], [1, 0, 0, 0, 0, -1]
    captions = ["blue star, green", "picture 0", "red circle", "", "picture 8", ""]
    found = states.get(samples, variants)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, encoded(text, captions))
    assert write(tmp_path, text, dtype="fp32") == EmbeddingCounts(10, 0)
    assert [path.stem.split("-")[0] for path in (tmp_path / "cache/states").iterdir()] == [latents.name]
    assert verify(tmp_path / "cache") == []


@pytest.mark.parametrize("dtype, bits", [("fp16", 11), ("bf16", 8)])
def test_half_precision_only_rounds(tmp_path, tiny_model, dtype, bits):
    text = load(tiny_model)
    draw_many(tmp_path, 5)
    write(tmp_path, text, dtype=dtype)
    states = opened(tmp_path, text, dtype=dtype)[1].get(range(5), [0] * 5)
    exact = encoded(text, [f"picture {i}" for i in range(5)])
    assert states.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert ((states - exact).abs() <= exact.abs() * 2.0**-bits + 2.0**-25).all() and not torch.equal(states.float(), exact)


def test_the_encoder_may_run_in_bf16(tmp_path, tiny_model):
    draw_many(tmp_path, 3)
    write(tmp_path, load(tiny_model), precision="bf16")
    states = opened(tmp_path, load(tiny_model), precision="bf16")[1].get([2, 1], [0, 0])
    narrow = load(tiny_model)
    narrow.module.bfloat16()
    assert torch.equal(states, encoded(narrow, ["picture 2", "picture 1"]).half())


def test_only_new_captions_are_encoded(tmp_path, tiny_model):
    text = load(tiny_model)
    draw_many(tmp_path, 8)
    assert write(tmp_path, text).encoded == 9
    before = files(tmp_path, "shards")
    (tmp_path / "images/001.txt").write_text("another caption")
    (tmp_path / "images/002.txt").write_text("picture 3")
    draw(tmp_path / "images/new.png", 50, "red circle\npicture 4")
    draw(tmp_path / "images/more.png", 51, "picture 5")
    assert write(tmp_path, text) == EmbeddingCounts(captions=11, encoded=2)
    after = files(tmp_path, "shards")
    assert before.items() <= after.items() and len(after) == len(before) + 2  # one of latents, one of states
    latents, states = opened(tmp_path, text)
    for i in range(len(latents)):
        for j, caption in enumerate(latents.variants([i])[0]):
            assert torch.equal(states.get([i], [j]), encoded(text, [caption]).half())
    for path in (tmp_path / "images").glob("00[3-7].*"):
        path.unlink()
    assert write(tmp_path, text) == EmbeddingCounts(captions=6, encoded=0)


def test_shards_are_no_larger_than_they_may_be(tmp_path, tiny_model, monkeypatch):
    text = load(tiny_model)
    row = 77 * 16 * 2
    monkeypatch.setattr(embed_captions, "_SHARD_BYTES", 4 * row + 5)
    draw_many(tmp_path, 10)
    write(tmp_path, text)
    index = next(iter(cache_module.states_paths(tmp_path / "cache")))
    sizes = [
        len(files(tmp_path, "shards")[f"{name}.safetensors"]) - 4096
        for name, _ in cache_module.TextEmbeddingsIndex(index).shards
    ]
    assert sorted(sizes) == [3 * row, 4 * row, 4 * row]
    monkeypatch.setattr(embed_captions, "_SHARD_BYTES", 1)
    draw(tmp_path / "images/new.png", 50, "red circle")
    assert write(tmp_path, text).encoded == 1


def test_another_encoder_clip_skip_or_precision_never_mixes(tmp_path, tiny_model):
    plain, skipping, other = load(tiny_model), load(tiny_model, clip_skip=1), load(tiny_model)
    with torch.no_grad():
        other.final_layer_norm.bias[3] += 1e-6
    last = load(tiny_model, clip_skip=1)
    with torch.no_grad():  # of a layer that is not used
        next(p for name, p in last.module.named_parameters() if "layers.1." in name).add_(1)
    assert len({encoder_hash(text) for text in (plain, skipping, other)}) == 3 and encoder_hash(last) == encoder_hash(skipping)
    draw_many(tmp_path, 4)
    write(tmp_path, load(tiny_model))
    opened(tmp_path, plain)
    for text, keys in [(skipping, {}), (other, {}), (plain, {"dtype": "bf16"}), (plain, {"precision": "bf16"})]:
        with pytest.raises(UserError, match=r"states/\w+-\w+\.safetensors is missing; run `fastsd cache CONFIG` again"):
            made = config(tmp_path, **keys).cache
            TextEmbeddings(made, LatentCache.open(made.dir), text)
    assert write(tmp_path, load(tiny_model, clip_skip=1)).encoded == 5
    shards = {path: {name for name, _ in cache_module.TextEmbeddingsIndex(path).shards}
              for path in cache_module.states_paths(tmp_path / "cache")}  # fmt: skip
    (ours,), (theirs,) = shards.values()
    assert ours != theirs
    # A shard of the other encoder under this one's name is noticed at the first read, and made again.
    folder = tmp_path / "cache/shards"
    for a, b in [(ours, theirs), (theirs, ours)]:
        kept = (folder / f"{a}.safetensors").read_bytes()
        shutil.copy(folder / f"{b}.safetensors", folder / f"{a}.safetensors")
        found = []
        for text in (plain, skipping):
            try:
                found.append(opened(tmp_path, text)[1].get([0], [0]))
            except UserError as error:
                assert f"{a}.safetensors belongs to another VAE, text encoder or shape" in str(error)
        assert len(found) == 1
        (folder / f"{a}.safetensors").write_bytes(kept)


def test_states_of_captions_as_they_were_are_refused(tmp_path, tiny_model):
    text = load(tiny_model)
    draw_many(tmp_path, 4)
    write(tmp_path, text)
    (tmp_path / "images/001.txt").write_text("another caption")
    build_cache(config(tmp_path), StubVae())
    with pytest.raises(UserError, match="belongs to captions as they were before; run `fastsd cache CONFIG` again"):
        opened(tmp_path, text)


def states_shard(root):
    index = cache_module.TextEmbeddingsIndex(next(iter(cache_module.states_paths(root / "cache"))))
    return root / f"cache/shards/{index.shards[0][0]}.safetensors"


def test_a_flipped_bit_is_found_when_read_and_by_verify(tmp_path, tiny_model):
    text = load(tiny_model)
    draw_many(tmp_path, 6)
    write(tmp_path, text)
    before, shard = files(tmp_path, "shards"), states_shard(tmp_path)
    flip(shard, 4096 + 3 * 77 * 16 * 2 + 100)
    latents, states = opened(tmp_path, text)
    refused = 0
    for i in range(6):
        try:
            states.get([i], [0])
        except UserError as error:
            refused += 1
            assert f"{shard}: row 3 is damaged; `fastsd cache CONFIG --verify` finds all that is" in str(error)
    assert refused == 1
    (problem,) = verify(tmp_path / "cache")
    assert f"{shard} has 1 of 7 rows that do not match their sha256: 3" in problem
    assert cache_module.states_paths(tmp_path / "cache") == [] and len(latents) == 6
    assert write(tmp_path, text).encoded == 1
    assert files(tmp_path, "shards") == before and verify(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 5000), Path.unlink, lambda path: flip(path, 9)])
def test_a_lost_cut_or_headless_shard_is_made_again(tmp_path, tiny_model, damage):
    text = load(tiny_model)
    draw_many(tmp_path, 6)
    write(tmp_path, text)
    before, shard = files(tmp_path, "shards"), states_shard(tmp_path)
    damage(shard)
    with pytest.raises(UserError, match=shard.name):
        opened(tmp_path, text)[1].get([0], [0])
    assert write(tmp_path, text).encoded == 7 and files(tmp_path, "shards") == before


def test_a_damaged_index_is_found_and_made_again(tmp_path, tiny_model):
    text = load(tiny_model)
    draw_many(tmp_path, 6)
    write(tmp_path, text)
    before = files(tmp_path, "states")
    (path,) = cache_module.states_paths(tmp_path / "cache")
    flip(path, path.stat().st_size - 3)
    assert write(tmp_path, text).encoded == 0 and files(tmp_path, "states") == before
    flip(path, path.stat().st_size - 3)
    (problem,) = verify(tmp_path / "cache")
    assert problem.startswith(f"{path} does not match its sha256; removed") and not path.exists()
    assert write(tmp_path, text).encoded == 0 and files(tmp_path, "states") == before


def test_states_go_with_their_view_and_not_before(tmp_path, tiny_model):
    draw_many(tmp_path, 6)
    write(tmp_path, load(tiny_model))
    found = stats(tmp_path / "cache")
    assert (found.latents, found.states, found.planned, found.shards) == (6, 7, 0, 2)
    assert prune(tmp_path / "cache").shards == 0
    (tmp_path / "images/001.txt").write_text("another caption")
    build_cache(config(tmp_path), StubVae())  # the states are those of the captions before
    assert prune(tmp_path / "cache").shards == 0
    assert write(tmp_path, load(tiny_model)).encoded == 1
    (view,) = cache_module.view_paths(tmp_path / "cache")
    view.unlink()
    assert prune(tmp_path / "cache").shards == 3
    assert stats(tmp_path / "cache").states == 0 and cache_module.states_paths(tmp_path / "cache") == []
    assert write(tmp_path, load(tiny_model)).encoded == 7


def test_processes_do_not_get_in_each_others_way(tmp_path, tiny_model):
    draw_many(tmp_path, 12)
    view = build_cache(config(tmp_path), StubVae()).view
    made, said, told = [], [], threading.Event()

    def say(line):
        said.append(line)
        told.set()

    def work():
        text = load(tiny_model)
        encode = text.encode
        text.encode = lambda ids: (told.wait(), encode(ids))[1]  # until another has found the work in hand
        latents = LatentCache.open(tmp_path / "cache", view)
        made.append(write_text_embeddings(config(tmp_path).cache, latents, text, say=say))

    write_tokens(LatentCache.open(tmp_path / "cache", view), load(tiny_model).tokenizer)
    several = [threading.Thread(target=work) for _ in range(3)]  # a lock of a file is its handle's, not its process's
    for one in several:
        one.start()
    for one in several:
        one.join()
    assert sorted(counts.encoded for counts in made) == [0, 0, 13]
    assert "another process is encoding captions" in said and verify(tmp_path / "cache") == []


def nursery(root, model):
    """Runs in a process of its own: forks writers, each of which dies in one of its calls of fsync, until one ends."""
    torch.set_num_threads(1)
    embed_captions._BLOCK = 4
    text, kills, flush = load(Path(model)), 0, os.fsync
    latents = LatentCache.open(Path(root) / "cache")

    def deadly(handle):
        deadly.calls -= 1
        if deadly.calls or kills % 2:
            flush(handle)
        if not deadly.calls:
            os.kill(os.getpid(), signal.SIGKILL)

    while True:
        deadly.calls = 1 + kills % 3
        child = os.fork()
        if child == 0:
            os.fsync = deadly
            write_text_embeddings(config(Path(root)).cache, latents, text)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        kills += 1
    print(kills)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its victims")
def test_killed_anywhere_it_goes_on(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(embed_captions, "_BLOCK", 4)
    draw_many(tmp_path, 25)
    write(tmp_path, load(tiny_model))
    shards, index = files(tmp_path, "shards"), files(tmp_path, "states")
    shutil.rmtree(tmp_path / "cache")
    view = build_cache(config(tmp_path), StubVae()).view
    write_tokens(LatentCache.open(tmp_path / "cache", view), load(tiny_model).tokenizer)
    process = function_process(__file__, "nursery", tmp_path, tiny_model)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert int(out) >= 6
    assert files(tmp_path, "shards") == shards and files(tmp_path, "states") == index
    assert verify(tmp_path / "cache") == [] and write(tmp_path, load(tiny_model)).encoded == 0


def test_states_that_are_not_finite_are_a_sentence(tmp_path, tiny_model):
    text = load(tiny_model)
    with torch.no_grad():
        text.final_layer_norm.weight.mul_(1e6)
    draw_many(tmp_path, 3)
    with pytest.raises(UserError, match='states are not finite in fp16; use cache.dtype = "fp32"'):
        write(tmp_path, text)
    assert write(tmp_path, text, dtype="fp32").encoded == 4


def test_memory_is_the_same_for_many_as_for_few(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(embed_captions, "_CHUNK", 32)
    text = load(tiny_model)
    draw(tmp_path / "images/a.png", 1, "red circle")
    made = config(tmp_path)
    latents = LatentCache.open(made.cache.dir, build_cache(made, StubVae()).view)

    def peak(count):
        text_length = len("red circle")
        latents._view.arrays["caption_offsets"] = torch.arange(count + 1).mul(text_length).numpy()
        latents.variants = lambda positions: [["red circle"]] * len(positions)
        latents.sha256 = str(count)
        write_tokens(latents, text.tokenizer)
        tracemalloc.start()
        assert write_text_embeddings(made.cache, latents, text).captions == count
        return (tracemalloc.get_traced_memory()[1], tracemalloc.stop())[0]

    peak(64)  # what is made once
    assert peak(4000) < 1.2 * peak(100)


STAGE = """
[[stage]]
name = "unet"
train = ["unet"]
until = 7
batch = 6
micro_batch = 3
optimizer = "dlion"
d0 = 1e-4
caption_dropout = 0.3
checkpoint_every = 3
keep_checkpoints = 9
"""


def run(path, *overrides, states=False):
    """Cache and train: (run folder, what was printed)."""
    made = load_config(path, [*overrides, *(["cache.hidden_states=true"] if states else [])])
    out = StringIO()
    console = Console(file=out, width=200)
    view = cache(made, console).view
    if states:
        write_text_embeddings(made.cache, LatentCache.open(made.cache.dir, view), load(Path(made.model.base)))
    train(made, console)
    return Path(made.run), out.getvalue()


@pytest.fixture
def jobs(tmp_path, tiny_model):
    """Two configs over images of which every third has two captions."""
    write_images(tmp_path / "images", 14)
    for i in range(0, 14, 3):
        (tmp_path / f"images/{i:04}.txt").write_text(f"red circle, {i}\nblue star")
    for name in "ab":
        (tmp_path / name).mkdir()
    return [job(tmp_path / name, tiny_model, tmp_path / "images", STAGE) for name in "ab"]


def test_training_is_the_same_bit_for_bit_and_resumes_so(jobs, tiny_model, monkeypatch):
    without, _ = run(jobs[0], "cache.dtype=fp32")
    folder, said = run(jobs[1], "cache.dtype=fp32", "stage.until=5", states=True)
    assert "and the text encoder's states" in said
    for later in checkpoint.checkpoints(folder / "checkpoints")[1:]:
        shutil.rmtree(later)
    _, said = run(jobs[1], "cache.dtype=fp32", states=True)
    assert "resumed at step 3" in said
    assert same(final(folder), final(without)) and (folder / "log.jsonl").read_bytes() == (without / "log.jsonl").read_bytes()
    assert len(list((folder / "samples").glob("*.png"))) == 2  # drawn with an encoder that training leaves alone
    for part in ("text_encoder", "unet"):
        name = f"{part}/{'model' if part == 'text_encoder' else 'diffusion_pytorch_model'}.safetensors"
        assert (folder / "model" / name).read_bytes() == (without / "model" / name).read_bytes()


def test_half_precision_trains_nearly_the_same(jobs):
    plain, rounded = run(jobs[0])[0], run(jobs[1], "stage.precision=bf16", states=True)[0]
    losses = [[float(line.split('"loss": ')[1].split(",")[0]) for line in (folder / "log.jsonl").read_text().splitlines()]
              for folder in (plain, rounded)]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=0.03) and losses[0] != losses[1]


def test_without_states_there_is_no_training_but_a_sentence(jobs):
    console = Console(file=StringIO())
    cache(load_config(jobs[0]), console)
    with pytest.raises(UserError, match="is missing; run `fastsd cache CONFIG` again"):
        train(load_config(jobs[0], ["cache.hidden_states=true"]), console)


def test_the_loader_brings_the_states_of_the_captions_it_chose(tmp_path, tiny_model):
    text = load(tiny_model)
    draw_many(tmp_path, 8)
    for i in range(4):
        (tmp_path / f"images/00{i}.txt").write_text(f"red {i}\nblue {i}\ngreen {i}")
    write(tmp_path, text, dtype="fp32")
    latents, states = opened(tmp_path, text, dtype="fp32")
    stage = StageTable(train=["unet"], until=1, batch=6, caption_dropout=0.3)
    chosen = set()
    for batch in Loader(latents, text.tokenize, 3, stage, states=states).stream(0, 60, 6):
        torch.testing.assert_close(batch.states_BLD, encoded(text, batch.captions))
        chosen.update(batch.captions)
    assert "" in chosen and len(chosen) > 12
    assert Loader(latents, text.tokenize, 3, stage).batch(0, 6).states_BLD is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_does_without_the_encoder(tiny_model, precision):
    model = load_model(ModelTable(base=str(tiny_model)))
    model.text.module.to("meta")
    before = {name: parameter.dtype for name, parameter in model.text.module.named_parameters()}
    stage = StageTable(train=["unet"], until=1, batch=4, micro_batch=2, precision=precision)
    step = Step(model, stage, 1, seed=0, cached_text=True)
    batch = Batch(torch.randn(4, 4, 16, 16), torch.zeros(4, 77, dtype=torch.int64), torch.arange(4), [""] * 4,
                  torch.randn(4, 77, 16).half())  # fmt: skip
    assert step(batch, 0).loss.isfinite()
    step.release()
    assert {name: parameter.dtype for name, parameter in model.text.module.named_parameters()} == before


@pytest.mark.parametrize("ops, precision", [(REFERENCE, "fp32"), (TRITON or REFERENCE, "bf16")], ids=["fp32", "bf16"])
def test_plan_leaves_the_encoder_out(tiny_model, ops, precision):
    model = load_model(ModelTable(base=str(tiny_model)))
    stage = StageTable(train=["unet"], until=1, batch=4, precision=precision)
    plain, without = (plan_stage(Shapes.of(model), stage, 32, 0, ops, states).need(2) for states in (False, True))
    owner = "weights of the text encoder, frozen"
    assert plain.owners[owner] > 0 and owner not in without.owners
    assert {name: size for name, size in plain.owners.items() if name != owner} == without.owners
    states = 2 * 77 * 16 * 2  # fp16, of two captions
    assert plain.step - without.step >= plain.owners[owner] - states


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('train = ["text_encoder"]', "a frozen text encoder and stage 'stage-2' trains it"),
        ('train = ["unet", "text_encoder"]', "a frozen text encoder and stage 'stage-2' trains it"),
        ("shuffle_tags = true", "captions as they are and stage 'stage-2' has shuffle_tags"),
        ("tag_dropout = 0.1", "captions as they are and stage 'stage-2' has tag_dropout"),
        ("max_tags = 3", "captions as they are and stage 'stage-2' has max_tags"),
        ("shuffle_sentences = true", "captions as they are and stage 'stage-2' has shuffle_sentences"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path, line, sentence):
    second = f"[[stage]]\nuntil = 1\n{line}\n" + ("" if line.startswith("train") else 'train = ["unet"]\n')
    text = '[model]\nbase = "x"\n[data]\nfolders = ["y"]\n[[stage]]\ntrain = ["unet"]\nuntil = 1\ncaption_dropout = 0.1\n'
    (tmp_path / "job.toml").write_text(text + second)
    load_config(tmp_path / "job.toml")
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "job.toml", ["cache.hidden_states=true"])
    assert str(error.value) == f"{tmp_path / 'job.toml'}: cache.hidden_states needs {sentence}; remove one of the two"
    (tmp_path / "job.toml").write_text(text)
    assert load_config(tmp_path / "job.toml", ["cache.hidden_states=true"]).cache.hidden_states
