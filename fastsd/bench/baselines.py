"""Who is compared by `fastsd bench`: the real step and diffusers' UNet as its users train it; optimizers; what they are given.

    fastsd          `Step`, as `fastsd train` calls it
    diffusers       UNet2DConditionModel, eager; bf16 by autocast over fp32 weights; SDPA; torch.optim.AdamW as it comes
    compiled        the same channels last, torch.compile, AdamW(fused=True)
    dadaptation     as diffusers, with D-Lion: DAdaptLion
    lion-pytorch    as diffusers, with its Lion

The work is the same for all: starting weights, batches, text states, timesteps, loss, micro-batches, clipping. How it is done
is each one's own: ours draws noise from a counter-based generator and looks for gradients that are not finite, peers call
torch.randn and DDPMScheduler.add_noise and do not look. Text states are given, computed before the clock starts: 0.5 %
of a step that nobody spends here. PyTorch's switches follow the precision for all in what is computed (fp32, tf32); in how,
ours are those of a run, the peers' PyTorch's defaults, and the compiled one lets cuDNN time its algorithms.

Memory, without any swapping. The eager peers share one model, which they step in turn, and each has its own optimizer state;
so the second's first loss is that of weights that the first has stepped.
Peers' gradients are freed by `zero_grad`, as is usual, so they weigh only within a step. On a CPU our gradients' arena is
handed back between our turns, too, and is there again before the clock starts.

Shapes: B images, C channels, H x W latent positions, L tokens, D context width, N kinds of text states.
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

from fastsd.bench.counters import SLOTS
from fastsd.config.schema import Config, StageTable
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.loader import Batch, Loader
from fastsd.errors import UserError
from fastsd.model.model import SD15_SCHEDULER, Model
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.vae import SD15_SCALING_FACTOR
from fastsd.model.weights import diffusers_state_dict
from fastsd.train.step import OPTIMIZERS, Step
from fastsd.train.trainable import Layout
from fastsd_kernels import Ops
from fastsd_kernels.arena import split_master

T = TypeVar("T")
OURS = "fastsd"
PEERS = {
    "diffusers": "diffusers' UNet, eager, SDPA, torch.optim.AdamW",
    "compiled": "the same channels last, torch.compile, AdamW(fused=True)",
    "dadaptation": "as diffusers, with dadaptation's DAdaptLion",
    "lion-pytorch": "as diffusers, with lion-pytorch's Lion",
}
SAME_OPTIMIZER = {"dlion": "dadaptation", "lion": "lion-pytorch", "adamw": "diffusers"}
SMALL = UNetConfig(
    block_out_channels=(32, 64), attention=(True, False), layers_per_block=1, heads=2, cross_attention_dim=32, norm_groups=8,
    sample_size=8,
)  # fmt: skip
BATCHES = 3  # different ones, used in turn


class States:
    """Stands in for a text encoder whose states are known: a token id is the number of a kind of text."""

    def __init__(self, states_NLD: Tensor) -> None:
        self._shape = states_NLD.shape[1:]
        self.module = nn.Embedding.from_pretrained(states_NLD.flatten(1))

    def encode(self, ids_B1: Tensor) -> Tensor:
        """-> (B, L, D)"""
        return self.module(ids_B1[:, 0]).unflatten(1, self._shape)

    def used_parameters(self) -> set[str]:
        return set()


class Latents:
    """Stands in for a VAE: what the step needs of it is its factor."""

    def scale(self, raw_BCHW: Tensor) -> Tensor:
        return raw_BCHW * SD15_SCALING_FACTOR


@dataclass
class Work:
    """What every contender is given. `model` is on its device and its text encoder is a `States`."""

    model: Model
    stage: StageTable
    batches: list[Batch]
    device: torch.device
    seed: int = 0
    graph: bool = False

    def batch(self, step: int) -> Batch:
        return self.batches[step % len(self.batches)]


def made_model(cfg: UNetConfig, ops: Ops) -> Model:
    """Random weights of a shape, and nothing to load."""
    torch.manual_seed(0)
    return Model("random weights", UNet(cfg, ops), made_states(cfg, 77), cast(Any, Latents()), SD15_SCHEDULER)


def made_states(cfg: UNetConfig, length: int) -> Any:
    return States(torch.randn(BATCHES, length, cfg.cross_attention_dim, generator=torch.Generator().manual_seed(1)))


def made_batches(channels: int, side: int, batch: int) -> list[Batch]:
    """Normal latents, as raw as a cache holds them: fp16 (B, C, side, side), and the numbers of `made_states`."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for i in range(BATCHES):
        latents = (torch.randn(batch, channels, side, side, generator=generator) / SD15_SCALING_FACTOR).half()
        positions_B = torch.arange(i * batch, (i + 1) * batch)
        batches.append(_pinned(latents, positions_B % BATCHES, positions_B))
    return batches


