"""Candidates of `fastsd bench`: the real step, baselines (diffusers' UNet as its users train it), optimizers, and their inputs.

    fastsd          `Step`, as `fastsd train` calls it
    diffusers       UNet2DConditionModel, eager; bf16 by autocast over fp32 weights; SDPA; torch.optim.AdamW with its defaults
    compiled        the same with channels last, torch.compile and AdamW(fused=True)
    dadaptation     as diffusers, with D-Lion: DAdaptLion
    lion-pytorch    as diffusers, with its Lion

All candidates do the same work: starting weights, batches, text embeddings, timesteps, loss, micro-batches and clipping. Their
methods differ. Ours draws noise from a counter-based generator and checks gradients for values that are not finite; baselines
call torch.randn and DDPMScheduler.add_noise and do not check. Text embeddings are computed before the clock starts, which saves
every candidate 0.5 % of a step. PyTorch's switches for what is computed (fp32, tf32) follow the precision for all candidates.
For how it is computed, our step uses the switches of a run, and baselines use PyTorch's defaults; `compiled` also lets cuDNN
time its algorithms.

No memory is swapped out. The eager baselines share one model, which they step in turn, each with its own optimizer state. So
the first loss of the second baseline comes from weights that the first has already stepped. Baselines free their gradients with
`zero_grad`, as is usual, so gradients take memory only within a step. On a CPU our gradient arena is also released between our
turns, and allocated again before the clock starts.

Shapes: B images, C channels, H x W latent positions, L tokens, D width of the text embeddings, N different texts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fastsd.config.optimizers import OPTIMIZERS, ORIGINALS, OptimizerName
from fastsd.config.schema import Config, StageTable
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.loader import Batch, Loader
from fastsd.data.rows import can_pin
from fastsd.errors import UserError, out_of_memory
from fastsd.model.flow_schedule import is_flow, timesteps_of
from fastsd.model.latent_space import SD15_SCALING_FACTOR
from fastsd.model.model import SD15_SCHEDULER, Model
from fastsd.model.text_encoder import pad
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.weights import diffusers_state_dict
from fastsd.train.optim import optimizer_class
from fastsd.train.step import Step
from fastsd.train.trainable import Layout
from fastsd_kernels import RECORDS, Ops
from fastsd_kernels.arena import split_master

T = TypeVar("T")
OURS = "fastsd"
BASELINES = {
    "diffusers": "diffusers' UNet, eager, SDPA, torch.optim.AdamW",
    "compiled": "the same channels last, torch.compile, AdamW(fused=True)",
    **{spec.package: f"as diffusers, with {spec.package}'s {spec.class_name}" for spec in OPTIMIZERS.values() if spec.original},
}
SMALL = UNetConfig(
    block_out_channels=(32, 64),
    attention=(True, False),
    layers_per_block=1,
    heads=2,
    cross_attention_dim=32,
    norm_groups=8,
    sample_size=8,
)
BATCHES = 3  # different batches, used in turn


class FixedTextEmbeddings:
    """Replaces a text encoder by precomputed text embeddings. A token id is the index of a text."""

    def __init__(self, text_embeds_NLD: Tensor) -> None:
        self._shape = text_embeds_NLD.shape[1:]
        self.module = nn.Embedding.from_pretrained(text_embeds_NLD.flatten(1))

    def encode(self, ids_B1: Tensor) -> Tensor:
        """Look up the text embeddings of texts, (B, L, D)."""
        return self.module(ids_B1[:, 0]).unflatten(1, self._shape)

    def used_parameters(self) -> set[str]:
        return set()


class FixedLatentScale:
    """Replaces a VAE. The step needs only its scaling factor."""

    def scale(self, raw_BCHW: Tensor) -> Tensor:
        return raw_BCHW * SD15_SCALING_FACTOR


@dataclass
class BenchInputs:
    """Inputs of every candidate. `model` is on `device`, and its text encoder is a `FixedTextEmbeddings`."""

    model: Model
    stage: StageTable
    batches: list[Batch]
    device: torch.device
    seed: int = 0
    graph: bool = False

    def batch(self, step: int) -> Batch:
        return self.batches[step % len(self.batches)]


def random_model(cfg: UNetConfig, ops: Ops) -> Model:
    """Create a model of a given shape with random weights, without loading files."""
    torch.manual_seed(0)
    text_encoder, vae = random_text_embeddings(cfg, 77), cast(Any, FixedLatentScale())
    return Model("random weights", UNet(cfg, ops), text_encoder, vae, SD15_SCHEDULER)


def random_text_embeddings(cfg: UNetConfig, length: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    return FixedTextEmbeddings(torch.randn(BATCHES, length, cfg.cross_attention_dim, generator=generator))


def random_batches(channels: int, side: int, batch: int) -> list[Batch]:
    """Create batches of normally distributed latents, unscaled as in a cache, fp16 (B, C, side, side), and text indices."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for i in range(BATCHES):
        latents = (torch.randn(batch, channels, side, side, generator=generator) / SD15_SCALING_FACTOR).half()
        positions_B = torch.arange(i * batch, (i + 1) * batch)
        batches.append(_pinned_batch(latents, positions_B % BATCHES, positions_B))
    return batches


