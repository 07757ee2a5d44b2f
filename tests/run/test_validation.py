"""Validation: choice of images, formula of the loss, reproducibility, EMA weights, and the command."""

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
from runs import final, rewind, rows_of, run, same
from sentences import refused, says
from tiny import job, make_tiny_model, tiny_vae, write_images

from fastsd.commands.cache import cache
from fastsd.commands.check import check
from fastsd.commands.convert import convert
from fastsd.commands.validate import validate
from fastsd.config.schema import load_config
from fastsd.data.cache import LatentCache
from fastsd.data.loader import Loader
from fastsd.data.validation_split import ValidationSplits, choose_splits
from fastsd.model.formats.load import load_model, write_rest
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.vae import Vae
from fastsd.run import checkpoint
from fastsd.run.run import open_run
from fastsd.run.stage_start import start_stage
from fastsd.run.validation import Validation, aggregate, format_line, format_table
from fastsd.terminal.console import Console
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
PLANNED = {"held_out": 4, "stabilised": 3, "timesteps": 2, "bands": 2, "forwards": 6}
OVERRIDES = (
    "sample.prompts=[]", "validate.held_out=4", "validate.stabilised=3", "validate.every=2", "validate.batch=3",
    "validate.bands=2", "validate.per_band=1",
)  # fmt: skip


MEASURED = ("set", "weights", "loss", "se", "bands", "items", "each")


def validation_rows(folder) -> list[dict]:
    return rows_of(folder, "validation.jsonl")


def last_rows(folder, weights="raw") -> list[dict]:
    """Return the last rows of a run, as `fastsd validate` measures them."""
    rows = [row for row in validation_rows(folder) if row["weights"] == weights]
    return [{key: row[key] for key in MEASURED} | {"weights": "raw"} for row in rows[-2:]]


def rows_at(folder, step) -> list[dict]:
    rows = [row for row in validation_rows(folder) if row["step"] == step and row["weights"] == "raw"]
    return [{key: row[key] for key in MEASURED} for row in rows]


def measure(model, config) -> list[dict]:
    return validate(str(model), config, console=Console(file=StringIO()))


def open_splits(path, *overrides) -> tuple[LatentCache, ValidationSplits]:
    """Return the cache of a config and the splits chosen from it."""
    config = load_config(path, [*OVERRIDES, *overrides])
    counts = cache(config, Console(file=StringIO()))
    latents = LatentCache.open(config.cache.dir, counts.view)
    return latents, choose_splits(latents, config)


def contents(latents, samples) -> set[bytes]:
    return {latents.get([i])["latents"].numpy().tobytes() for i in samples.tolist()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model, images):
    """The config path, folder and output of an uninterrupted run."""
    path = job(tmp_path_factory.mktemp("uninterrupted"), tiny_model, images, STAGE)
    return path, *run(path, *OVERRIDES)


def test_images_are_chosen_by_content(tmp_path, tiny_model):
    write_images(tmp_path / "b", 30)
    path = job(tmp_path, tiny_model, tmp_path / "b", STAGE)
    latents, sets = open_splits(path)
    before = {name: contents(latents, samples) for name, samples in sets.measured.items()}
    assert list(map(len, before.values())) == [4, 3] and not before["held_out"] & before["stabilised"]
    # Images in a folder that comes first change the numbers of the old ones. Each new image that is chosen replaces an old one.
    write_images(tmp_path / "a", 10, seed=5)
    latents, sets = open_splits(path, f'data.folders=["{tmp_path / "a"}", "{tmp_path / "b"}"]')
    after = contents(latents, sets.measured["held_out"])
    new = after - contents(latents, np.arange(10, 40))
    assert len(after & before["held_out"]) == 4 - len(new) >= 2
    # Replacing images that are not measured changes nothing.
    for i in range(10):
        shutil.copy(tmp_path / f"b/{i + 20:04d}.png", tmp_path / f"a/{i:04d}.png")
    latents, sets = open_splits(path, f'data.folders=["{tmp_path / "a"}", "{tmp_path / "b"}"]')
    assert {name: contents(latents, samples) for name, samples in sets.measured.items()} == before
    latents, sets = open_splits(path, "validate.seed=1")
    assert contents(latents, sets.measured["held_out"]) != before["held_out"]