def cached_batches(config: Config, model: Model, device: torch.device) -> list[Batch]:
    """The first batches of the first stage, from the config's cache; the model's text encoder becomes their `States`.

    Raises:
        UserError: there is no cache of this config, or it is damaged.
    """
    stage = config.stage[0]
    with closing(LatentCache.open(config.cache.dir, view_name(config, model.vae.hash))) as cache:
        loader = Loader(cache, model.text.tokenize, config.seed, stage, data=config.data)
        batches = [loader.batch(i * stage.batch, stage.batch) for i in range(BATCHES)]
    model.text.module.to(device)
    with torch.no_grad():
        states = [model.text.encode(batch.token_ids_BL.to(device)) for batch in batches]
    model.text = cast(Any, States(torch.cat(states)))
    return [_pinned(batch.latents_BCHW, batch.positions_B, batch.positions_B) for batch in batches]


def _pinned(latents_BCHW: Tensor, numbers_B: Tensor, positions_B: Tensor) -> Batch:
    """A batch as the loader hands it over."""
    tensors = latents_BCHW, numbers_B[:, None], positions_B
    if torch.cuda.is_available():
        tensors = tuple(tensor.pin_memory() for tensor in tensors)  # type: ignore[assignment]
    return Batch(*tensors, captions=[""] * len(latents_BCHW))


class Ours:
    """The real step."""

    name = OURS

    def __init__(self, work: Work, warn: Callable[[str], None] = print) -> None:
        self.work, self.done = work, 0
        self.trainer = Step(work.model, work.stage, 1 << 30, work.seed, graph=work.graph, warn=warn)
        # Only the arena alone moves: a CUDA graph knows its address.
        self._parked = self.trainer.owners()["gradients"] if work.device.type == "cpu" else []

    def step(self) -> Tensor:
        """One whole step; its loss, 0-dim on the device."""
        loss = self.trainer(self.work.batch(self.done), self.done).loss
        self.done += 1
        return loss

    def on_host(self) -> list[Tensor]:
        """Tensors that lie in main memory on any machine."""
        return []

    def held(self) -> int:
        """Bytes between two steps, the gradients' arena included."""
        return sum(tensor.nbytes for tensors in self.trainer.owners().values() for tensor in tensors)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What must hold while it steps. The first turn finds the arena as it was made."""
        for tensor in self._parked:
            tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)
            tensor.zero_()
        yield
        for tensor in self._parked:
            tensor.untyped_storage().resize_(0)


class Peer:
    """diffusers' UNet, stepped as its training examples do."""

    def __init__(self, name: str, unet: Any, optimizer: torch.optim.Optimizer, work: Work) -> None:
        from diffusers import DDPMScheduler

        self.name, self.unet, self.optimizer, self.work, self.done = name, unet, optimizer, work, 0
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.scheduler = DDPMScheduler.from_config(work.model.scheduler)
        self.compiled = name == "compiled"
        self.layout = torch.channels_last if self.compiled else torch.contiguous_format

    def step(self) -> Tensor:
        """One whole step; its loss, 0-dim on the device."""
        work = self.work
        batch = work.batch(self.done)
        count, device = len(batch.positions_B), work.device
        total = torch.zeros((), device=device)
        inputs = batch.latents_BCHW, batch.token_ids_BL, batch.positions_B
        raw, ids, positions = (tensor.to(device, non_blocking=True) for tensor in inputs)
        for start in range(0, count, work.stage.micro):
            rows = slice(start, start + work.stage.micro)
            latents = work.model.vae.scale(raw[rows].float())
            noise, t_B = draw(latents, positions[rows], self.scheduler.config.num_train_timesteps)
            noisy = self.scheduler.add_noise(latents, noise, t_B).contiguous(memory_format=self.layout)
            states = work.model.text.encode(ids[rows])
            with torch.autocast(device.type, torch.bfloat16, enabled=work.stage.precision == "bf16"):
                prediction = self.unet(noisy, t_B, states.float()).sample
            loss = nn.functional.mse_loss(prediction.float(), noise) * (len(latents) / count)
            loss.backward()
            total += loss.detach()
        if work.stage.grad_clip:
            nn.utils.clip_grad_norm_(self.parameters, work.stage.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return total

    def on_host(self) -> list[Tensor]:
        """Tensors that lie in main memory on any machine."""
        return step_counts(self.optimizer)

    def held(self) -> int:
        """Bytes between two steps; a shared model counts as its own."""
        own = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in (*self.parameters, *own))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """PyTorch's own defaults in place of ours, where they decide how and not what is computed."""
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.deterministic, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction
        cudnn.deterministic, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction = False, self.compiled, True
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction = before