def cached_batches(config: Config, model: Model, device: torch.device) -> list[Batch]:
    """Read the first batches of the first stage from the config's cache; `FixedTextEmbeddings` replace the text encoder.

    Raises:
        UserError: the config has no cache, or the cache is damaged.
    """
    stage = config.stage[0]
    with closing(LatentCache.open(config.cache.dir, view_name(config, model.vae.hash))) as cache:
        loader = Loader(cache, model.text.tokenize, config.seed, stage, data=config.data)
        batches = [loader.batch(i * stage.batch, stage.batch) for i in range(BATCHES)]
    model.text.module.to(device)
    with torch.no_grad():
        text_embeds = [row for batch in batches for row in model.text.encode(batch.token_ids_BL.to(device))]
    model.text = cast(Any, FixedTextEmbeddings(pad(text_embeds)))
    return [_pinned_batch(batch.latents_BCHW, batch.positions_B, batch.positions_B) for batch in batches]


def _pinned_batch(latents_BCHW: Tensor, text_indices_B: Tensor, positions_B: Tensor) -> Batch:
    """Create a batch as the loader does, in pinned memory for a GPU."""
    tensors = latents_BCHW, text_indices_B[:, None], positions_B
    if can_pin():
        tensors = tuple(tensor.pin_memory() for tensor in tensors)  # type: ignore[assignment]
    return Batch(*tensors, captions=[""] * len(latents_BCHW))


class OurStep:
    """Our candidate: the real step."""

    name = OURS

    def __init__(self, inputs: BenchInputs, warn: Callable[[str], None] | None = None) -> None:
        self.inputs, self.steps_done = inputs, 0
        self.warnings: list[str] = []  # of the step, unless there is another `warn`
        warn = warn or self.warnings.append
        self.trainer = Step(inputs.model, inputs.stage, 1 << 30, inputs.seed, graph=inputs.graph, warn=warn)
        # The arena is released between turns on a CPU only: a CUDA graph has recorded its address.
        self._released = self.trainer.tensors_by_role()["gradients"] if inputs.device.type == "cpu" else []

    def step(self) -> Tensor:
        """Run one whole step and return its loss, 0-dim on the device."""
        loss = self.trainer(self.inputs.batch(self.steps_done), self.steps_done).loss
        self.steps_done += 1
        return loss

    def on_host(self) -> list[Tensor]:
        """Return the tensors that are in main memory on every machine."""
        return []

    def held(self) -> int:
        """Return the bytes held between two steps, including the gradient arena."""
        return sum(tensor.nbytes for tensors in self.trainer.tensors_by_role().values() for tensor in tensors)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """On a CPU, allocate the gradient arena for one turn. At the first turn, it is still allocated."""
        for tensor in self._released:
            tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)
            tensor.zero_()
        yield
        for tensor in self._released:
            tensor.untyped_storage().resize_(0)


