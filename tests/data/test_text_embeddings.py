"""Cached text embeddings: captions are encoded once, encoders are never mixed, and training stays the same."""

import json
import os
import re
import shutil
import signal
import sqlite3
import threading
import tracemalloc
from contextlib import closing
from io import StringIO
from pathlib import Path

import pytest
import torch
from caching import StubVae, config, draw, draw_many, flip
from commandline import function_process
from runs import final, same
from sentences import refused, says, sentence
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
from fastsd.terminal.console import Console
from fastsd.train.step import Step
from fastsd_kernels import REFERENCE, TRITON

TABLE = ModelTable(base="none")


def load(model, **settings):
    return load_text(TABLE.model_copy(update=settings), model)


def write(root, text, report=lambda event: None, **keys):
    """Cache the images of `root` and the text embeddings of their captions."""
    table = config(root, **keys)
    latents = LatentCache.open(table.cache.dir, build_cache(table, StubVae()).view)
    write_tokens(latents, text.tokenizer)
    return write_text_embeddings(table.cache, latents, text, report)


def opened(root, text, **keys):
    table = config(root, **keys).cache
    latents = LatentCache.open(table.dir)
    return latents, TextEmbeddings(table, latents, text)


def encoded(text, captions):
    with torch.no_grad():
        return text.encode(text.tokenize(captions))


def files(root, kind):
    return {path.name: path.read_bytes() for path in (root / "cache" / kind).iterdir()}


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_stored_embeddings_are_the_output_of_the_encoder(tmp_path, tiny_model, clip_skip):
    text = load(tiny_model, clip_skip=clip_skip)
    draw_many(tmp_path, 9)
    (tmp_path / "images/003.txt").write_text("red circle\nblue star, green\n")
    (tmp_path / "images/004.txt").unlink()
    (tmp_path / "images/005.txt").write_text("picture 6")
    events = []
    assert write(tmp_path, text, events.append, dtype="fp32") == EmbeddingCounts(captions=10, encoded=9)  # two are duplicates
    assert (events[-1].phase, events[-1].done, events[-1].total) == ("states", 9, 9)
    latents, embeddings = opened(tmp_path, text, dtype="fp32")
    samples, variants = [3, 0, 3, 4, 8, 8], [1, 0, 0, 0, 0, -1]
    captions = ["blue star, green", "picture 0", "red circle", "", "picture 8", ""]
    stored = embeddings.get(samples, variants)
    assert stored.dtype == torch.float32
    torch.testing.assert_close(stored, encoded(text, captions))
    assert write(tmp_path, text, dtype="fp32") == EmbeddingCounts(10, 0)
    assert [path.stem.split("-")[0] for path in (tmp_path / "cache/states").iterdir()] == [latents.name]
    assert verify(tmp_path / "cache") == []


@pytest.mark.parametrize("dtype, bits", [("fp16", 11), ("bf16", 8)])
def test_half_precision_only_rounds(tmp_path, tiny_model, dtype, bits):
    text = load(tiny_model)
    draw_many(tmp_path, 5)
    write(tmp_path, text, dtype=dtype)
    stored = opened(tmp_path, text, dtype=dtype)[1].get(range(5), [0] * 5)
    exact = encoded(text, [f"picture {i}" for i in range(5)])
    assert stored.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert ((stored - exact).abs() <= exact.abs() * 2.0**-bits + 2.0**-25).all() and not torch.equal(stored.float(), exact)


def test_the_encoder_may_run_in_bf16(tmp_path, tiny_model):
    draw_many(tmp_path, 3)
    write(tmp_path, load(tiny_model), precision="bf16")
    stored = opened(tmp_path, load(tiny_model), precision="bf16")[1].get([2, 1], [0, 0])
    narrow = load(tiny_model)
    narrow.module.bfloat16()
    assert torch.equal(stored, encoded(narrow, ["picture 2", "picture 1"]).half())


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
    assert before.items() <= after.items() and len(after) == len(before) + 2  # a shard of latents and a shard of embeddings
    latents, embeddings = opened(tmp_path, text)
    for i in range(len(latents)):
        for j, caption in enumerate(latents.variants([i])[0]):
            assert torch.equal(embeddings.get([i], [j]), encoded(text, [caption]).half())
    for path in (tmp_path / "images").glob("00[3-7].*"):
        path.unlink()
    assert write(tmp_path, text) == EmbeddingCounts(captions=6, encoded=0)