Contender = Ours | Peer


def draw(latents_BCHW: Tensor, positions_B: Tensor, timesteps: int) -> tuple[Tensor, Tensor]:
    """(noise, t int64 (B,)) as diffusers' examples draw them; the positions are for those who draw by them."""
    t_B = torch.randint(0, timesteps, (len(latents_BCHW),), device=latents_BCHW.device)
    return torch.randn_like(latents_BCHW), t_B


def require(name: str) -> bool:
    """True; or raises UserError, with the command that mends it, if a peer's package is missing."""
    package = {"dadaptation": "dadaptation", "lion-pytorch": "lion_pytorch"}.get(name, "diffusers")
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(f"peer {name} is not installed; pip install {package.replace('_', '-')}") from None
    return True


def peer_optimizer(name: str, parameters: Sequence[Tensor], lr: float = 1e-6) -> torch.optim.Optimizer:
    """The optimizer of a peer; a small lr keeps random weights sound. Raises UserError if it is not installed."""
    require(name)
    if name == "dadaptation":
        return importlib.import_module("dadaptation").DAdaptLion(parameters)
    if name == "lion-pytorch":
        return importlib.import_module("lion_pytorch").Lion(parameters, lr=lr)
    fused, foreach = name in ("compiled", "torch fused"), name == "torch foreach"
    return torch.optim.AdamW(parameters, lr=lr, fused=fused or None, foreach=foreach or None)


