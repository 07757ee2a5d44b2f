"""Small models and data sets that the tests share. Everything is made on the spot from fixed seeds."""

import functools
import importlib.util
import inspect
import multiprocessing
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Small tensors gain nothing from threads, and sums depend on their number: the same one here and in subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Kernels run on CPU tensors here unless there is a GPU. Read when a kernel is defined, so before any import of them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from triton.language.core import is_builtin
        from triton.runtime import interpreter

        @functools.cache
        def builtins(language) -> list[str]:
            return [name for name, member in inspect.getmembers(language) if is_builtin(member)]

        # The interpreter searches the whole language for builtins at every call of a function, a third of its time: here once.
        interpreter.inspect = types.SimpleNamespace(**vars(inspect))
        interpreter.inspect.getmembers = lambda language: [(name, getattr(language, name)) for name in builtins(language)]


def tiny_vae(channels: int = 4, factor: float = 0.5, seed: int = 0, groups: int = 4, width: int = 8):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(width, width),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        norm_num_groups=groups,
        layers_per_block=1,
        scaling_factor=factor,
    )


def make_tiny_model(folder: Path, cfg=None, seed: int = 0):
    """A whole SD1.5-shaped model with random weights, written as a diffusers folder: 32 px images, 16x16 latents."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from fastsd.demo_models import write_tokenizer
    from fastsd.model.files import SD15_SCHEDULER, Model, part_state_dict, write_part, write_rest
    from fastsd.model.text import TextEncoder
    from fastsd.model.unet import UNet, UNetConfig
    from fastsd.model.vae import Vae

    cfg = cfg or UNetConfig(
        block_out_channels=(16, 32),
        attention=(True, False),
        layers_per_block=1,
        heads=2,
        cross_attention_dim=16,
        norm_groups=4,
        sample_size=16,
    )
    torch.manual_seed(seed)
    write_tokenizer(folder / "source-tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "source-tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=cfg.cross_attention_dim,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model = Model(
        str(folder),
        UNet(cfg),
        TextEncoder(text, tokenizer, 0, folder / "source-tokenizer"),
        Vae(tiny_vae(cfg.in_channels), str(folder)),
        SD15_SCHEDULER,
    )
    for part in ("unet", "text_encoder"):
        write_part(folder, model, part, part_state_dict(model, part))
    write_rest(folder, model)
    return model


def write_images(folder: Path, count: int, size: int = 40, seed: int = 0) -> None:
    """Random smooth colour pictures with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    words = ["red", "green", "blue", "circle", "square", "star"]
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(", ".join(rng.permutation(words)[:3]))


@pytest.fixture
def whole_machine(tmp_path_factory):
    """For a test that takes most of the memory: one at a time, whichever processes the tests run in."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "whole-machine.lock"):
        yield


def pytest_collection_modifyitems(items):
    """The longest tests begin early and far apart: several processes would else end with one of them waiting for the other."""
    long = [item for item in items if "whole_machine" in item.fixturenames]
    rest = [item for item in items if item not in long]
    for i, item in enumerate(long):
        rest.insert(i * len(rest) // (2 * len(long)), item)
    items[:] = rest


def command_line(words: list[str], said: Path) -> None:
    from fastsd import cli

    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = ["fastsd", *words]
    cli.main()


@pytest.fixture(scope="session")
def start():
    """`start(said, "train", ...)`: `fastsd train ...` in a process of its own, what it says appended to the file `said`.

    It is forked, where a system can, from one that has imported what commands import: that takes longer than to train here.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    own = ("fastsd.train.loop", "fastsd.commands", "fastsd.model.text")
    lazy = ("diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip")
    context.set_forkserver_preload(["conftest", *own, *lazy])

    def begin(said: Path, *words: str):
        process = context.Process(target=command_line, args=(list(words), said))
        process.start()
        return process

    return begin


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    write_images(folder, 21)
    return folder


def job(tmp_path: Path, model: Path, images: Path, stages: str, **top: str) -> Path:
    """Write a config for the tiny model into `tmp_path` and return its path."""
    lines = [f'run = "{tmp_path / "run"}"', *(f"{key} = {value}" for key, value in top.items())]
    text = (
        "\n".join(lines)
        + f"""
[model]
base = "{model}"
[data]
folders = ["{images}"]
resolution = 32
[cache]
dir = "{images.parent / "cache"}"
[sample]
prompts = ["red circle", "blue star"]
steps = 2
images = 1
[log]
every = 1
tensorboard = false
{stages}
"""
    )
    path = tmp_path / "job.toml"
    path.write_text(text)
    return path
