"""Advice that names a value: the value satisfies all rules at once, so that it never leads into the next error."""

import itertools
import json
import re
import tomllib
from io import StringIO

import pytest
from environment import ROOT
from sentences import ERRORS, LINES, pattern, says
from tiny import job

from fastsd.commands.cache import cache
from fastsd.commands.check import check
from fastsd.config.schema import load_config, parse_config
from fastsd.config.stages import StageTable
from fastsd.data.building.build import check_resolution
from fastsd.data.validation_split import _check_sizes
from fastsd.errors import UserError
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes
from fastsd.model.unet import UNetConfig
from fastsd.terminal.console import Console
from fastsd.train.objective import _timestep_range

STAGE = {"train": ["unet"], "until": 10}


def config_of(data: dict, **stage):
    table = {"folders": ["photos"]} | data
    return parse_config({"model": {"base": "base"}, "data": table, "stage": [STAGE | stage]}, "job")


def error_of(call, *arguments, **options) -> str:
    """Return the message of the error, or "" if there is none."""
    try:
        call(*arguments, **options)
    except UserError as error:
        return error.message
    return ""


def advised(message: str) -> dict:
    """Return the assignments that a message ends with."""
    return {key: json.loads(value) for key, value in re.findall(r"([\w.]+) = (\d+)", message.rpartition("; use ")[2])}


def test_sides_of_buckets():
    """Whatever the sides, one piece of advice is enough, in the config and with the VAE."""
    counts = {"sides": 0, "step": 0}
    for resolution, low, high, step in itertools.product((72, 500, 512), (8, 72, 100, 600), (100, 520, 1100), (8, 12, 64, 70)):
        buckets = {"min": low, "max": high, "step": step}
        message = error_of(config_of, {"resolution": resolution, "buckets": buckets})
        if low > high or step > min(low, resolution):
            assert says(message, "buckets-min-above-max") or says(message, "bucket-step-above"), buckets
            continue
        if message:
            assert advised(message), message
            buckets |= {key.removeprefix("buckets."): value for key, value in advised(message).items()}
            counts["sides"] += 1
        config = config_of({"resolution": resolution, "buckets": buckets})
        if message := error_of(check_resolution, config, 8):
            buckets["step"] = int(re.search(r"use (\d+)", message)[1])
            buckets |= {key.removeprefix("buckets."): value for key, value in advised(message).items()}
            counts["step"] += 1
        check_resolution(config_of({"resolution": resolution, "buckets": buckets}), 8)
    assert min(counts.values()) > 5, counts


@pytest.mark.parametrize("resolution", [7 + 8, 500, 504, 520, 1000])
def test_resolution_of_squares(resolution):
    """The VAE needs multiples of 8 and the UNet of 64: advice about the one satisfies the other."""
    shapes = Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE)
    messages = error_of(check_resolution, config_of({"resolution": resolution}), 8, 64), error_of(shapes.side, resolution)
    assert bool(messages[0]) == (resolution % 8 > 0) and messages[1]
    for message in filter(None, messages):
        values = list(map(int, re.findall(r"\d+", message.rpartition("use ")[2])))
        assert values
        for value in values:
            check_resolution(config_of({"resolution": value}), 8, 64)
            assert shapes.side(value)


def test_commands_agree_on_a_resolution(tmp_path, tiny_model, images):
    """`cache` and `check` name the values that the other takes, and samples of that size can be drawn."""
    path = job(tmp_path, tiny_model, images, '[[stage]]\ntrain = ["unet"]\nuntil = 2\nbatch = 2\n')
    for command in (cache, check):
        message = error_of(command, load_config(path, ["data.resolution=33"]), Console(file=StringIO()))
        values = re.findall(r"\d+", message.partition("use ")[2].partition("\n")[0])
        assert len(values) == 2, message
        for value in values:
            config = load_config(path, [f"data.resolution={value}", "stage.micro_batch=1"])
            cache(config, Console(file=StringIO()))
            check(config, Console(file=StringIO()))