def test_copies_are_held_out_together_and_measured_once(tmp_path, tiny_model):
    write_images(tmp_path / "images", 12)
    latents, sets = open_splits(job(tmp_path, tiny_model, tmp_path / "images", STAGE))
    held = sets.measured["held_out"][0]
    for name in ("aaa", "zzz"):
        shutil.copy(tmp_path / f"images/{held:04d}.png", tmp_path / f"images/{name}.png")
        (tmp_path / f"images/{name}.txt").write_text(f"another caption, {name}")
    more_latents, more_sets = open_splits(tmp_path / "job.toml")
    assert contents(more_latents, more_sets.measured["held_out"]) == contents(latents, sets.measured["held_out"])
    assert len(more_sets.measured["held_out"]) == 4 and len(more_sets.left_out) == 6
    assert contents(more_latents, more_sets.left_out) == contents(latents, sets.left_out)


def test_images_can_be_chosen_by_number(tmp_path, tiny_model):
    """Corresponding data sets then have the same image numbers, timesteps and noise."""
    numbers, hashes = [], []
    for name, seed in (("a", 0), ("b", 9)):
        write_images(tmp_path / name, 20, seed=seed)
        (tmp_path / f"of-{name}").mkdir()
        path = job(tmp_path / f"of-{name}", tiny_model, tmp_path / name, STAGE)
        _, sets = open_splits(path, 'validate.by="number"')
        numbers.append({name: samples.tolist() for name, samples in sets.measured.items()})
        with open_run(load_config(path, [*OVERRIDES, 'validate.by="number"']), Console(file=StringIO())) as opened_run:
            hashes.append([row["items"] for row in opened_run.evaluation.validation.rows()])
    assert numbers[0] == numbers[1] and hashes[0] == hashes[1]
    _, by_content = open_splits(path)
    assert {name: samples.tolist() for name, samples in by_content.measured.items()} != numbers[1]