class Baseline:
    """A baseline: diffusers' UNet, stepped as in its training examples."""

    def __init__(self, name: str, unet: Any, optimizer: torch.optim.Optimizer, inputs: BenchInputs) -> None:
        from diffusers import DDPMScheduler

        self.name, self.unet, self.optimizer = name, unet, optimizer
        self.inputs, self.steps_done, self.warnings = inputs, 0, list[str]()
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.flow, self.timesteps = is_flow(inputs.model.scheduler), timesteps_of(inputs.model.scheduler)
        self.scheduler = None if self.flow else DDPMScheduler.from_config(inputs.model.scheduler)
        self.compiled = name == "compiled"
        self.layout = torch.channels_last if self.compiled else torch.contiguous_format

    def step(self) -> Tensor:
        """Run one whole step and return its loss, 0-dim on the device."""
        inputs = self.inputs
        batch = inputs.batch(self.steps_done)
        count, device = len(batch.positions_B), inputs.device
        total_loss = torch.zeros((), device=device)
        host_tensors = batch.latents_BCHW, batch.token_ids_BL, batch.positions_B
        raw_latents, token_ids, positions = (tensor.to(device, non_blocking=True) for tensor in host_tensors)

        for start in range(0, count, inputs.stage.micro_batch_size):
            micro_batch = slice(start, start + inputs.stage.micro_batch_size)
            latents = inputs.model.vae.scale(raw_latents[micro_batch].float())
            noise, t_B = draw(latents, positions[micro_batch], self.timesteps, continuous=self.flow)
            noisy, target = self._noised(latents, noise, t_B)
            text_embeds = inputs.model.text.encode(token_ids[micro_batch])
            with torch.autocast(device.type, torch.bfloat16, enabled=inputs.stage.precision == "bf16"):
                prediction = self.unet(noisy.contiguous(memory_format=self.layout), t_B, text_embeds.float()).sample
            loss = nn.functional.mse_loss(prediction.float(), target) * (len(latents) / count)
            loss.backward()
            total_loss += loss.detach()

        if inputs.stage.grad_clip:
            nn.utils.clip_grad_norm_(self.parameters, inputs.stage.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        return total_loss

    def _noised(self, latents: Tensor, noise: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the UNet's input and the target, as diffusers' examples compute them."""
        if self.scheduler is None:
            s = (t_B / self.timesteps)[:, None, None, None]
            return (1 - s) * latents + s * noise, noise - latents
        noisy, predicts_v = self.scheduler.add_noise(latents, noise, t_B), self.scheduler.config.prediction_type != "epsilon"
        return noisy, self.scheduler.get_velocity(latents, noise, t_B) if predicts_v else noise

    def on_host(self) -> list[Tensor]:
        """Return the tensors that are in main memory on every machine."""
        return step_counts(self.optimizer)

    def held(self) -> int:
        """Return the bytes held between two steps. A shared model counts for every baseline that uses it."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in (*self.parameters, *states))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Use PyTorch's defaults instead of our settings for switches that change how a result is computed, not what."""
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        previous = cudnn.deterministic, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction
        cudnn.deterministic, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction = False, self.compiled, True
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction = previous


Candidate = OurStep | Baseline


def draw(latents_BCHW: Tensor, positions_B: Tensor, timesteps: int, *, continuous: bool) -> tuple[Tensor, Tensor]:
    """Draw noise and timesteps (B,), int64 or `continuous`, as diffusers' examples do. Replacements may need `positions_B`."""
    size, device = (len(latents_BCHW),), latents_BCHW.device
    t_B = timesteps * torch.rand(size, device=device) if continuous else torch.randint(0, timesteps, size, device=device)
    return torch.randn_like(latents_BCHW), t_B


def require(name: str) -> bool:
    """Return True if a baseline's package is installed. Otherwise raise UserError with the command that installs it."""
    package = name if name in ORIGINALS else "diffusers"
    try:
        importlib.import_module(package.replace("-", "_"))
    except ImportError:
        raise UserError("bench-package-missing", f"baseline {name} is not installed; run `pip install {package}`") from None
    return True


def baseline_optimizer(name: str, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Create a baseline's optimizer. A small lr keeps random weights stable. Raises UserError if its package is missing."""
    require(name)
    if name in ORIGINALS:
        spec = OPTIMIZERS[ORIGINALS[name]]
        implementation = getattr(importlib.import_module(name.replace("-", "_")), spec.class_name)
        return implementation(parameters, lr=spec.small_lr)
    fused, foreach = name in ("compiled", "torch fused"), name == "torch foreach"
    return torch.optim.AdamW(parameters, lr=OPTIMIZERS["adamw"].small_lr, fused=fused or None, foreach=foreach or None)


def step_counts(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the step counters that torch.optim stores in main memory, one tensor per parameter."""
    return [state["step"] for state in optimizer.state.values() if isinstance(state.get("step"), Tensor)]


def diffusers_unet(unet: UNet, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    """Create diffusers' UNet with the same shape and weights, in fp32 and training mode."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        baseline = UNet2DConditionModel.from_config(unet.cfg.to_diffusers())
    baseline = baseline.to_empty(device=device).to(memory_format=memory_format)
    baseline.load_state_dict(diffusers_state_dict(unet))
    return baseline.train()


def baseline_maker(inputs: BenchInputs) -> Callable[[str], Baseline]:
    """Return a function that creates a baseline by name.

    Create all baselines before the first step, because the eager ones share a model. The function raises UserError if a
    baseline's package is missing.
    """
    shared_unet: list[Any] = []

    def make(name: str) -> Baseline:
        require(name)
        if name == "compiled":
            unet = diffusers_unet(inputs.model.unet, inputs.device, torch.channels_last)
        else:
            unet = shared_unet[0] if shared_unet else diffusers_unet(inputs.model.unet, inputs.device)
            shared_unet[:] = [unet]
        if inputs.stage.checkpointing == "block":
            unet.enable_gradient_checkpointing()
        optimizer = baseline_optimizer(name, list(unet.parameters()))
        return Baseline(name, torch.compile(unet) if name == "compiled" else unet, optimizer, inputs)

    return make


def candidates(inputs: BenchInputs, names: list[str]) -> tuple[list[Candidate], list[str]]:
    """Create our candidate and the named baselines. Return them, and the reasons why others are skipped.

    Baselines are created first, because ours may convert weights to bf16.
    """
    make = baseline_maker(inputs)
    baselines = [attempt(name, partial(make, name)) for name in names]
    attempts: list[tuple[Candidate | None, list[str]]] = [attempt(OURS, lambda: OurStep(inputs)), *baselines]
    return [candidate for candidate, _ in attempts if candidate], [reason for _, reasons in attempts for reason in reasons]


def attempt(name: str, function: Callable[[], T]) -> tuple[T | None, list[str]]:
    """Call `function` and return its result. If a baseline fails, return None and the reason; if ours does, raise UserError."""
    try:
        return function(), []
    except Exception as error:
        memory, reason = out_of_memory(error), str(error).strip().splitlines()[0]
        if name == OURS:
            if memory is None and not (isinstance(error, UserError) and error.code == "out-of-memory"):
                raise
            problem = (memory or reason).partition("; ")[0]
            raise UserError("bench-step-failed", f"bench step: {problem}; use a smaller --batch or fewer --peers") from None
        if memory:
            reason = f"baseline {name}, out of memory ({memory})"
        elif name == "compiled" and not isinstance(error, UserError):  # any compiler error skips only this baseline
            reason = f"baseline compiled, torch.compile failed ({reason[:160]})"
        elif not isinstance(error, UserError):
            raise
        return None, [f"skipped: {reason}"]


def optimizer_baselines(family: OptimizerName) -> tuple[str, ...]:
    """Return the names of the implementations that `bench optim` compares our optimizer with."""
    return (OPTIMIZERS[family].package,) if OPTIMIZERS[family].original else ("torch foreach", "torch fused")


def optimizer_bytes(family: OptimizerName, *, with_bf16: bool) -> int:
    """Return the bytes per parameter that `optimizer_steps` needs for weights, gradients and the state of every candidate."""
    state_bytes = 4 * len(optimizer_class(family).slots)
    return 8 + state_bytes * (2 + len(optimizer_baselines(family))) + (with_bf16 and 6 + state_bytes)


def spread_sizes(sizes: list[int], fraction: float) -> list[int]:
    """Return a fraction of the sizes, chosen evenly from the largest, which is included, to the smallest."""
    ordered = sorted(sizes, reverse=True)
    return [size for i, size in enumerate(ordered) if i == 0 or int((i + 1) * fraction) > int(i * fraction)]


class Arenas(NamedTuple):
    """Flat weights and gradients, and the location of each tensor in them."""

    layout: Layout
    weights: Tensor
    gradient: Tensor


def random_arenas(sizes: list[int], device: torch.device) -> Arenas:
    layout = Layout([torch.empty(size, device="meta") for size in sizes])
    tensors = [torch.zeros(layout.size, device=device) for _ in range(2)]
    for flat, scale in zip(tensors, (2e-2, 1e-4), strict=True):
        for view in layout.views(flat):  # the gaps between views stay zero
            view.normal_(std=scale)
    return Arenas(layout, *tensors)


class OptimizerStep(NamedTuple):
    """A step that `run` executes and that moves `num_bytes`. `on_host` returns its tensors that are always in main memory."""

    run: Callable[[], object]
    num_bytes: int
    on_host: Callable[[], list[Tensor]] = list


def optimizer_steps(
    family: OptimizerName, arenas: Arenas, ops: Ops, *, with_bf16: bool
) -> tuple[dict[str, OptimizerStep], list[str]]:
    """Create our step over an arena, as in `Step`, our step over a list of parameters, and the baselines' steps over that list.

    All of them update the same weights with the same gradients in turn. The tensors of the list are views of the arena, each on
    a 256-byte boundary. `with_bf16` adds our step over a bf16 copy of the arena with 16-bit low halves and bf16 gradients.
    """
    layout, weights, gradient = arenas
    parameters = [nn.Parameter(view) for view in layout.views(weights)]
    for parameter, view in zip(parameters, layout.views(gradient), strict=True):
        parameter.grad = view
    make_optimizer = partial(cast(Any, optimizer_class(family)), lr=OPTIMIZERS[family].small_lr, ops=ops)
    found_inf = torch.zeros((), dtype=torch.bool, device=weights.device)

    def arena_step(weights: Tensor, gradient: Tensor, masters_lo: list[Tensor]) -> Callable[[], None]:
        optimizer = make_optimizer([{"params": [weights], "masters_lo": masters_lo, "emas": []}])

        def step() -> None:
            optimizer.update(gradient, found_inf=found_inf)
            optimizer.finish(found_inf=found_inf)

        return step

    elements = sum(parameter.numel() for parameter in parameters)
    op_bytes = next(op.bytes for op in RECORDS if op.name == family)
    num_bytes = op_bytes(elements, 4)
    steps = {OURS: OptimizerStep(arena_step(weights, gradient, []), num_bytes)}
    if with_bf16:
        master_hi, master_lo = split_master(weights)
        run = arena_step(master_hi, gradient.bfloat16(), [master_lo])
        steps[f"{OURS}, bf16"] = OptimizerStep(run, op_bytes(elements, 2))
    steps[f"{OURS}, a list"] = OptimizerStep(make_optimizer(parameters).step, num_bytes)
    warnings = list[str]()
    for name in optimizer_baselines(family):
        baseline, reasons = attempt(name, partial(baseline_optimizer, name, parameters))
        warnings += reasons
        if baseline:
            steps[name] = OptimizerStep(baseline.step, num_bytes, partial(step_counts, baseline))
    return steps, warnings
