"""The images that a run validates on stay the same when images come or go, or are encoded anew."""

import shutil
from io import StringIO

import numpy as np
import pytest
from runs import rows_of, run
from sentences import pattern, refused, says
from tiny import job, write_images

from fastsd.commands.cache import cache
from fastsd.commands.check import check
from fastsd.commands.validate import validate
from fastsd.config.schema import load_config, parse_config
from fastsd.data.validation_split import choose_splits
from fastsd.run import checkpoint
from fastsd.run.run import open_run
from fastsd.terminal.console import Console

STAGE = """
[[stage]]
name = "one"
train = ["unet"]
until = 4
batch = 4
optimizer = "lion"
lr = 1e-3
checkpoint_every = 2
keep_checkpoints = 9
"""
KEYS = ["sample.prompts=[]", "validate.held_out=5", "validate.stabilised=4", "validate.every=2", "validate.bands=1"]


class Cache:
    """A cache of which only the content hashes and captions are needed."""

    def __init__(self, checks, captions=None):
        self.array, self.texts = np.array(checks, np.int64), captions

    def __len__(self):
        return len(self.array)

    def checks(self, first, last):
        return self.array[first:last]

    def variants(self, positions):
        return [[self.texts[i]] for i in positions]


def splits(checks, state=None, captions=None, include=(), **table):
    tables = {"model": {"base": "m"}, "data": {"folders": ["d"], "include": list(include)}, "validate": {"every": 2, **table}}
    config = parse_config(tables | {"stage": [{"train": ["unet"], "until": 9}]}, "job.toml")
    return choose_splits(Cache(checks, captions), config, state)


def contents(cache, chosen):
    array = np.array(cache)
    return {name: array[samples].tolist() for name, samples in chosen.measured.items()}


OLD, NEW = list(range(100, 140)), list(range(1000, 1200))
SIZES = {"held_out": 6, "stabilised": 5}


@pytest.mark.parametrize("by", ["content", "number"])
def test_images_that_come_or_move_change_nothing(by):
    first = splits(OLD, by=by, **SIZES)
    for grown in (NEW + OLD, OLD + NEW, NEW[:7] + OLD[::-1] + NEW[7:]):
        kept = splits(grown, first.state_dict(), by=by, **SIZES)
        assert contents(grown, kept) == contents(OLD, first) and kept.notes == []
        assert np.array(grown)[kept.left_out].tolist() == sorted(np.array(OLD)[first.left_out].tolist(), key=grown.index)
        identities = [[chosen.identity[i] for i in chosen.measured["held_out"]] for chosen in (first, kept)]
        assert identities[0] == identities[1]
        again = splits(OLD, kept.state_dict(), by=by, **SIZES)
        assert contents(OLD, again) == contents(OLD, first)
    fresh = splits(NEW + OLD, by=by, **SIZES)
    assert contents(NEW + OLD, fresh) != contents(OLD, first)


def test_missing_images_make_a_split_smaller_until_they_return():
    first = splits(OLD, **SIZES)
    before = contents(OLD, first)
    gone = [*before["held_out"][:2], before["stabilised"][4]]
    fewer = NEW + [check for check in OLD if check not in gone]
    kept = splits(fewer, first.state_dict(), **SIZES)
    assert contents(fewer, kept) == {"held_out": before["held_out"][2:], "stabilised": before["stabilised"][:4]}
    lines = [("held-out", 2, 6, 4), ("stabilised", 1, 5, 4)]
    for note, (title, missing, count, left) in zip(kept.notes, lines, strict=True):
        assert says(note, "validation-images-gone", missing=missing, count=count, title=title, left=left)
    back = splits(NEW + OLD, kept.state_dict(), **SIZES)
    assert contents(NEW + OLD, back) == before and back.notes == []


def test_later_copies_of_held_out_images_are_held_out():
    first = splits(OLD, **SIZES)
    held = contents(OLD, first)["held_out"]
    copies = [held[3], *NEW, *OLD, held[0], held[0]]
    kept = splits(copies, first.state_dict(), **SIZES)
    assert contents(copies, kept)["held_out"] == held and len(kept.left_out) == 6 + 3
    assert set(np.array(copies)[kept.left_out].tolist()) == set(held)


