"""Programs that use Triton's compiler as on a GPU. Tests run them in processes of their own, without Triton's interpreter.

    python first_start.py      reads lines {"words": [PROGRAM, ARGUMENT, ...], "cache": DIR} and answers each with one line

The answer is {"result": ...}, or {"error": TRACEBACK}. Each program runs in a fork, because the imports take longer than most
programs. DIR becomes Triton's cache.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path

import torch
from tiny import tiny_vae
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastsd.commands import cache as cache_command
from fastsd.commands.cache import cache
from fastsd.config.schema import load_config
from fastsd.errors import UserError
from fastsd.model.vae import Vae
from fastsd.run import run, stage_kernels
from fastsd.run.compilation import compile_kernels, kernels_of, missing_kernels
from fastsd.run.launches import encoder_launches
from fastsd.run.log import Log
from fastsd.run.loop import train
from fastsd.terminal.console import Console
from fastsd_kernels import TRITON, attention, geglu
from fastsd_kernels.launch import Launch, _Recorder, launch, meta, recording


class Gpu:
    """A GPU for Triton's driver. Compiled kernels are loaded but not started."""

    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)

    def __init__(self, capability: int) -> None:
        self.capability, self.utils = capability, self

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, name, code, shared, device):
        return None, None, 0, 0, 1024


class Launches(list):
    """Recorded launches with the arguments as they are now. A parameter's dtype changes when its stage ends."""

    def append(self, recorded):
        arguments = [x.detach() if isinstance(x, Tensor) else x for x in recorded.arguments]
        super().append(recorded._replace(arguments=arguments))


@contextmanager
def kernels_not_started():
    """Use the TRITON table on CPU tensors. Its kernels are recorded and leave their results as they are in memory."""
    for module in (run, cache_command):
        module.choose_ops = lambda *_: TRITON
    Vae.encode_fp32 = Vae.encode  # a second attempt for such latents
    Log._check_skipped = lambda *_: None  # gradients are such results, too
    with recording(89):
        _Recorder.launches = launches = Launches()
        yield launches


def train_job(path: str) -> dict:
    """Train a job whose images are cached. Return the kernels that it launches, and those that each stage's start compiles."""
    compiled, out = [], StringIO()
    stage_kernels.compile_kernels = lambda kernels, *_: compiled.append(missing_kernels(kernels))
    cache(load_config(Path(path)), Console(file=StringIO()))
    with kernels_not_started() as launches:
        train(load_config(Path(path)), Console(file=out, width=200))
    return {"launched": missing_kernels(kernels_of(launches)), "compiled": compiled, "text": out.getvalue()}


def cache_job(path: str) -> dict:
    """Cache the images of a job. Return the kernels that this launches, and those that it compiles."""
    compiled = []
    cache_command.compile_kernels = lambda kernels, _: compiled.append(missing_kernels(kernels))
    with kernels_not_started() as launches, suppress(UserError):  # every latent may be rejected
        cache(load_config(Path(path)), Console(file=StringIO()))
    return {"launched": missing_kernels(kernels_of(launches)), "compiled": compiled}


def start(launches: Iterable[Launch]) -> list[str]:
    """Start launches as on a GPU. Return the names of the kernels that Triton compiles for this."""
    compiled = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or compiled.append(src.name)
        for kernel, grid, arguments, options in launches:
            launch(kernel, grid, *arguments, **options)
    return compiled


def record(*gates: tuple[int, int]) -> list[Launch]:
    """Record attention, the first norm of a VAE's encoder, and GEGLUs of (rows, offset in elements) in bf16."""
    launches = encoder_launches(dict(tiny_vae().config), 89, torch.bfloat16, [(16, 16)])[:2]
    q = meta(1, 16, 2, 8, dtype=torch.bfloat16)
    with recording(89) as others:
        attention.attention_forward(q, q, q, "ieee")
        for rows, offset in gates:
            geglu.geglu_forward(meta(rows * 256 + offset, dtype=torch.bfloat16)[offset:].view(rows, 256))
    return [*launches, *others]


def compile_twice() -> list[str]:
    """Compile kernels, compile them again, and compile one that is wrong. Return what is printed."""
    launches, texts = record((16, 0), (16, 4)), []
    wrong = launches[-1]._replace(options=launches[-1].options | {"ROWS": 3})
    for batch in (launches, launches, [wrong]):
        out = StringIO()
        compile_kernels(kernels_of(batch), Console(file=out, width=200))
        texts.append(out.getvalue())
    return texts


def start_compiled() -> list[list[str]]:
    """Start the kernels of `compile_twice` in another order, and then one with another number of rows."""
    launches = record((32, 8), (48, 4), (17, 0))
    return [start(reversed(launches[:-1])), start(launches[-1:])]


def answer(words: list[str], cache: str) -> dict:
    """Run a program in this process. Return its result, or the traceback of its error."""
    os.environ["TRITON_CACHE_DIR"] = cache
    driver.set_active(Gpu(89))
    try:
        return {"result": globals()[words[0]](*words[1:])}
    except BaseException:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            print(json.dumps(answer(**json.loads(line))), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