def test_shards_have_a_limited_size(tmp_path, tiny_model, monkeypatch):
    text = load(tiny_model)
    row = 77 * 16 * 2
    monkeypatch.setattr(embed_captions, "_SHARD_BYTES", 4 * row + 5)
    draw_many(tmp_path, 10)
    write(tmp_path, text)
    index = cache_module.TextEmbeddingsIndex(cache_module.states_paths(tmp_path / "cache")[0])
    sizes = [len(files(tmp_path, "shards")[f"{name}.safetensors"]) - 4096 for name, _ in index.shards]
    assert sorted(sizes) == [3 * row, 4 * row, 4 * row]
    monkeypatch.setattr(embed_captions, "_SHARD_BYTES", 1)
    draw(tmp_path / "images/new.png", 50, "red circle")
    assert write(tmp_path, text).encoded == 1


def test_embeddings_of_different_encoders_do_not_mix(tmp_path, tiny_model):
    plain, skipping, other = load(tiny_model), load(tiny_model, clip_skip=1), load(tiny_model)
    with torch.no_grad():
        other.final_layer_norm.bias[3] += 1e-6
    last = load(tiny_model, clip_skip=1)
    with torch.no_grad():  # change a layer that is not used
        next(p for name, p in last.module.named_parameters() if "layers.1." in name).add_(1)
    assert len({encoder_hash(text) for text in (plain, skipping, other)}) == 3 and encoder_hash(last) == encoder_hash(skipping)
    draw_many(tmp_path, 4)
    write(tmp_path, load(tiny_model))
    opened(tmp_path, plain)
    for text, keys in [(skipping, {}), (other, {}), (plain, {"dtype": "bf16"}), (plain, {"precision": "bf16"})]:
        with refused("frozen-file-damaged", damage=sentence("damage-missing")) as error:
            opened(tmp_path, text, **keys)
        assert "/states/" in str(error.value)
    assert write(tmp_path, load(tiny_model, clip_skip=1)).encoded == 5
    indexes = map(cache_module.TextEmbeddingsIndex, cache_module.states_paths(tmp_path / "cache"))
    first, second = (tmp_path / f"cache/shards/{name}.safetensors" for index in indexes for name, _ in index.shards)
    # If a shard is replaced by one of another encoder, the first read detects it.
    for shard, other in [(first, second), (second, first)]:
        data = shard.read_bytes()
        shutil.copy(other, shard)
        readable = 0
        for text in (plain, skipping):
            try:
                opened(tmp_path, text)[1].get([0], [0])
                readable += 1
            except UserError as error:
                assert says(str(error), "frozen-file-damaged", path=shard, damage=sentence("damage-belongs-elsewhere"))
        assert readable == 1
        shard.write_bytes(data)


def test_embeddings_of_changed_captions_are_refused(tmp_path, tiny_model):
    text = load(tiny_model)
    draw_many(tmp_path, 4)
    write(tmp_path, text)
    (tmp_path / "images/001.txt").write_text("another caption")
    build_cache(config(tmp_path), StubVae())
    with refused("frozen-file-damaged", damage=sentence("damage-outdated")):
        opened(tmp_path, text)


def embeddings_shard(root):
    index = cache_module.TextEmbeddingsIndex(cache_module.states_paths(root / "cache")[0])
    return root / f"cache/shards/{index.shards[0][0]}.safetensors"


def test_a_flipped_bit_is_detected_when_read_and_by_verify(tmp_path, tiny_model):
    text = load(tiny_model)
    draw_many(tmp_path, 6)
    write(tmp_path, text)
    before, shard = files(tmp_path, "shards"), embeddings_shard(tmp_path)
    flip(shard, 4096 + 3 * 77 * 16 * 2 + 100)
    latents, embeddings = opened(tmp_path, text)
    errors = []
    for i in range(6):
        try:
            embeddings.get([i], [0])
        except UserError as error:
            errors.append(str(error))
    assert errors == [sentence("row-damaged", path=shard, row=3)]
    assert verify(tmp_path / "cache") == [sentence("verify-rows", path=shard, damaged=1, rows=7, row_list=3)]
    assert cache_module.states_paths(tmp_path / "cache") == [] and len(latents) == 6
    assert write(tmp_path, text).encoded == 1
    assert files(tmp_path, "shards") == before and verify(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 5000), Path.unlink, lambda path: flip(path, 9)])