def test_of_several_copies_one_that_the_filters_select_is_measured():
    captions = ["star" if i % 2 else "moon" for i in range(len(OLD))]
    first = splits(OLD, captions=captions, include=["star"], **SIZES)
    held = contents(OLD, first)["held_out"]
    more, texts = held + OLD, ["moon"] * 6 + captions
    kept = splits(more, first.state_dict(), captions=texts, include=["star"], **SIZES)
    assert contents(more, kept)["held_out"] == held and all(texts[i] == "star" for i in kept.measured["held_out"])
    assert len(kept.left_out) == 12


def test_more_stabilised_images_are_added_and_fewer_are_the_first():
    first = splits(OLD, **SIZES)
    before = contents(OLD, first)
    more = splits(OLD, first.state_dict(), held_out=6, stabilised=9)
    after = contents(OLD, more)
    assert after["held_out"] == before["held_out"] and after["stabilised"][:5] == before["stabilised"]
    assert len(set(after["stabilised"]) | set(after["held_out"])) == 15
    assert after == contents(OLD, splits(OLD, held_out=6, stabilised=9))
    fewer = splits(NEW + OLD, more.state_dict(), held_out=6, stabilised=3)
    assert contents(NEW + OLD, fewer) == {"held_out": before["held_out"], "stabilised": before["stabilised"][:3]}
    with refused("stabilised-size", stabilised=35, trained=34, limit=34):
        splits(OLD, first.state_dict(), held_out=6, stabilised=35)
    only = splits(OLD, splits(OLD, held_out=6).state_dict(), **SIZES)  # measured for the first time
    assert contents(OLD, only) == before


@pytest.mark.parametrize("by", ["content", "number"])
def test_images_that_were_encoded_anew_are_recognized_by_their_numbers(by):
    first = splits(OLD, by=by, **SIZES)
    other = [check + 5000 for check in OLD]
    kept = splits(other, first.state_dict(), by=by, **SIZES)
    assert {name: numbers.tolist() for name, numbers in kept.measured.items()} == {
        name: numbers.tolist() for name, numbers in first.measured.items()
    }
    assert kept.identity == first.identity and kept.left_out.tolist() == first.left_out.tolist()
    (note,) = kept.notes
    assert says(note, "latents-encoded-anew")
    later = splits(NEW + other, kept.state_dict(), by=by, **SIZES)
    assert contents(NEW + other, later) == contents(other, kept) and later.notes == []
    with refused("validation-images-missing", count=11, before=40, after=41):
        splits([*other, 1], first.state_dict(), by=by, **SIZES)


def test_a_missing_image_stays_missing_when_the_others_are_encoded_anew():
    first = splits(OLD, **SIZES)
    gone = contents(OLD, first)["held_out"][1]
    fewer = [check for check in OLD if check != gone]
    kept = splits(fewer, first.state_dict(), **SIZES)
    other = [check + 5000 for check in fewer]
    anew = splits(other, kept.state_dict(), **SIZES)
    assert [check - 5000 for check in contents(other, anew)["held_out"]] == contents(fewer, kept)["held_out"]
    assert len(anew.left_out) == 5
    assert contents(OLD, splits(OLD, anew.state_dict(), **SIZES)) == {"held_out": [gone]}


def quiet():
    return Console(file=StringIO(), width=200)


def measured(folder, step):
    return [(row["items"], len(row["each"])) for row in rows_of(folder, "validation.jsonl") if row["step"] == step]