def test_micro_batch():
    for batch, size in itertools.product((1, 4, 12), (3, 5, 100)):
        if message := error_of(config_of, {}, batch=batch, micro_batch=size):
            config_of({}, batch=batch, micro_batch=int(re.search(r"use (\d+)", message)[1]))


def test_timestep_range():
    for chosen in ([50, 101], [400, 500], [100, 101]):
        stage = StageTable(**STAGE, timestep_range=chosen)
        values = json.loads(re.search(r"use (\[.*\])", error_of(_timestep_range, stage, 100))[1])
        assert _timestep_range(StageTable(**STAGE, timestep_range=values), 100) == tuple(values)


def test_sizes_of_validation_sets():
    for held_out, stabilised, kept in itertools.product((0, 5, 40), (0, 9, 40), (0, 3)):
        sizes = {"held_out": held_out, "stabilised": stabilised}
        if message := error_of(_check_sizes, sizes, kept, 17):
            key = re.match(r"validate\.(\w+)", message)[1]
            first, *more = map(int, re.findall(r"to (\d+)", message))
            sizes[key] = first if key == "held_out" else first - kept
            if more:
                sizes["stabilised"] = more[0] - kept
        _check_sizes(sizes, kept, 17)


def test_examples_in_sentences_are_accepted():
    """Each sentence that ends in "for example KEY = VALUE" or in an assignment names a value that the config takes."""
    examples = {
        "validate-every-unused": ({"validate": {"every": 5}}, {}, ("validate", "held_out")),
        "lr-missing": ({}, {"optimizer": "lion"}, ("stage", "lr")),
        "ema-is-off": ({}, {"ema_power": 0.7}, ("stage", "ema")),
        "crops-of-centre": ({"data": {"folders": ["a"], "crops": 2}}, {}, ("data", "crop")),
        "epsilon-at-zero-snr": (
            {"model": {"base": "b", "prediction": "epsilon", "zero_snr": True}},
            {},
            ("model", "prediction"),
        ),
    }
    for name, (tables, stage, (table, key)) in examples.items():
        raw = {"model": {"base": "b"}, "data": {"folders": ["a"]}} | tables | {"stage": [STAGE | stage]}
        message = error_of(parse_config, raw, "job")
        assert pattern(name).search(message), message
        value = re.search(r'(?:for example |crop = |use )("[\w-]+"|[\d.e-]+)', message.rpartition(";")[2])[1].rstrip(".")
        target = raw["stage"][0] if table == "stage" else raw[table]
        target[key] = tomllib.loads(f"v = {value}")["v"]
        parse_config(raw, "job")


def test_every_sentence_with_a_computed_value_is_tested():
    """A sentence whose advice has a field is applied above, or by the test that is named here."""
    tested = {
        "cache-resolution", "model-resolution", "bucket-step", "buckets-above-resolution", "buckets-below-resolution",
        "micro-batch-divides", "timestep-range", "held-out-size", "stabilised-size",
    }  # fmt: skip
    elsewhere = {
        "swap-resolution": "commands/test_swap_vae.py", "stage-beyond-end": "run/test_going_back.py",
        "layer-norm-features": "kernels/test_norm_kernels.py",
    }  # fmt: skip
    assert tested | elsewhere.keys() <= ERRORS.keys() | LINES.keys()
    numeric = re.compile(
        r"(?:use|set it to at least|lower it to) \{(?:near|low|multiples|divisor|half|limit|least|advice)\}|use \[\{"
    )
    assert all(f'"{name}"' in (ROOT / "tests" / file).read_text() for name, file in elsewhere.items())
    computed = {name for name, text in (ERRORS | LINES).items() if numeric.search(text)}
    assert computed <= tested | elsewhere.keys(), computed - tested - elsewhere.keys()