def test_a_missing_truncated_or_headless_shard_is_rebuilt(tmp_path, tiny_model, damage):
    text = load(tiny_model)
    draw_many(tmp_path, 6)
    write(tmp_path, text)
    before, shard = files(tmp_path, "shards"), embeddings_shard(tmp_path)
    damage(shard)
    with refused("frozen-file-damaged", path=shard):
        opened(tmp_path, text)[1].get([0], [0])
    assert write(tmp_path, text).encoded == 7 and files(tmp_path, "shards") == before


def test_a_damaged_index_is_detected_and_rebuilt(tmp_path, tiny_model):
    text = load(tiny_model)
    draw_many(tmp_path, 6)
    write(tmp_path, text)
    before = files(tmp_path, "states")
    (path,) = cache_module.states_paths(tmp_path / "cache")
    flip(path, path.stat().st_size - 3)
    assert write(tmp_path, text).encoded == 0 and files(tmp_path, "states") == before
    flip(path, path.stat().st_size - 3)
    (problem,) = verify(tmp_path / "cache")
    assert problem == sentence("verify-deleted", path=path, damage=sentence("damage-sha256")) and not path.exists()
    assert write(tmp_path, text).encoded == 0 and files(tmp_path, "states") == before


def test_embeddings_are_deleted_with_their_view(tmp_path, tiny_model):
    draw_many(tmp_path, 6)
    write(tmp_path, load(tiny_model))
    contents = stats(tmp_path / "cache")
    assert (contents.latents, contents.states, contents.planned, contents.shards) == (6, 7, 0, 2)
    assert prune(tmp_path / "cache").shards == 0
    (tmp_path / "images/001.txt").write_text("another caption")
    build_cache(config(tmp_path), StubVae())  # the embeddings are outdated
    assert prune(tmp_path / "cache").shards == 0
    assert write(tmp_path, load(tiny_model)).encoded == 1
    (view,) = cache_module.view_paths(tmp_path / "cache")
    view.unlink()
    assert prune(tmp_path / "cache").shards == 3
    assert stats(tmp_path / "cache").states == 0 and cache_module.states_paths(tmp_path / "cache") == []
    assert write(tmp_path, load(tiny_model)).encoded == 7


def test_concurrent_writers_wait_for_each_other(tmp_path, tiny_model):
    draw_many(tmp_path, 12)
    view = build_cache(config(tmp_path), StubVae()).view
    results, lines, is_waiting = [], [], threading.Event()

    def notify(line):
        lines.append(line)
        is_waiting.set()

    def work():
        text = load(tiny_model)
        encode = text.encode
        text.encode = lambda ids: (is_waiting.wait(), encode(ids))[1]  # for another writer to wait
        latents = LatentCache.open(tmp_path / "cache", view)
        results.append(write_text_embeddings(config(tmp_path).cache, latents, text, notify=notify))

    write_tokens(LatentCache.open(tmp_path / "cache", view), load(tiny_model).tokenizer)
    threads = [threading.Thread(target=work) for _ in range(3)]  # a file lock belongs to its handle, not to its process
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts.encoded for counts in results) == [0, 0, 13]
    assert sentence("another-process", activity="encoding captions") in lines and verify(tmp_path / "cache") == []


