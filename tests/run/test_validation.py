"""Validation: which images are measured, the loss by its formula, the same bits every time, averages, the command."""

import json
import math
import shutil
from contextlib import closing
from io import StringIO

import numpy as np
import pytest
import torch
from model_files import single_file
from PIL import Image
from rich.console import Console
from runs import final, run, same
from tiny import job, make_tiny_model, tiny_vae, write_images

from fastsd.commands.cache import cache
from fastsd.commands.check import check
from fastsd.commands.validate import validate
from fastsd.config.schema import load_config
from fastsd.data.cache import LatentCache
from fastsd.data.loader import Loader
from fastsd.data.validation_split import ValidationSplits, choose_splits
from fastsd.errors import UserError
from fastsd.model.formats.load import load_model, write_rest
from fastsd.model.unet import UNetConfig
from fastsd.model.vae import Vae
from fastsd.run import checkpoint
from fastsd.run.run import open_run
from fastsd.run.stage_start import start_stage
from fastsd.run.validation import Validation, in_a_table, summary
from fastsd_kernels import noise
from fastsd_kernels.arena import split_master

STAGE = """
[[stage]]
name = "one"
train = ["unet"]
until = 6
batch = 4
optimizer = "lion"
lr = 1e-3
ema = 0.8
checkpoint_every = 2
keep_checkpoints = 9
"""
SIZES = (
    "sample.prompts=[]", "validate.held_out=4", "validate.stabilised=3", "validate.every=2", "validate.batch=3",
    "validate.bands=2", "validate.per_band=1",
)  # fmt: skip


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def last(folder, weights="raw") -> list[dict]:
    """The last rows of a run, as `fastsd validate` has them."""
    found = [row for row in rows_of(folder) if row["weights"] == weights]
    kept = ("loss", "se", "bands", "set", "items", "each")
    return [{**{key: row[key] for key in kept}, "weights": "raw"} for row in found[-2:]]


def opened(path, *overrides) -> tuple[LatentCache, ValidationSplits]:
    """The cache of a config and the sets chosen from it."""
    config = load_config(path, [*SIZES, *overrides])
    counts = cache(config, Console(file=StringIO()))
    latents = LatentCache.open(config.cache.dir, counts.view)
    return latents, choose_splits(latents, config)


def content(latents, samples) -> set[bytes]:
    return {latents.get([i])["latents"].numpy().tobytes() for i in samples.tolist()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, images):
    """(config, run's folder, what was printed) of an uninterrupted run."""
    path = job(tmp_path_factory.mktemp("whole"), tiny_model, images, STAGE)
    return path, *run(path, *SIZES)


def test_pictures_are_chosen_by_what_they_are(tmp_path, tiny_model):
    write_images(tmp_path / "b", 30)
    path = job(tmp_path, tiny_model, tmp_path / "b", STAGE)
    latents, sets = opened(path)
    before = {name: content(latents, samples) for name, samples in sets.measured.items()}
    assert list(map(len, before.values())) == [4, 3] and not before["held_out"] & before["stabilised"]
    # More pictures, in a folder that comes first: the old ones lie elsewhere, and new ones push out as many as they are.
    write_images(tmp_path / "a", 10, seed=5)
    latents, sets = opened(path, f'data.folders=["{tmp_path / "a"}", "{tmp_path / "b"}"]')
    after = content(latents, sets.measured["held_out"])
    new = {one for one in after if one not in content(latents, np.arange(10, 40))}
    assert len(after & before["held_out"]) == 4 - len(new) >= 2
    # Without some that are only trained on nothing changes.
    for i in range(10):
        shutil.copy(tmp_path / f"b/{i + 20:04d}.png", tmp_path / f"a/{i:04d}.png")
    latents, sets = opened(path, f'data.folders=["{tmp_path / "a"}", "{tmp_path / "b"}"]')
    assert {name: content(latents, samples) for name, samples in sets.measured.items()} == before
    latents, sets = opened(path, "validate.seed=1")
    assert content(latents, sets.measured["held_out"]) != before["held_out"]