def test_a_run_measures_the_same_images_in_every_start(tmp_path, tiny_model):
    write_images(tmp_path / "images", 24)
    path = job(tmp_path, tiny_model, tmp_path / "images", STAGE)
    folder, _ = run(path, *KEYS)
    with open_run(load_config(path, KEYS), quiet()) as opened:
        latents, sets = opened.data.latents, opened.data.sets
        before = {name: latents.checks(0, len(latents))[numbers].tolist() for name, numbers in sets.measured.items()}
    write_images(tmp_path / "new", 60, seed=7)
    for file in (tmp_path / "new").iterdir():
        file.rename(tmp_path / "images" / f"a{file.name}")
    longer = [*KEYS, "stage.until=6"]
    run(path, *longer)
    assert measured(folder, 0) == measured(folder, 4) == measured(folder, 6)
    with open_run(load_config(path, longer), quiet()) as opened:
        latents, data = opened.data.latents, opened.data
        checks = latents.checks(0, len(latents))
        assert len(checks) == 84
        assert {name: checks[numbers].tolist() for name, numbers in data.sets.measured.items()} == before
        read = {i for batch in data.loader(0).stream(0, 160, 4) for i in batch.samples_B.tolist()}
        assert read == set(range(84)) - set(data.sets.left_out.tolist()) and len(read) == 79

    # Other programs measure the same images: of a checkpoint, of the run's model, and of any model with the run's config.
    config = load_config(path, longer)
    newest = checkpoint.checkpoints(folder / "checkpoints")[-1]
    items = [items for items, _ in measured(folder, 6)]
    for name in (folder, newest, folder / "model", tiny_model):
        assert [row["items"] for row in validate(str(name), config, console=quiet())] == items
    elsewhere = load_config(path, [*longer, f"run={tmp_path / 'other'}"])
    assert [row["items"] for row in validate(str(newest), elsewhere, console=quiet())] == items
    assert [row["items"] for row in validate(str(tiny_model), elsewhere, console=quiet())] != items
    others = load_config(path, [*longer, "validate.seed=3"])
    assert [row["items"] for row in validate(str(newest), others, console=quiet())] != items

    # An image that has gone is said, by training, by `validate` and by `check`, and held out again when it is back.
    gone = tmp_path / "gone"
    gone.mkdir()
    held = int(np.flatnonzero(checks == before["held_out"][0])[0])
    held_name = sorted((tmp_path / "images").glob("*.png"))[held].stem
    for ending in ("png", "txt"):
        shutil.move(tmp_path / "images" / f"{held_name}.{ending}", gone)
    _, text = run(path, *KEYS, "stage.until=8")
    fields = {"missing": 1, "count": 5, "title": "held-out", "left": 4}
    assert says(text, "validation-images-gone", **fields) and [count for _, count in measured(folder, 8)] == [4, 4]
    out = StringIO()
    validate(str(folder), config, console=Console(file=out, width=200))
    assert says(out.getvalue(), "validation-images-gone", **fields)
    out = StringIO()
    check(load_config(path, [*KEYS, "stage.until=8"]), Console(file=out, width=200))
    assert says(out.getvalue(), "validation-planned", held_out=4, stabilised=4)
    for file in gone.iterdir():
        file.rename(tmp_path / "images" / file.name)
    run(path, *KEYS, "stage.until=10")
    assert measured(folder, 10) == measured(folder, 0)


def test_a_run_survives_a_cache_that_is_encoded_anew(tmp_path, tiny_model):
    write_images(tmp_path / "images", 24)
    path = job(tmp_path, tiny_model, tmp_path / "images", STAGE)
    folder, _ = run(path, *KEYS)
    _, text = run(path, *KEYS, "stage.until=6", "cache.dtype=fp32")
    assert says(text, "latents-encoded-anew") and measured(folder, 6) == measured(folder, 0)
    write_images(tmp_path / "images", 30)  # the first 24 are the same
    config = load_config(path, [*KEYS, "stage.until=8"])
    cache(config, quiet())
    with refused("validation-images-missing", count=9, before=24, after=30), open_run(config, quiet()):
        pass
    out = StringIO()
    validate(str(folder), config, console=Console(file=out, width=300))
    assert pattern("validation-images-missing", count=9).search(out.getvalue()) and says(out.getvalue(), "other-images")
    run(path, *KEYS, "stage.until=8", "cache.dtype=fp32")
    assert measured(folder, 8) == measured(folder, 0)