def test_filters_apply_to_measured_images(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    latents, sets = open_splits(path, 'data.include=["star"]', "validate.held_out=3", "validate.stabilised=2")
    for samples in sets.measured.values():
        assert all("star" in caption for caption in latents.captions(samples))
    with refused("held-out-size") as error:
        open_splits(path, 'data.include=["star"]', "validate.held_out=7")
    assert " 12 " in str(error.value)


@pytest.mark.slow
def test_held_out_images_are_in_no_batch(tmp_path, tiny_model):
    write_images(tmp_path / "images", 14)
    write_images(tmp_path / "wide", 9, seed=3)
    for file in (tmp_path / "wide").glob("*.png"):
        Image.open(file).resize((60, 40)).save(file)
    path = job(tmp_path, tiny_model, tmp_path / "images", STAGE)
    folders = f'data.folders=["{tmp_path / "images"}", {{ path = "{tmp_path / "wide"}", repeats = 2 }}]'
    keys = [*OVERRIDES, folders, "data.buckets={ min = 16, max = 64, step = 8 }", "data.flip=true", "validate.held_out=8"]
    keys.append("data.resolution=32")
    folder, text = run(path, *keys)
    with open_run(load_config(path, keys), Console(file=StringIO())) as opened_run:
        data = opened_run.data
        loader, left_out = data.loader(0), set(data.sets.left_out.tolist())
        read = {i for batch in loader.stream(0, 160, 4) for i in batch.samples_B.tolist()}
        wide = {group.first + i for group in data.latents.groups if group.root == 1 for i in range(group.count)}
    assert len(left_out) == 8 and read == set(range(23)) - left_out and 0 < len(wide & left_out) < 8
    assert loader.images == 15 + len(wide - left_out)
    assert says(text, "images-counted", epoch=loader.images) and says(text, "validation-planned", held_out=8, stabilised=3)
    assert measure(folder, load_config(path, keys)) == last_rows(folder)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_follows_its_formula(prediction, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    config = load_config(path, [*OVERRIDES, f"model.prediction={prediction}", "validate.bands=3", "validate.per_band=2"])
    latents, sets = open_splits(path)
    model, errors = load_model(config.model), []
    abar_T = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    for sample in sets.measured["held_out"].tolist():
        x = latents.get([sample])["latents"].double() * 0.5
        context = model.text.encode(model.text.tokenize(latents.captions([sample])))
        words = noise.philox(0, 15, torch.tensor(latents.checks(sample, sample + 1)), torch.arange(6))[0].tolist()
        for stratum, (first, second, third, _) in enumerate(words):
            start, end = stratum * 1000 // 6, (stratum + 1) * 1000 // 6
            t = start + math.floor(first / 2**32 * (end - start))
            position = second * 2**32 + third
            position -= 2**64 if position >= 2**63 else 0
            eps = noise.normal(0, 0, torch.tensor([position]), x.shape[1:]).double()
            signal, sigma = abar_T[t] ** 0.5, (1 - abar_T[t]) ** 0.5
            target = eps if prediction == "epsilon" else signal * eps - sigma * x
            with torch.no_grad():
                output = model.unet((signal * x + sigma * eps).float(), torch.tensor([t]), context).double()
            errors.append(((output - target) ** 2).mean().item())
    loader = Loader(latents, model.text.tokenize, 0, config.stage[0])
    model.unet.train()  # training mode changes nothing
    row = Validation(model, loader, sets, config.validate_).rows()[0]
    assert row["set"] == "held_out" and row["loss"] == pytest.approx(np.mean(errors), rel=1e-6)
    errors_nS = np.array(errors).reshape(4, 6)
    assert row["se"] == pytest.approx(errors_nS.mean(1).std(ddof=1) / 2, rel=1e-5)
    for b, (first, end, loss, se) in enumerate(row["bands"]):
        means = errors_nS[:, 2 * b : 2 * b + 2].mean(1)
        assert (first, end) == [(0, 333), (333, 666), (666, 1000)][b]
        assert (loss, se) == pytest.approx((means.mean(), means.std(ddof=1) / 2), rel=1e-5)


def test_bands_and_error_bars():
    rng = np.random.default_rng(0)
    errors, bounds = rng.lognormal(-3, 2, (37, 12)), list(range(0, 1201, 100))
    row = aggregate(errors.tolist(), bounds, 3)
    assert row["loss"] == pytest.approx(sum(band[2] for band in row["bands"]) / 4, abs=1e-12)
    assert row["loss"] == pytest.approx(errors.mean(), abs=1e-12)
    assert [band[:2] for band in row["bands"]] == [[0, 300], [300, 600], [600, 900], [900, 1200]]
    means = errors[:, 3:6].mean(1)
    assert row["bands"][1][2:] == pytest.approx([means.mean(), means.std(ddof=1) / 37**0.5], abs=1e-12)
    assert aggregate(errors[::-1].tolist(), bounds, 3) == row
    single = aggregate(errors[:1].tolist(), bounds, 3)
    assert single["se"] == 0 and all(band[3] == 0 for band in single["bands"])
    assert single["loss"] == pytest.approx(errors[0].mean())
    broken = aggregate([[math.nan, 1.0], [math.inf, 1.0]], [0, 500, 1000], 1)
    assert math.isnan(broken["loss"]) and broken["bands"][1] == [500, 1000, 1.0, 0.0]


def test_validation_is_reproducible(uninterrupted, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    config = load_config(path, [*OVERRIDES])
    with open_run(config, Console(file=StringIO())) as opened_run:
        step, loader = start_stage(opened_run, 0, ""), opened_run.data.loader(0)
        validation = opened_run.evaluation.validation
        rows, weights = validation.rows(), step.components["unet"].master_hi.clone()
        assert rows == validation.rows() == rows_at(uninterrupted[1], 0)
        for i in range(2):
            step(loader.batch(4 * i, 4), i)
        assert validation.rows() != rows
        step.components["unet"].master_hi.copy_(weights)
        assert validation.rows() == rows
        table = validation.table.model_copy(update={"batch": 2})
        in_small_batches = Validation(opened_run.model, loader, opened_run.data.sets, table)
        assert in_small_batches.forwards > validation.forwards
        for row, other in zip(rows, in_small_batches.rows(), strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-6)
            assert [band[2:] for band in other["bands"]] == [pytest.approx(band[2:], rel=1e-6) for band in row["bands"]]


def test_rows_and_output_of_a_run(uninterrupted):
    _, folder, text = uninterrupted
    rows = validation_rows(folder)
    expected = [(n, name, kind) for n in (0, 2, 4, 6) for kind in ("raw", "ema") for name in ("held_out", "stabilised")]
    assert [(row["step"], row["set"], row["weights"]) for row in rows] == expected
    assert list(rows[0]) == ["step", "images", "stage", *MEASURED]
    assert all(row["images"] == 4 * row["step"] and row["stage"] == "one" and len(row["bands"]) == 2 for row in rows)
    assert rows[0]["loss"] == rows[2]["loss"] != rows[4]["loss"] != rows[6]["loss"]  # the EMA starts equal to the weights
    (line,) = [line for line in text.splitlines() if says(line, "validation-measured", step=6)]
    values = {"held_out": f"{rows[-4]['loss']:.4f}", "held_out_se": f"{rows[-4]['se']:.4f}"}
    assert says(line, "validation-measured", stabilised=f"{rows[-3]['loss']:.4f}", **values)
    assert f"; t 0000-0499 {rows[-4]['bands'][0][2]:.4f}, " in line
    assert says(text, "images-counted", images=21, resolution=16, sizes="", epoch=17)
    assert says(text, "validation-planned", **PLANNED) and ", every 2\n" in text


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0, 2, 4])
def test_a_stopped_run_writes_the_same_rows(stop, uninterrupted, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    shutil.copytree(uninterrupted[1], tmp_path / "run")
    rewind(tmp_path / "run", stop)
    with open(tmp_path / "run" / "validation.jsonl", "a") as file:
        file.write('{"step": 6, "cut off')
    folder, _ = run(path, *OVERRIDES)
    assert (folder / "validation.jsonl").read_bytes() == (uninterrupted[1] / "validation.jsonl").read_bytes()
    assert same(final(folder), final(uninterrupted[1]))


@pytest.mark.slow
def test_validation_does_not_change_training(uninterrupted, tmp_path, tiny_model, images):
    def trained(name, *keys):
        (tmp_path / name).mkdir()
        folder, _ = run(job(tmp_path / name, tiny_model, images, STAGE), *keys)
        return final(folder), (folder / "log.jsonl").read_bytes(), folder

    weights, log, folder = trained("often", *OVERRIDES, "validate.every=1", "validate.bands=3", "log.tensorboard=true")
    assert same(weights, final(uninterrupted[1])) and log == (uninterrupted[1] / "log.jsonl").read_bytes()
    assert len(validation_rows(folder)) == 7 * 4 and list((folder / "tensorboard").iterdir())
    # A stabilised split does not change the order of training.
    only, none = trained("stabilised", *OVERRIDES, "validate.held_out=0"), trained("none", "sample.prompts=[]")
    trained_tensors = {name: tensor for name, tensor in only[0].items() if ":validation" not in name}
    assert same(trained_tensors, none[0]) and only[1] == none[1] != log
    assert {row["set"] for row in validation_rows(only[2])} == {"stabilised"} and not (none[2] / "validation.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ema_weights_are_measured_and_removed_again(precision, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    folder, _ = run(path, *OVERRIDES, precision=precision)
    config = load_config(path, [*OVERRIDES], precision)
    assert last_rows(folder, "raw") != last_rows(folder, "ema")
    for name, weights in (("run", "raw"), ("run/model", "raw"), ("run/model-ema", "ema")):
        rows = measure(tmp_path / name, config)
        assert [{key: row[key] for key in MEASURED} for row in rows] == last_rows(folder, weights)
    with open_run(load_config(path, [*OVERRIDES, "stage.one.until=8"], precision), Console(file=StringIO())) as opened_run:
        unet = start_stage(opened_run, 0, "").components["unet"]
        before, weight = unet.master_hi.clone(), unet.weights[0]
        with pytest.raises(KeyError), unet.averaged("ema"):
            expected = unet.ema[0] if precision == "fp32" else split_master(unet.ema[0])[0]
            assert torch.equal(unet.master_hi, expected) and not torch.equal(unet.master_hi, before)
            assert weight.data_ptr() == unet.master_hi.data_ptr()
            raise KeyError
        assert torch.equal(unet.master_hi, before)


def test_validation_ignores_the_objective_of_the_stage(uninterrupted, tmp_path, tiny_model, images):
    keys = ["stage.noise_offset=0.1", "stage.loss=huber", "stage.weighting=min_snr", "stage.timestep_range=[100, 200]"]
    folder, _ = run(job(tmp_path, tiny_model, images, STAGE), *OVERRIDES, *keys, "stage.caption_dropout=0.9", "seed=3")
    assert rows_at(folder, 0) == rows_at(uninterrupted[1], 0) and rows_at(folder, 2) != rows_at(uninterrupted[1], 2)


def test_cached_text_embeddings_give_the_same_loss(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    folder, _ = run(path, *OVERRIDES, "cache.hidden_states=true", "cache.dtype=fp32")
    config = load_config(path, [*OVERRIDES, "cache.hidden_states=true", "cache.dtype=fp32"])
    assert measure(folder, config) == last_rows(folder)
    for path in (images.parent / "cache" / "states").iterdir():
        path.unlink()
    out = StringIO()
    rows = validate(str(folder), config, console=Console(file=out, width=200))
    assert says(out.getvalue(), "frozen-file-damaged")
    assert rows[0]["loss"] == pytest.approx(last_rows(folder)[0]["loss"], rel=1e-5)


def test_command_measures_runs_checkpoints_and_models(uninterrupted, tmp_path, tiny_model, images, start):
    path, folder, _ = uninterrupted
    json_file, output = tmp_path / "rows.json", tmp_path / "output"
    process = start(output, "validate", str(folder), str(path), *OVERRIDES, "--json", str(json_file))
    process.join(600)
    assert process.exitcode == 0, output.read_text()
    values = json.loads(json_file.read_text())
    assert values["rows"] == last_rows(folder) and values["precision"] == "fp32"
    lines = output.read_text().splitlines()
    assert lines[-4].startswith("timesteps") and lines[-3].startswith("0000-0499 ")
    assert "\n".join(lines[-4:]) == format_table(values["rows"])
    config = load_config(path, [*OVERRIDES])
    early = checkpoint.checkpoints(folder / "checkpoints")[0]
    assert measure(early, config) == rows_at(folder, 2)
    assert measure(tiny_model, config) == rows_at(folder, 0)
    bf16 = measure(folder, load_config(path, [*OVERRIDES], "bf16"))
    assert bf16 != last_rows(folder) and bf16[0]["loss"] == pytest.approx(last_rows(folder)[0]["loss"], rel=0.05)


def test_single_file_and_folder_have_the_same_loss(tmp_path, images):
    cfg = UNetConfig(block_out_channels=(32, 64), attention=(True, False), layers_per_block=2, cross_attention_dim=128)
    model = make_tiny_model(tmp_path / "m", cfg)
    model.vae = Vae(tiny_vae(groups=32, width=32, factor=0.18215), "vae")
    write_rest(tmp_path / "m", model)
    single_file(tmp_path / "m.safetensors", model)
    path = job(tmp_path, tmp_path / "m", images, STAGE)
    config = load_config(path, [*OVERRIDES])
    cache(config, Console(file=StringIO()))
    rows = measure(tmp_path / "m", config)
    assert measure(tmp_path / "m.safetensors", config) == rows
    convert(str(tmp_path / "m"), tmp_path / "ours.safetensors")
    keys = [*OVERRIDES, "model.prediction=v_prediction", f"model.tokenizer={tmp_path / 'm'}"]
    config = load_config(job(tmp_path, tmp_path / "other", images, STAGE), keys)  # both know their own prediction type
    assert measure(tmp_path / "m", config) == measure(tmp_path / "ours.safetensors", config) == rows


def test_the_base_is_recognized_under_another_spelling(uninterrupted, tmp_path, tiny_model):
    tiny_vae(seed=3).save_pretrained(tmp_path / "vae")
    config = load_config(uninterrupted[0], [*OVERRIDES, f"model.vae={tmp_path / 'vae'}"])
    cache(config, Console(file=StringIO()))
    assert measure(f"{tiny_model}/", config) == measure(tiny_model, config)


def test_a_model_with_another_vae_needs_its_latents(uninterrupted, tmp_path):
    model = make_tiny_model(tmp_path / "m", seed=2)
    model.vae = Vae(tiny_vae(seed=9), "vae")
    write_rest(tmp_path / "m", model)
    config = load_config(uninterrupted[0], [*OVERRIDES])
    with refused("validate-no-latents") as error:
        measure(tmp_path / "m", config)
    assert "\n" not in str(error.value) and f"`fastsd cache CONFIG model.vae={tmp_path / 'm'}`" in str(error.value)
    cache(load_config(uninterrupted[0], [*OVERRIDES, f"model.vae={tmp_path / 'm'}"]), Console(file=StringIO()))
    assert [row["set"] for row in measure(tmp_path / "m", config)] == ["held_out", "stabilised"]


BAD_VALUES = [
    ("held_out", 11, "held-out-size", ["21", "10"]),
    ("stabilised", 18, "stabilised-size", ["17"]),
    ("bands", 0, "config-invalid", ["1"]),
    ("per_band", 0, "config-invalid", []),
    ("batch", 0, "config-invalid", []),
    ("per_band", 501, "validate-bands", ["1002", "1000"]),
    ("held_out", -1, "config-invalid", []),
    ("every", 0, "config-invalid", []),
]


@pytest.mark.parametrize("key, value, code, facts", BAD_VALUES)
def test_bad_values_are_refused(key, value, code, facts, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    keys = [*OVERRIDES, f"validate.{key}={value}"]
    with refused(code) as run_error:
        run(path, *keys)
    with refused(code if code == "config-invalid" else "check-problems") as check_error:
        check(load_config(path, keys), Console(file=StringIO()))
    for text in (str(run_error.value), str(check_error.value)):
        assert all(fact in text for fact in [f"validate.{key}", str(value), *facts]) and "\n" not in text


def test_command_refuses_bad_models_and_configs(uninterrupted, tmp_path):
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with refused("validate-nothing"):
        validate(str(uninterrupted[1]), load_config(uninterrupted[0]))
    config = load_config(uninterrupted[0], [*OVERRIDES])
    with refused("no-checkpoint"):
        validate(str(tmp_path / "new"), config)
    with refused("source-missing"):
        validate("/nowhere/at/all", config)
    with refused("json-folder-missing"):
        validate(str(uninterrupted[1]), config, tmp_path / "not" / "there.json")


def test_a_batch_too_large_for_the_memory_is_refused(uninterrupted, monkeypatch):
    forward = UNet.forward

    def forward_of_two(unet, latents, *arguments, **keys):
        if len(latents) > 2:
            raise torch.OutOfMemoryError
        return forward(unet, latents, *arguments, **keys)

    monkeypatch.setattr(UNet, "forward", forward_of_two)
    path, folder, _ = uninterrupted
    with refused("validate-memory", batch=3):
        measure(folder, load_config(path, [*OVERRIDES]))
    assert measure(folder, load_config(path, [*OVERRIDES, "validate.batch=2"]))


def test_changes_of_the_held_out_split_are_refused(uninterrupted, tmp_path, tiny_model, images):
    shutil.copytree(uninterrupted[1], tmp_path / "run")
    path = job(tmp_path, tiny_model, images, STAGE)
    for key, before, after in (("validate.held_out", 4, 5), ("validate.seed", 0, 1)):
        with refused("run-other-start", key=key, before=before, after=after):
            run(path, *OVERRIDES, f"{key}={after}")
    keys = ["validate.stabilised=2", "validate.every=1", "validate.bands=3", "validate.batch=2", "stage.one.until=7"]
    folder, _ = run(path, *OVERRIDES, *keys)
    rows = validation_rows(folder)
    new = [row for row in rows if row["step"] == 7]
    assert len(rows) == 16 + 4 == 16 + len(new) and len(new[0]["bands"]) == 3


def test_check_reports_the_forwards(uninterrupted):
    out = StringIO()
    check(load_config(uninterrupted[0], [*OVERRIDES]), Console(file=out, width=200))
    (line,) = [line for line in out.getvalue().splitlines() if says(line, "validation-planned", **PLANNED)]
    assert line.startswith("ok    validation: ") and line.endswith(", every 2")
    with closing(LatentCache.open(load_config(uninterrupted[0]).cache.dir)) as latents:
        assert len(latents.checks(0, 21)) == 21 == len(set(latents.checks(0, 21).tolist()))


def test_rows_name_their_images_timesteps_and_noise(uninterrupted):
    path, folder, _ = uninterrupted
    items = {
        name: {row["items"] for row in validation_rows(folder) if row["set"] == name} for name in ("held_out", "stabilised")
    }
    (held_out,), (stabilised,) = items.values()  # the same at every step
    assert len(held_out) == len(stabilised) == 16 and held_out != stabilised
    other = measure(folder, load_config(path, [*OVERRIDES, "validate.per_band=7"]))
    assert {row["items"] for row in other}.isdisjoint((held_out, stabilised))


def test_numbers_are_formatted_by_band_and_set():
    rows = [
        {"set": "held_out", "weights": "raw", "loss": 0.5, "se": 0.01, "bands": [[0, 500, 0.25, 0.1], [500, 1000, 0.75, 0.2]]},
        {"set": "stabilised", "weights": "ema", "loss": 0.4, "se": 0.02, "bands": [[0, 500, 0.2, 0.3], [500, 1000, 0.6, 0.4]]},
    ]
    assert (
        format_line(rows) == "held out 0.5000 ± 0.0100, stabilised (ema) 0.4000 ± 0.0200; t 0000-0499 0.2500, 0500-0999 0.7500"
    )
    assert format_table(rows).splitlines() == [
        "timesteps         held out          stabilised (ema)",
        "0000-0499         0.2500 ± 0.1000   0.2000 ± 0.3000",
        "0500-0999         0.7500 ± 0.2000   0.6000 ± 0.4000",
        "all               0.5000 ± 0.0100   0.4000 ± 0.0200",
    ]


def test_images_of_several_folders_and_shapes_are_measured(tmp_path, tiny_model):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(8):
            image = Image.effect_noise((64, 40) if i % 2 else (40, 64), 60 + i)
            image.convert("RGB").save(tmp_path / name / f"{i}.png")
    path = job(tmp_path, tiny_model, tmp_path / "a", STAGE, resolution=32)
    keys = [*OVERRIDES, f'data.folders=["{tmp_path / "a"}", "{tmp_path / "b"}"]', "validate.held_out=8"]
    keys += ["data.buckets={ min = 16, max = 64, step = 8 }"]
    config = load_config(path, keys)
    cache(config, Console(file=StringIO()))
    together, alone = (measure(tiny_model, load_config(path, [*keys, f"validate.batch={size}"])) for size in (4, 1))
    for row, row_alone in zip(together, alone, strict=True):
        assert len(row["each"]) == {"held_out": 8, "stabilised": 3}[row["set"]]
        assert row["each"] == pytest.approx(row_alone["each"], rel=1e-4)


def test_error_bars_of_one_and_two_images():
    assert aggregate([[1.0], [3.0]], [0, 1000], 1) == {"loss": 2.0, "se": 1.0, "bands": [[0, 1000, 2.0, 1.0]]}
    assert aggregate([[3.0]], [0, 1000], 1) == {"loss": 3.0, "se": 0.0, "bands": [[0, 1000, 3.0, 0.0]]}