def test_copies_are_held_out_together_and_measured_once(tmp_path, tiny_model):
    write_images(tmp_path / "images", 12)
    latents, sets = opened(job(tmp_path, tiny_model, tmp_path / "images", STAGE))
    held = sets.measured["held_out"][0]
    for name in ("aaa", "zzz"):
        shutil.copy(tmp_path / f"images/{held:04d}.png", tmp_path / f"images/{name}.png")
        (tmp_path / f"images/{name}.txt").write_text(f"another caption, {name}")
    again, more = opened(tmp_path / "job.toml")
    assert content(again, more.measured["held_out"]) == content(latents, sets.measured["held_out"])
    assert len(more.measured["held_out"]) == 4 and len(more.left_out) == 6
    assert content(again, more.left_out) == content(latents, sets.left_out)


def test_numbers_may_choose_instead(tmp_path, tiny_model):
    """Sets whose images correspond: the same places, timesteps and noise, whatever lies there."""
    places, drawn = [], []
    for name, seed in (("a", 0), ("b", 9)):
        write_images(tmp_path / name, 20, seed=seed)
        (tmp_path / f"of-{name}").mkdir()
        path = job(tmp_path / f"of-{name}", tiny_model, tmp_path / name, STAGE)
        _, sets = opened(path, 'validate.by="number"')
        places.append({name: samples.tolist() for name, samples in sets.measured.items()})
        with open_run(load_config(path, [*SIZES, 'validate.by="number"']), Console(file=StringIO())) as of:
            drawn.append([row["items"] for row in of.evaluation.validation.rows()])
    assert places[0] == places[1] and drawn[0] == drawn[1]
    _, other = opened(path)
    assert {name: samples.tolist() for name, samples in other.measured.items()} != places[1]