def step_counts(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The counts of steps that torch.optim keeps in main memory, a tensor for each parameter."""
    return [state["step"] for state in optimizer.state.values() if isinstance(state.get("step"), Tensor)]


def diffusers_unet(unet: UNet, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    """diffusers' module of the same shape with the same weights, fp32, in training mode."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        peer = UNet2DConditionModel.from_config(unet.cfg.to_diffusers())
    peer = peer.to_empty(device=device).to(memory_format=memory_format)
    peer.load_state_dict(diffusers_state_dict(unet))
    return peer.train()


def peer_maker(work: Work) -> Callable[[str], Peer]:
    """A function that makes peers by name, to be made before the first of any steps. The eager ones share one model.

    Raises (that function): UserError if a peer's package is missing.
    """
    eager: list[Any] = []

    def make(name: str) -> Peer:
        require(name)
        if name == "compiled":
            unet = diffusers_unet(work.model.unet, work.device, torch.channels_last)
        else:
            unet = eager[0] if eager else diffusers_unet(work.model.unet, work.device)
            eager[:] = [unet]
        if work.stage.checkpointing == "block":
            unet.enable_gradient_checkpointing()
        optimizer = peer_optimizer(name, list(unet.parameters()))
        return Peer(name, torch.compile(unet) if name == "compiled" else unet, optimizer, work)

    return make


def contenders(work: Work, names: list[str], misses: list[str]) -> list[Contender]:
    """Ours, and those of the named peers that can be made. Peers come first: ours may turn the weights to bf16."""
    make = peer_maker(work)
    peers = [attempt(name, misses, partial(make, name)) for name in names]
    ours = attempt(OURS, misses, lambda: Ours(work, misses.append))
    return [contender for contender in (ours, *peers) if contender]


def attempt(name: str, misses: list[str], do: Callable[[], T]) -> T | None:
    """What `do` returns, or None and a line why a peer is left out. Raises UserError if it is ours that does not fit."""
    try:
        return do()
    except (UserError, torch.OutOfMemoryError) as error:
        why = str(error).splitlines()[0]
        if name == OURS:
            raise UserError(f"bench: {why}; use a smaller --batch, or fewer --peers") from None
        misses.append(f"left out: {why}" if isinstance(error, UserError) else f"left out: peer {name}, out of memory ({why})")
    except Exception as error:
        if name != "compiled":  # whatever a compiler says against it, the others go on
            raise
        misses.append(f"left out: peer compiled, torch.compile failed ({str(error).strip().splitlines()[0][:160]})")
    return None


OPTIMIZER_PEERS = {"lion": ("lion-pytorch",), "dlion": ("dadaptation",), "adamw": ("torch foreach", "torch fused")}
# Bytes an optimizer must move for a parameter: weight in and out, gradient in, each state in and out.
MOVED = {"lion": 20, "dlion": 28, "adamw": 28}


def optimizer_bytes(family: str, halves: bool) -> int:
    """Bytes a parameter that `optimizer_steps` takes: weights and gradient, and the state of each that takes part."""
    return 8 + 4 * SLOTS[family] * (2 + len(OPTIMIZER_PEERS[family])) + (halves and 6 + 4 * SLOTS[family])


def even_choice(sizes: list[int], fraction: float) -> list[int]:
    """That share of the tensors, taken evenly from the smallest to the largest; the largest at least."""
    ordered = sorted(sizes, reverse=True)
    return [size for i, size in enumerate(ordered) if i == 0 or int((i + 1) * fraction) > int(i * fraction)]


class Arenas(NamedTuple):
    """Weights and their gradients, flat, and where each tensor lies in them."""

    layout: Layout
    weights: Tensor
    gradient: Tensor


def made_arenas(sizes: list[int], device: torch.device) -> Arenas:
    layout = Layout([torch.empty(size, device="meta") for size in sizes])
    flats = [torch.zeros(layout.size, device=device) for _ in range(2)]
    for flat, scale in zip(flats, (2e-2, 1e-4), strict=True):
        for view in layout.views(flat):  # not the gaps, which are zero
            view.normal_(std=scale)
    return Arenas(layout, *flats)


class OptimizerStep(NamedTuple):
    """`run` is one step, `moved` the bytes it must move, `on_host` what of it lies in main memory on any machine."""

    run: Callable[[], object]
    moved: int
    on_host: Callable[[], list[Tensor]] = list


def optimizer_steps(family: str, arenas: Arenas, ops: Ops, halves: bool, misses: list[str]) -> dict[str, OptimizerStep]:
    """Ours over an arena, as `Step` calls it, and over a list of parameters; the peers over that list.

    All step the same weights with the same gradients in turn; the tensors of the list are views of the arena, each on a
    256-byte boundary. halves: a copy of the arena, too, as bf16 with its 16-bit low halves and bf16 gradients.
    """
    layout, weights, gradient = arenas
    listed = [nn.Parameter(view) for view in layout.views(weights)]
    for parameter, view in zip(listed, layout.views(gradient), strict=True):
        parameter.grad = view
    make = partial(cast(Any, OPTIMIZERS[family]), lr=1.0 if family == "dlion" else 1e-6, ops=ops)
    skip = torch.zeros((), dtype=torch.bool, device=weights.device)

    def arena(weights: Tensor, gradient: Tensor, lows: list[Tensor]) -> Callable[[], None]:
        optimizer = make([{"params": [weights], "lows": lows, "emas": []}])

        def step() -> None:
            optimizer.update(gradient, skip=skip)
            optimizer.finish(skip=skip)

        return step

    numbers = sum(parameter.numel() for parameter in listed)
    moved = MOVED[family] * numbers
    found = {OURS: OptimizerStep(arena(weights, gradient, []), moved)}
    if halves:
        high, low = split_master(weights)
        found[f"{OURS}, bf16"] = OptimizerStep(arena(high, gradient.bfloat16(), [low]), moved - 2 * numbers)
    found[f"{OURS}, a list"] = OptimizerStep(make(listed).step, moved)
    for name in OPTIMIZER_PEERS[family]:
        peer = attempt(name, misses, partial(peer_optimizer, name, listed))
        if peer:
            found[name] = OptimizerStep(peer.step, moved, partial(step_counts, peer))
    return found