def kill_repeatedly(root, model):
    """Fork processes that write text embeddings, and kill each in a call of `os.fsync` until one finishes."""
    torch.set_num_threads(1)
    embed_captions._BLOCK = 4
    text, kills, fsync = load(Path(model)), 0, os.fsync
    latents = LatentCache.open(Path(root) / "cache")

    def deadly(handle):
        deadly.calls -= 1
        if deadly.calls or kills % 2:
            fsync(handle)
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_writing_continues_after_kill_9(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(embed_captions, "_BLOCK", 4)
    draw_many(tmp_path, 25)
    write(tmp_path, load(tiny_model))
    shards, index = files(tmp_path, "shards"), files(tmp_path, "states")
    shutil.rmtree(tmp_path / "cache")
    view = build_cache(config(tmp_path), StubVae()).view
    write_tokens(LatentCache.open(tmp_path / "cache", view), load(tiny_model).tokenizer)
    process = function_process(__file__, "kill_repeatedly", tmp_path, tiny_model)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert int(out) >= 6
    assert files(tmp_path, "shards") == shards and files(tmp_path, "states") == index
    assert verify(tmp_path / "cache") == [] and write(tmp_path, load(tiny_model)).encoded == 0


def test_embeddings_that_are_not_finite_are_an_error(tmp_path, tiny_model):
    text = load(tiny_model)
    with torch.no_grad():
        text.final_layer_norm.weight.mul_(1e6)
    draw_many(tmp_path, 3)
    with refused("embeddings-not-finite", dtype="fp16", advice='set cache.dtype = "fp32"'):
        write(tmp_path, text)
    assert write(tmp_path, text, dtype="fp32").encoded == 4


def test_memory_does_not_grow_with_the_number_of_captions(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(embed_captions, "_CHUNK", 32)
    text = load(tiny_model)
    draw(tmp_path / "images/a.png", 1, "red circle")
    table = config(tmp_path).cache
    latents = LatentCache.open(table.dir, build_cache(config(tmp_path), StubVae()).view)

    def peak(count):
        text_length = len("red circle")
        latents._view.arrays["caption_offsets"] = torch.arange(count + 1).mul(text_length).numpy()
        latents.variants = lambda positions: [["red circle"]] * len(positions)
        latents.sha256 = str(count)
        write_tokens(latents, text.tokenizer)
        tracemalloc.start()
        assert write_text_embeddings(table, latents, text).captions == count
        return (tracemalloc.get_traced_memory()[1], tracemalloc.stop())[0]

    peak(64)  # allocates what is allocated only once
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
    """Cache and train. Return the folder of the run and the output."""
    config = load_config(path, [*overrides, *(["cache.hidden_states=true"] if states else [])])
    out = StringIO()
    console = Console(file=out, width=200)
    view = cache(config, console).view
    if states:
        write_text_embeddings(config.cache, LatentCache.open(config.cache.dir, view), load(Path(config.model.base)))
    train(config, console)
    return Path(config.run), out.getvalue()


@pytest.fixture
def jobs(tmp_path, tiny_model):
    """Write two configs for the same images. A third of the images has two captions."""
    write_images(tmp_path / "images", 14)
    for i in range(0, 14, 3):
        (tmp_path / f"images/{i:04}.txt").write_text(f"red circle, {i}\nblue star")
    for name in "ab":
        (tmp_path / name).mkdir()
    return [job(tmp_path / name, tiny_model, tmp_path / "images", STAGE) for name in "ab"]


def test_machines_encode_captions_once_for_all(jobs):
    config = load_config(jobs[0], ["cache.hidden_states=true"])
    outputs = []
    for machine in "ab":
        outputs.append(StringIO())
        cache(config, Console(file=outputs[-1], width=200), machine)
    encoded = [re.findall(r"captions: (\d+) encoded now", output.getvalue()) for output in outputs]
    contents = stats(config.cache.dir)
    assert encoded == [[str(contents.states)], ["0"]] and contents.states > 14 and contents.planned == 0
    assert verify(config.cache.dir) == [] and prune(config.cache.dir).shards == 0


@pytest.mark.slow
def test_training_and_resuming_are_bit_identical(jobs, tiny_model, monkeypatch):
    without, _ = run(jobs[0], "cache.dtype=fp32")
    folder, out = run(jobs[1], "cache.dtype=fp32", "stage.until=5", states=True)
    assert says(out, "embeddings-cached")
    for later in checkpoint.checkpoints(folder / "checkpoints")[1:]:
        shutil.rmtree(later)
    _, out = run(jobs[1], "cache.dtype=fp32", states=True)
    assert says(out, "run-resumed", step=3)
    assert same(final(folder), final(without)) and (folder / "log.jsonl").read_bytes() == (without / "log.jsonl").read_bytes()
    assert len(list((folder / "samples").glob("*.png"))) == 2  # drawn with the frozen encoder
    for name in ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        assert (folder / "model" / name).read_bytes() == (without / "model" / name).read_bytes()


def test_half_precision_trains_nearly_the_same(jobs):
    plain, rounded = run(jobs[0])[0], run(jobs[1], "stage.precision=bf16", states=True)[0]
    logs = ((folder / "log.jsonl").read_text().splitlines() for folder in (plain, rounded))
    exact_losses, losses = ([json.loads(line)["loss"] for line in log] for log in logs)
    assert losses == pytest.approx(exact_losses, rel=0.03) and losses != exact_losses


def test_training_without_the_embeddings_is_refused(jobs):
    console = Console(file=StringIO())
    cache(load_config(jobs[0]), console)
    with refused("frozen-file-damaged", damage=sentence("damage-missing")):
        train(load_config(jobs[0], ["cache.hidden_states=true"]), console)


def test_the_loader_returns_the_embeddings_of_its_captions(tmp_path, tiny_model):
    text = load(tiny_model)
    draw_many(tmp_path, 8)
    for i in range(4):
        (tmp_path / f"images/00{i}.txt").write_text(f"red {i}\nblue {i}\ngreen {i}")
    write(tmp_path, text, dtype="fp32")
    latents, embeddings = opened(tmp_path, text, dtype="fp32")
    stage = StageTable(train=["unet"], until=1, batch=6, caption_dropout=0.3)
    chosen = set()
    for batch in Loader(latents, text.tokenize, 3, stage, text_embeddings=embeddings).stream(0, 60, 6):
        torch.testing.assert_close(batch.text_embeds_BLD, encoded(text, batch.captions))
        chosen.update(batch.captions)
    assert "" in chosen and len(chosen) > 12
    assert Loader(latents, text.tokenize, 3, stage).batch(0, 6).text_embeds_BLD is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_does_not_need_the_encoder(tiny_model, precision):
    model = load_model(ModelTable(base=str(tiny_model)))
    model.text.module.to("meta")
    before = {name: parameter.dtype for name, parameter in model.text.module.named_parameters()}
    stage = StageTable(train=["unet"], until=1, batch=4, micro_batch=2, precision=precision)
    step = Step(model, stage, 1, seed=0, cached_text=True)
    token_ids_BL, text_embeds_BLD = torch.zeros(4, 77, dtype=torch.int64), torch.randn(4, 77, 16).half()
    batch = Batch(torch.randn(4, 4, 16, 16), token_ids_BL, torch.arange(4), [""] * 4, text_embeds_BLD)
    assert step(batch, 0).loss.isfinite()
    step.release()
    assert {name: parameter.dtype for name, parameter in model.text.module.named_parameters()} == before


@pytest.mark.slow
@pytest.mark.parametrize("ops, precision", [(REFERENCE, "fp32"), (TRITON or REFERENCE, "bf16")], ids=["fp32", "bf16"])
def test_plan_excludes_the_encoder(tiny_model, ops, precision):
    model = load_model(ModelTable(base=str(tiny_model)))
    stage = StageTable(train=["unet"], until=1, batch=4, precision=precision)
    plain, without = (plan_stage(Shapes.of(model), stage, 32, 0, ops, cached_text=states).need(2) for states in (False, True))
    owner = "weights of the text encoder, frozen"
    assert plain.owners[owner] > 0 and owner not in without.owners
    assert {name: size for name, size in plain.owners.items() if name != owner} == without.owners
    embeddings = 2 * 77 * 16 * 2  # fp16, of two captions
    assert plain.step - without.step >= plain.owners[owner] - embeddings


TRAINED = ('train = ["text_encoder"]', 'train = ["unet", "text_encoder"]')
EDITED = ("shuffle_tags = true", "tag_dropout = 0.1", "max_tags = 3", "shuffle_sentences = true")


@pytest.mark.parametrize("line", [*TRAINED, *EDITED])
def test_a_trained_encoder_or_edited_captions_are_refused(tmp_path, line):
    second = f"[[stage]]\nuntil = 1\n{line}\n" + ("" if line in TRAINED else 'train = ["unet"]\n')
    text = '[model]\nbase = "x"\n[data]\nfolders = ["y"]\n[[stage]]\ntrain = ["unet"]\nuntil = 1\ncaption_dropout = 0.1\n'
    path = tmp_path / "job.toml"
    path.write_text(text + second)
    load_config(path)
    with refused("config-invalid") as error:
        load_config(path, ["cache.hidden_states=true"])
    assert str(path) in str(error.value)
    if line in TRAINED:
        assert says(str(error.value), "hidden-states-of-trained", stage="'stage-2'")
    else:
        key = line.split()[0]
        assert says(str(error.value), "hidden-states-of-edited-captions", stage="'stage-2'", key=key, key_2=key)
    path.write_text(text)
    assert load_config(path, ["cache.hidden_states=true"]).cache.hidden_states


def test_the_hash_of_a_text_encoder_never_changes(tiny_model):
    """Another hash would let every cache of text embeddings be built again."""
    text = load(tiny_model)
    with torch.no_grad():
        for number, (_, weight) in enumerate(sorted(text.module.named_parameters())):
            weight.copy_((torch.arange(weight.numel()) % 97 + number).view(weight.shape) / 128)
    assert encoder_hash(text)[:16] == "d73ba5908debedb5"
    transposed = max((weight for _, weight in text.module.named_parameters()), key=torch.numel)
    assert transposed.ndim == 2
    transposed.data = transposed.data.view(transposed.shape[::-1])
    assert encoder_hash(text)[:16] != "d73ba5908debedb5"  # the same bytes in another shape


def test_the_hash_depends_on_the_division_into_chunks(tiny_model):
    divisions = [{"chunks": chunks, "cut": cut} for chunks in (1, 2, 3, "auto") for cut in ("tokens", "commas", "words")]
    assert len({encoder_hash(load(tiny_model, **division)) for division in divisions}) == 12


def test_captions_of_any_number_of_chunks_are_stored_at_their_length(tmp_path, tiny_model):
    text = load(tiny_model, chunks="auto", cut="commas")
    draw_many(tmp_path, 9)
    for i, count in enumerate([90, 40, 200, 60, 100]):
        (tmp_path / f"images/00{i}.txt").write_text("red circle, " * count)
    (tmp_path / "images/005.txt").write_text("blue star, " * 70 + "\nsecond")
    assert write(tmp_path, text, dtype="fp32") == EmbeddingCounts(captions=10, encoded=9)  # the longest three are the same
    latents, embeddings = opened(tmp_path, text, dtype="fp32")
    samples = [*range(9), 5, 5]
    variants = [*[0] * 9, 1, -1]
    captions = [*(latents.variants([i])[0][max(variant, 0)] for i, variant in zip(samples[:10], variants, strict=False)), ""]
    expected = encoded(text, captions)
    assert expected.shape[1] == 6 * 77
    torch.testing.assert_close(embeddings.get(samples, variants), expected)
    for i in range(len(samples)):  # alone, each has its length
        alone = embeddings.get(samples[i : i + 1], variants[i : i + 1])
        torch.testing.assert_close(alone, encoded(text, captions[i : i + 1]))
        torch.testing.assert_close(embeddings.get(samples[i : i + 1], variants[i : i + 1], 6 * 77)[0], expected[i])
    assert {tuple(shape) for _, shape in json.loads(embeddings._index.metadata["shards"])} == {(77, 16), (154, 16), (231, 16)}
    assert write(tmp_path, text, dtype="fp32") == EmbeddingCounts(10, 0) and verify(tmp_path / "cache") == []
    args, lengths = (latents, text.tokenize, 3, StageTable(train=["unet"], until=1, batch=4)), set()
    whole, *shares = (
        Loader(*args, text_embeddings=embeddings, rank=rank, world=world).stream(0, 40, 4)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    for batch, *halves in zip(whole, *shares, strict=True):
        torch.testing.assert_close(batch.text_embeds_BLD, encoded(text, batch.captions))
        assert torch.equal(torch.cat([half.text_embeds_BLD for half in halves]), batch.text_embeds_BLD)
        lengths.add(batch.text_embeds_BLD.shape[1])
    assert len(lengths) > 1


def test_progress_counts_captions(tmp_path, tiny_model):
    draw_many(tmp_path, 9)
    events = []
    counts = write(tmp_path, load(tiny_model), lambda event: events.append((event.phase, event.done, event.total)))
    states = [event for event in events if event[0] == "states"]
    assert counts.encoded == 10  # those of nine images, and the empty one
    assert states == [("states", 10, 10)]
    with closing(sqlite3.connect(tmp_path / "cache/cache.sqlite")) as db:
        assert db.execute("SELECT DISTINCT version FROM latent").fetchall() == [(0,)]  # it is a part of the shards' names