def test_filters_are_heeded(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    latents, sets = opened(path, 'data.include=["star"]', "validate.held_out=3", "validate.stabilised=2")
    for samples in sets.measured.values():
        assert all("star" in caption for caption in latents.captions(samples))
    with pytest.raises(UserError, match="there are 12 different images to choose from"):
        opened(path, 'data.include=["star"]', "validate.held_out=7")


def test_nothing_held_out_is_in_any_batch(tmp_path, tiny_model):
    write_images(tmp_path / "images", 14)
    write_images(tmp_path / "wide", 9, seed=3)
    for i in range(9):
        picture = tmp_path / f"wide/{i:04d}.png"
        Image.open(picture).resize((60, 40)).save(picture)
    path = job(tmp_path, tiny_model, tmp_path / "images", STAGE)
    folders = f'data.folders=["{tmp_path / "images"}", {{ path = "{tmp_path / "wide"}", repeats = 2 }}]'
    keys = [*SIZES, folders, "data.buckets={ min = 16, max = 64, step = 8 }", "data.flip=true", "validate.held_out=8"]
    keys.append("data.resolution=32")
    folder, said = run(path, *keys)
    with open_run(load_config(path, keys), Console(file=StringIO())) as again:
        loader, left_out = again.data.loader(0), set(again.data.sets.left_out.tolist())
        read = [i for batch in loader.stream(0, 160, 4) for i in batch.samples_B.tolist()]
        wide = {
            i for group in again.data.latents.groups if group.root == 1 for i in range(group.first, group.first + group.count)
        }
    assert len(left_out) == 8 and set(read) == set(range(23)) - left_out and 0 < len(wide & left_out) < 8
    many = len(wide - left_out)
    assert loader.images == 15 - many + 2 * many
    assert f"{loader.images} an epoch" in said and "8 held out and 3 stabilised images" in said
    assert validate(str(folder), load_config(path, keys), console=Console(file=StringIO())) == last(folder)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_its_formula(prediction, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    config = load_config(path, [*SIZES, f"model.prediction={prediction}", "validate.bands=3", "validate.per_band=2"])
    latents, sets = opened(path)
    model, errors = load_model(config.model), []
    abar_T = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    for sample in sets.measured["held_out"].tolist():
        x = latents.get([sample])["latents"].double() * 0.5
        context = model.text.encode(model.text.tokenize(latents.captions([sample])))
        words = noise.philox(0, 15, torch.tensor(latents.checks(sample, sample + 1)), torch.arange(6))[0].tolist()
        for part, (first, second, third, _) in enumerate(words):
            low, high = part * 1000 // 6, (part + 1) * 1000 // 6
            t = low + math.floor(first / 2**32 * (high - low))
            place = second * 2**32 + third
            eps = noise.normal(0, 0, torch.tensor([place - 2**64 if place >= 2**63 else place]), x.shape[1:]).double()
            signal, level = abar_T[t] ** 0.5, (1 - abar_T[t]) ** 0.5
            target = eps if prediction == "epsilon" else signal * eps - level * x
            with torch.no_grad():
                found = model.unet((signal * x + level * eps).float(), torch.tensor([t]), context).double()
            errors.append(((found - target) ** 2).mean().item())
    loader = Loader(latents, model.text.tokenize, 0, config.stage[0])
    model.unet.train()  # nothing in a model acts otherwise then
    row = Validation(model, loader, sets, config.validate_).rows()[0]
    assert row["set"] == "held_out" and row["loss"] == pytest.approx(np.mean(errors), rel=1e-6)
    errors_nS = np.array(errors).reshape(4, 6)
    assert row["se"] == pytest.approx(errors_nS.mean(1).std(ddof=1) / 2, rel=1e-5)
    for b, (first, end, loss, se) in enumerate(row["bands"]):
        own = errors_nS[:, 2 * b : 2 * b + 2].mean(1)
        assert (first, end) == [(0, 333), (333, 666), (666, 1000)][b]
        assert (loss, se) == pytest.approx((own.mean(), own.std(ddof=1) / 2), rel=1e-5)


def test_bands_and_error_bars():
    rng = np.random.default_rng(0)
    errors, edges = rng.lognormal(-3, 2, (37, 12)), list(range(0, 1201, 100))
    found = summary(errors.tolist(), edges, 3)
    assert found["loss"] == pytest.approx(sum(band[2] for band in found["bands"]) / 4, abs=1e-12)
    assert found["loss"] == pytest.approx(errors.mean(), abs=1e-12)
    assert [band[:2] for band in found["bands"]] == [[0, 300], [300, 600], [600, 900], [900, 1200]]
    own = errors[:, 3:6].mean(1)
    assert found["bands"][1][2:] == pytest.approx([own.mean(), own.std(ddof=1) / 37**0.5], abs=1e-12)
    assert summary(errors[::-1].tolist(), edges, 3) == found
    one = summary(errors[:1].tolist(), edges, 3)
    assert one["se"] == 0 and all(band[3] == 0 for band in one["bands"]) and one["loss"] == pytest.approx(errors[0].mean())
    broken = summary([[math.nan, 1.0], [math.inf, 1.0]], [0, 500, 1000], 1)
    assert math.isnan(broken["loss"]) and broken["bands"][1] == [500, 1000, 1.0, 0.0]


def test_the_same_to_the_last_bit(whole, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    config = load_config(path, [*SIZES])
    with open_run(config, Console(file=StringIO())) as opened_run:
        step, loader = start_stage(opened_run, 0), opened_run.data.loader(0)
        measure = opened_run.evaluation.validation.rows
        first, state = measure(), step.parts["unet"].high.clone()
        assert first == measure() == last_at(whole[1], 0)
        for i in range(2):
            step(loader.batch(4 * i, 4), i)
        assert measure() != first
        step.parts["unet"].high.copy_(state)
        assert measure() == first
        changed = opened_run.evaluation.validation.table.model_copy(update={"batch": 2})
        other = Validation(opened_run.model, loader, opened_run.data.sets, changed)
        assert other.forwards > opened_run.evaluation.validation.forwards
        for row, split in zip(first, other.rows(), strict=True):
            assert split["loss"] == pytest.approx(row["loss"], rel=1e-6)
            assert [band[2:] for band in split["bands"]] == [pytest.approx(band[2:], rel=1e-6) for band in row["bands"]]


def last_at(folder, step) -> list[dict]:
    at = [row for row in rows_of(folder) if row["step"] == step and row["weights"] == "raw"]
    return [{key: row[key] for key in ("set", "weights", "loss", "se", "bands", "items", "each")} for row in at]


def test_what_a_run_writes(whole):
    _, folder, said = whole
    found = rows_of(folder)
    kinds = [(name, weights) for weights in ("raw", "ema") for name in ("held_out", "stabilised")]
    assert [(row["step"], row["set"], row["weights"]) for row in found] == [
        (step, *kind) for step in (0, 2, 4, 6) for kind in kinds
    ]
    assert list(found[0]) == ["step", "images", "stage", "set", "weights", "loss", "se", "bands", "items", "each"]
    assert all(row["images"] == 4 * row["step"] and row["stage"] == "one" and len(row["bands"]) == 2 for row in found)
    assert found[0]["loss"] == found[2]["loss"] != found[4]["loss"] != found[6]["loss"]  # the average starts as the weights
    (line,) = [line for line in said.splitlines() if line.startswith("validation at step 6: ")]
    assert f"held out {found[-4]['loss']:.4f} ± {found[-4]['se']:.4f}, stabilised {found[-3]['loss']:.4f}" in line
    assert f"by band {found[-4]['bands'][0][2]:.2g} " in line
    assert "21 at 16 px, 17 an epoch" in said
    assert "4 held out and 3 stabilised images, 2 timesteps of each (2 bands): 6 forwards, every 2" in said


@pytest.mark.parametrize("stop", [0, 2, 4])
def test_a_run_that_was_stopped_writes_the_same(stop, whole, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    shutil.copytree(whole[1], tmp_path / "run")
    for later in checkpoint.checkpoints(tmp_path / "run" / "checkpoints"):
        if int(later.name[5:]) > stop:
            shutil.rmtree(later)
    with open(tmp_path / "run" / "validation.jsonl", "a") as file:
        file.write('{"step": 6, "cut off')
    folder, _ = run(path, *SIZES)
    assert (folder / "validation.jsonl").read_bytes() == (whole[1] / "validation.jsonl").read_bytes()
    assert same(final(folder), final(whole[1]))


def test_measuring_changes_nothing(whole, tmp_path, tiny_model, images):
    def trained(name, *keys):
        (tmp_path / name).mkdir()
        folder, _ = run(job(tmp_path / name, tiny_model, images, STAGE), *keys)
        return final(folder), (folder / "log.jsonl").read_bytes(), folder

    weights, log, folder = trained("often", *SIZES, "validate.every=1", "validate.bands=3", "log.tensorboard=true")
    assert same(weights, final(whole[1])) and log == (whole[1] / "log.jsonl").read_bytes()
    assert len(rows_of(folder)) == 7 * 4 and list((folder / "tensorboard").iterdir())
    # What is trained on, too, changes no order.
    only, none = trained("stabilised", *SIZES, "validate.held_out=0"), trained("none", "sample.prompts=[]")
    assert same(only[0], none[0]) and only[1] == none[1] != log
    assert {row["set"] for row in rows_of(only[2])} == {"stabilised"} and not (none[2] / "validation.jsonl").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_averages_take_the_place_of_weights_and_leave_it(precision, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    folder, _ = run(path, *SIZES, precision=precision)
    config = load_config(path, [*SIZES], precision)
    assert last(folder, "raw") != last(folder, "ema")
    for name, weights in (("run", "raw"), ("run/model", "raw"), ("run/model-ema", "ema")):
        found = validate(str(tmp_path / name), config, console=Console(file=StringIO()))
        assert [
            {key: row[key] for key in expected} for row, expected in zip(found, last(folder, weights), strict=True)
        ] == last(folder, weights)
    with open_run(load_config(path, [*SIZES, "stage.one.until=8"], precision), Console(file=StringIO())) as again:
        part = start_stage(again, 0).parts["unet"]
        before, weight = part.high.clone(), part.weights[0]
        with pytest.raises(KeyError), part.averaged():
            expected = part.ema if precision == "fp32" else split_master(part.ema)[0]
            assert torch.equal(part.high, expected) and not torch.equal(part.high, before)
            assert weight.data_ptr() == part.high.data_ptr()
            raise KeyError
        assert torch.equal(part.high, before)


def test_the_objective_of_a_stage_is_not_measured(whole, tmp_path, tiny_model, images):
    keys = ["stage.noise_offset=0.1", "stage.loss=huber", "stage.weighting=min_snr", "stage.timestep_range=[100, 200]"]
    folder, _ = run(job(tmp_path, tiny_model, images, STAGE), *SIZES, *keys, "stage.caption_dropout=0.9", "seed=3")
    assert last_at(folder, 0) == last_at(whole[1], 0) and last_at(folder, 2) != last_at(whole[1], 2)


def test_cached_states_serve_as_well(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    folder, _ = run(path, *SIZES, "cache.hidden_states=true", "cache.dtype=fp32")
    config = load_config(path, [*SIZES, "cache.hidden_states=true", "cache.dtype=fp32"])
    assert validate(str(folder), config, console=Console(file=StringIO())) == last(folder)
    for path in (images.parent / "cache" / "states").iterdir():
        path.unlink()
    out = StringIO()
    rows = validate(str(folder), config, console=Console(file=out, width=200))
    assert "captions are encoded here" in out.getvalue()
    assert rows[0]["loss"] == pytest.approx(last(folder)[0]["loss"], rel=1e-5)


def test_the_command_measures_any_model(whole, tmp_path, tiny_model, images, start):
    path, folder, _ = whole
    out, said = tmp_path / "rows.json", tmp_path / "said"
    process = start(said, "validate", str(folder), str(path), *SIZES, "--json", str(out))
    process.join(600)
    assert process.exitcode == 0, said.read_text()
    found = json.loads(out.read_text())
    assert found["rows"] == last(folder) and found["precision"] == "fp32"
    lines = said.read_text().splitlines()
    assert lines[-4].startswith("timesteps") and lines[-3].startswith("0-499 ")
    assert "\n".join(lines[-4:]) == in_a_table(found["rows"])
    config = load_config(path, [*SIZES])
    early = checkpoint.checkpoints(folder / "checkpoints")[0]
    assert validate(str(early), config, console=Console(file=StringIO())) == last_at(folder, 2)
    assert validate(str(tiny_model), config, console=Console(file=StringIO())) == last_at(folder, 0)
    bf16 = validate(str(folder), load_config(path, [*SIZES], "bf16"), console=Console(file=StringIO()))
    assert bf16 != last(folder) and bf16[0]["loss"] == pytest.approx(last(folder)[0]["loss"], rel=0.05)


def test_a_single_file_is_measured_as_its_folder(tmp_path, images):
    cfg = UNetConfig(block_out_channels=(32, 64), attention=(True, False), layers_per_block=2, cross_attention_dim=128)
    model = make_tiny_model(tmp_path / "m", cfg)
    model.vae = Vae(tiny_vae(groups=32, width=32, factor=0.18215), "vae")
    write_rest(tmp_path / "m", model)
    single_file(tmp_path / "m.safetensors", model)
    path = job(tmp_path, tmp_path / "m", images, STAGE)
    config = load_config(path, [*SIZES])
    cache(config, Console(file=StringIO()))
    of_folder, of_file = (
        validate(str(tmp_path / name), config, console=Console(file=StringIO())) for name in ("m", "m.safetensors")
    )
    assert of_folder == of_file


def test_a_model_with_another_vae_needs_its_latents(whole, tmp_path, tiny_model, images):
    model = make_tiny_model(tmp_path / "m", seed=2)
    model.vae = Vae(tiny_vae(seed=9), "vae")
    write_rest(tmp_path / "m", model)
    config = load_config(whole[0], [*SIZES])
    with pytest.raises(UserError) as error:
        validate(str(tmp_path / "m"), config, console=Console(file=StringIO()))
    assert str(error.value).count("\n") == 0 and f"run `fastsd cache CONFIG model.vae={tmp_path / 'm'}` first" in str(
        error.value
    )
    cache(load_config(whole[0], [*SIZES, f"model.vae={tmp_path / 'm'}"]), Console(file=StringIO()))
    rows = validate(str(tmp_path / "m"), config, console=Console(file=StringIO()))
    assert [row["set"] for row in rows] == ["held_out", "stabilised"]


BAD = [
    (["validate.held_out=11"], "validate.held_out is 11 and there are 21 different images to choose from, of which no"),
    (["validate.stabilised=18"], "validate.stabilised is 18 and 17 different images are trained on; lower it to 17 or below"),
    (["validate.bands=0"], "validate.bands is 0; it must be greater than or equal to 1"),
    (["validate.per_band=0"], "validate.per_band is 0; it must be"),
    (["validate.batch=0"], "validate.batch is 0; it must be"),
    (["validate.per_band=501"], "validate.bands 2 times validate.per_band 501 is 1002 and the model has 1000 timesteps"),
    (["validate.held_out=-1"], "validate.held_out is -1; it must be"),
    (["validate.every=0"], "validate.every is 0; write steps (1000)"),
]  # fmt: skip


@pytest.mark.parametrize("keys, sentence", BAD)
def test_bad_values_get_a_sentence(keys, sentence, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    for command in (run, lambda *words: check(load_config(words[0], list(words[1:])), Console(file=StringIO()))):
        with pytest.raises(UserError) as error:
            command(path, *SIZES, *keys)
        assert sentence in str(error.value) and "\n" not in str(error.value)


def test_what_the_command_cannot_do(whole, tmp_path, tiny_model):
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="validate.held_out and validate.stabilised are 0, so there is nothing to measure"):
        validate(str(whole[1]), load_config(whole[0]))
    config = load_config(whole[0], [*SIZES])
    with pytest.raises(UserError, match="this run has no checkpoint yet"):
        validate(str(tmp_path / "new"), config)
    with pytest.raises(UserError, match="no such folder or file, and not a hub id"):
        validate("/nowhere/at/all", config)
    with pytest.raises(UserError, match="that folder is not there"):
        validate(str(whole[1]), config, tmp_path / "not" / "there.json")


def test_what_decides_the_order_stays(whole, tmp_path, tiny_model, images):
    shutil.copytree(whole[1], tmp_path / "run")
    path = job(tmp_path, tiny_model, images, STAGE)
    for change, words in (("held_out=5", "held_out: 4, now 5"), ("seed=1", "seed: 0, now 1")):
        with pytest.raises(UserError, match=f"was started with another validate.{words}; put it back"):
            run(path, *SIZES, f"validate.{change}")
    keys = ["validate.stabilised=2", "validate.every=1", "validate.bands=3", "validate.batch=2", "stage.one.until=7"]
    folder, _ = run(path, *SIZES, *keys)
    new = [row for row in rows_of(folder) if row["step"] == 7]
    assert len(rows_of(folder)) == 16 + 4 == 16 + len(new) and len(new[0]["bands"]) == 3


def test_check_says_what_it_costs(whole):
    out = StringIO()
    check(load_config(whole[0], [*SIZES]), Console(file=out, width=200))
    said = "ok    validation: 4 held out and 3 stabilised images, 2 timesteps of each (2 bands): 6 forwards, every 2\n"
    assert said in out.getvalue()
    with closing(LatentCache.open(load_config(whole[0]).cache.dir)) as latents:
        assert len(latents.checks(0, 21)) == 21 == len(set(latents.checks(0, 21).tolist()))
