"""A program that calls fastsd finds its own settings of the process unchanged afterwards."""

import os
import signal
import warnings
from io import StringIO
from pathlib import Path

import pytest
import torch
from tiny import job, tiny_vae

from fastsd import generate, load_config, load_to_sample, train_config
from fastsd.commands.cache import cache
from fastsd.commands.redraw import redraw
from fastsd.commands.swap_vae import swap_vae
from fastsd.commands.validate import validate
from fastsd.config.schema import ModelTable, SampleTable
from fastsd.sampling import generate as generate_module
from fastsd.terminal.console import Console
from fastsd.train.step import Step

CUDNN, MATMUL = torch.backends.cudnn, torch.backends.cuda.matmul
FP32_PRODUCTS = MATMUL, CUDNN.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 1\nbatch = 4\noptimizer = "lion"\nlr = 1e-4\n'


def switches() -> tuple[object, ...]:
    precisions = (product.fp32_precision for product in FP32_PRODUCTS)
    return *precisions, MATMUL.allow_bf16_reduced_precision_reduction, CUDNN.deterministic, CUDNN.benchmark


def process_state() -> dict[str, object]:
    return {
        "switches": switches(),
        "generator": torch.get_rng_state().tolist(),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
    }


@pytest.fixture
def config(tmp_path, tiny_model, images):
    return load_config(job(tmp_path, tiny_model, images, STAGE), ["validate.stabilised=2", 'stage.0.precision="tf32"'])


@pytest.fixture
def calls(tmp_path, tiny_model, images, config):
    """Each way to use fastsd in a program, in an order in which they work."""
    model, console = str(tiny_model), Console(file=StringIO())
    tiny_vae(seed=1).save_pretrained(tmp_path / "vae")
    return {
        "cache": lambda: cache(config, console),
        "train": lambda: train_config(config, console),
        "validate": lambda: validate(model, config, console=console),
        "sample": lambda: generate(load_to_sample(ModelTable(base=model), "cpu"), ["a"], [0], SampleTable(steps=1), 32),
        "redraw": lambda: redraw(model, config, tmp_path / "redrawn", limit=1, console=console),
        "swap": lambda: swap_vae(model, str(tmp_path / "vae"), tmp_path / "swapped", images, limit=8, console=console),
    }


@pytest.fixture(autouse=True)
def other_settings():
    """Settings that fastsd never chooses."""
    settings = [(product, "fp32_precision", "tf32") for product in FP32_PRODUCTS]
    settings += [(MATMUL, "allow_bf16_reduced_precision_reduction", True), (CUDNN, "deterministic", True)]
    settings += [(CUDNN, "benchmark", True)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    for setting in settings:
        setattr(*setting)
    yield
    for setting in before:
        setattr(*setting)


def test_every_call_restores_the_process(calls):
    for name, call in calls.items():
        before = process_state()
        call()
        after = process_state()
        assert [key for key in before if before[key] != after[key]] == [], name


def test_switches_last_for_the_whole_stage(calls, monkeypatch):
    calls["cache"]()
    seen, forward = [], generate_module.denoise

    def recorded(*args, **options):
        seen.append(switches())
        return forward(*args, **options)

    monkeypatch.setattr(generate_module, "denoise", recorded)
    step = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *args: seen.append(switches()) or step(*args))
    calls["train"]()
    assert seen == [("tf32",) * 4 + (False, True, False)] * 2  # the step, and the samples after it
    seen.clear()
    calls["sample"]()
    assert seen == [("ieee",) * 4 + (False, True, False)]


def test_a_failed_call_restores_the_process_too(calls, monkeypatch):
    calls["cache"]()

    def fail(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(Step, "__call__", fail)
    monkeypatch.setattr(generate_module, "denoise", fail)
    for name in ("train", "sample"):
        before = process_state()
        with pytest.raises(ZeroDivisionError):
            calls[name]()
        assert process_state() == before
