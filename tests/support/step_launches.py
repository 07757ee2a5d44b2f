"""The compiled kernels of whole jobs, compared with the atlas. A program, because tests define kernels for the interpreter.

    python step_launches.py 80 86 89 90 120

Jobs run on tensors without data: training steps of the SD1.5 UNet in each precision with each kind of recomputation, those of a
small UNet with each optimizer and all its options, samples, and the encoding of images. A job runs once: its operators launch
their kernels for all targets. Prints, for each target as JSON: the number of kernels, those that only jobs have ("missing") and
those that only the atlas has ("superfluous").
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from unittest import mock

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch._library.custom_ops import OPDEFS

from fastsd.config.stages import StageTable
from fastsd.data.loader import Batch
from fastsd.model.model import SD15_SCHEDULER, Model
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes, empty_model, materialize
from fastsd.model.unet import UNetConfig
from fastsd.model.vae_encoder import VaeEncoder
from fastsd.train.precision import COMPUTE_DTYPE, precision_switches
from fastsd.train.step import Step
from fastsd_kernels import RECORDS, TRITON
from fastsd_kernels.launch import ARCHITECTURES, Launch, _Recorder, meta, recording
from fastsd_kernels.sass import specialise

META = torch.device("meta")
PRECISIONS = ("fp32", "tf32", "bf16")
SMALL = UNetConfig(block_out_channels=(32,), attention=(False,), layers_per_block=1, heads=4, cross_attention_dim=96)
# Their launches are taken from the UNet of SD1.5 only.
MODEL_OPS = ("attention", "attention_backward", "group_norm", "group_norm_statistics", "layer_norm", "geglu")


class Launches(list[tuple[int | None, Launch]]):
    """Launches, each with its target. Those outside of operators do not depend on it and have None."""

    def __init__(self, targets: Sequence[int]) -> None:
        super().__init__()
        self.targets, self.target, self.calls = targets, None, set[object]()

    def append(self, launch: Launch) -> None:
        super().append((self.target, launch))

    def call(self, function: Callable[..., object], *arguments: object) -> object:
        """Call an operator's function for each target, and only for one if it was called in the same way before."""
        if self.target:  # within another operator
            return function(*arguments)
        call = function, *map(_described, arguments)
        for target in self.targets[: 1 if call in self.calls else None]:
            self.target = _Recorder.target = target
            result = function(*arguments)
        self.target, _Recorder.target = None, self.targets[0]
        self.calls.add(call)
        return result


def _described(value: object) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16
    return tuple(map(_described, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def launch_on_meta_tensors() -> None:
    """Let operators launch their kernels on meta tensors. PyTorch would run their fakes, which only make the outputs."""
    for name, op in OPDEFS.items():
        if name.startswith("fastsd::"):
            op._abstract_fn = lambda *arguments, function=op._init_fn: _Recorder.launches.call(function, *arguments)


def model_of(cfg: UNetConfig) -> Model:
    text = SD15_TEXT | {"num_hidden_layers": 1, "hidden_size": cfg.cross_attention_dim}
    return empty_model(Shapes(cfg, text, SD15_VAE | {"layers_per_block": 1}), TRITON)


def attention_precision(precision: str) -> str:
    """Return the precision of attention in a stage of this precision. If it depended on the GPU, jobs would run for each."""
    chosen: list[str] = []
    weight = SimpleNamespace(device=torch.device("cuda"))
    unet = SimpleNamespace(conv_in=SimpleNamespace(weight=weight), set_attention_precision=chosen.append)
    for target in ARCHITECTURES:
        with (
            mock.patch("torch.cuda.get_device_capability", return_value=divmod(target, 10)),
            precision_switches(precision, unet),
        ):
            assert chosen[0] == chosen[-1]
    return chosen[0]


def train(model: Model, batch: int, prediction: str = "epsilon", **stage: object) -> None:
    """Run one training step."""
    unet = model.unet.float()
    materialize(unet, META)
    model.scheduler = SD15_SCHEDULER | {"prediction_type": prediction}
    table = StageTable(**{"train": ["unet"], "until": 1, "batch": batch, "lr": 1e-4, **stage})
    step = Step(model, table, total=1, seed=0, cached_text=True)
    unet.checkpointing = table.checkpointing
    unet.set_attention_precision(attention_precision(table.precision))
    latents, texts = meta(batch, 4, 64, 64, dtype=torch.float16), meta(batch, 77, unet.cfg.cross_attention_dim)
    positions = meta(batch, dtype=torch.int64)
    step(Batch(latents, meta(batch, 77, dtype=torch.int64), positions, [], texts), 0)


def sample(model: Model, precision: str, attention: str) -> None:
    """Run the UNet once without gradients, as a sampler does."""
    unet = model.unet.requires_grad_(False).to(COMPUTE_DTYPE[precision])
    unet.set_attention_precision(attention)
    unet(meta(8, 4, 64, 64), meta(8), meta(8, 77, 768))


@torch.no_grad()
def encode(vae: AutoencoderKL, precision: str) -> None:
    """Encode images as `fastsd cache` does."""
    dtype = COMPUTE_DTYPE[precision]
    images = meta(4, 3, 512, 512, dtype=dtype).to(memory_format=torch.channels_last)
    VaeEncoder(vae.to(dtype, memory_format=torch.channels_last), TRITON)(images)


def unet_jobs(model: Model) -> Iterator[None]:
    """Run jobs of the UNet of SD1.5: steps with one forward, steps that accumulate two, and samples."""
    optimizers, kinds = itertools.cycle(("lion", "dlion", "adamw")), itertools.cycle(("none", "block", "ff"))
    for precision in PRECISIONS:
        for batch, micro_batch in ((64, 64), (2, 1)):
            options = {"precision": precision, "micro_batch": micro_batch, "optimizer": next(optimizers)}
            yield train(model, batch, checkpointing=next(kinds), **options)
        yield sample(model, precision, attention_precision(precision))
    yield sample(model, "fp32", "ieee")  # a model without a precision


def update_jobs(model: Model) -> Iterator[None]:
    """Run the updates of each optimizer with all options, and the kinds of noise."""
    modes = {"batch": 2, "micro_batch": 2}, {"batch": 2, "micro_batch": 1}, {"batch": 2, "fused_backward": True}
    two, four = ({"sigma_rel": [0.05, 0.1, 0.15, 0.2][:count]} for count in (2, 4))
    averages = (0.0, 0.0), (0.0, 1.0), (0.9, 0.0), (0.9, 1.0), (two, 0.0), (four, 1.0)  # ema, and the norm to which is clipped
    optimizers = ("lion", "dlion", "adamw")
    for optimizer, precision, mode, (ema, clip) in itertools.product(optimizers, ("fp32", "bf16"), modes, averages):
        if not (clip and "fused_backward" in mode):
            yield train(model, train=["unet.out"], optimizer=optimizer, precision=precision, ema=ema, grad_clip=clip, **mode)
    for prediction in ("v_prediction", "flow_prediction"):
        yield train(model, 3, prediction)
    yield train(model, 3, noise_offset=0.1, pyramid_noise=0.3, input_perturbation=0.1, immiscible=2)


def encoder_jobs() -> Iterator[None]:
    vae = AutoencoderKL.from_config(SD15_VAE).to("meta")
    for precision in ("fp32", "bf16"):
        yield encode(vae, precision)


def record(jobs: Iterable[object], *targets: int, left_out: tuple[str, ...] = ()) -> dict[int, list[Launch]]:
    """Return the distinct launches of jobs for each target, without those of the ops `left_out`."""
    distinct = {}
    with recording(targets[0]):
        _Recorder.launches = launches = Launches(targets)
        for _ in jobs:
            for target, launch in launches:
                values = [(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else (type(x), x) for x in launch.arguments]
                key = target, launch.kernel, *values, *launch.options.items()
                if key not in distinct and module(launch) not in left_out:
                    # Tensors become new ones: a job's parameters may have other dtypes in the next.
                    arguments = tuple(_like(x) if isinstance(x, Tensor) else x for x in launch.arguments)
                    distinct[key] = target, launch._replace(arguments=arguments)
            launches.clear()
    return {target: [launch for only, launch in distinct.values() if only in (None, target)] for target in targets}


def _like(x: Tensor) -> Tensor:
    """Return a small tensor without data of the same dtype and alignment."""
    return meta(16, dtype=x.dtype)[x.data_ptr() % 16 // x.itemsize :]


def module(launch: Launch) -> str:
    return launch.kernel.fn.__module__.rpartition(".")[2]


def keys(launches: Iterable[Launch], target: int) -> dict[str, str]:
    """Return the keys of the compiled kernels, each with the kernel's name."""
    return {specialise(launch, target).key: f"{module(launch)} {launch.kernel.__name__}" for launch in launches}


def main() -> None:
    launch_on_meta_tensors()
    targets = list(map(int, sys.argv[1:]))
    whole, report = record(unet_jobs(model_of(UNetConfig.sd15())), *targets), {}
    # These launches do not depend on the target.
    with mock.patch.object(Tensor, "cpu", lambda x: x):  # of frozen weights, which have no data to copy
        others = record(update_jobs(model_of(SMALL)), 89, left_out=MODEL_OPS)[89]
    others += record(encoder_jobs(), 89)[89]
    for target in targets:
        jobs = keys(whole[target] + others, target)
        atlas = keys(record((kind for op in RECORDS for kind in op.calls()), target)[target], target)
        missing, superfluous = ({k: a[k] for k in a.keys() - b.keys()} for a, b in ((jobs, atlas), (atlas, jobs)))
        report[target] = {"kernels": len(jobs), "missing": missing, "superfluous": superfluous}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
