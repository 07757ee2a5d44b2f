"""The step on a GPU: a CUDA graph gives the same bits as eager steps; a step never waits, and adapts to little memory.

Without a GPU, a stand-in shows what does not depend on arithmetic: values and addresses that a capture has fixed, and waits.
"""

from dataclasses import dataclass, field

import pytest
import torch
from sentences import says
from step_inputs import OPTIMIZERS, batches, stage_of
from tiny import ONE_LEVEL, make_tiny_model

from fastsd.model.unet import UNetConfig
from fastsd.train.device import choose_ops
from fastsd.train.gradient_sums import GradientSums
from fastsd.train.graph import WARM_UP
from fastsd.train.optim import DLion
from fastsd.train.precision import set_precision
from fastsd.train.ranks import ALONE, Ranks
from fastsd.train.step import Step

STEPS = WARM_UP + 2  # the capture comes with a replay, and another follows
CASES = {
    "fp32": {"precision": "fp32"},
    "tf32, accumulated": {"precision": "tf32", "micro_batch": 2},
    "bf16": {"precision": "bf16"},
    "bf16, accumulated and clipped": {"precision": "bf16", "micro_batch": 2, "grad_clip": 0.5, "ema": 0.9},
    "bf16, fused backward": {
        "precision": "bf16", "train": ["unet.mid"], "fused_backward": True, "ema": {"sigma_rel": [0.05, 0.1]},
    },
    "bf16, block": {"precision": "bf16", "checkpointing": "block"},
    "bf16, modified noise and loss": {
        "precision": "bf16", "immiscible": 3, "pyramid_noise": 0.3, "noise_offset": 0.1, "input_perturbation": 0.1,
        "loss": "huber", "weighting": "min_snr", "timesteps": "logit_normal",
    },
    "both components": {"precision": "bf16", "train": ["unet", "text_encoder"], "ema": {"sigma_rel": [0.1]}},
    "weights and masks": {"precision": "bf16", "weighted": True, "unmasked_weight": 0.1},
    "one group, EMA warm-up": {"precision": "bf16", "train": ["unet.cross_attention"], "ema": 0.9, "ema_power": 0.75},
}  # fmt: skip
PAIRS = [(name, case) for name in OPTIMIZERS for case in CASES]
# Without a GPU, each case with one optimizer.
SOME_PAIRS = [(list(OPTIMIZERS)[i % len(OPTIMIZERS)], case) for i, case in enumerate(CASES)]


def gpu_model(folder, kernels, precision):
    from fastsd.config.schema import ModelTable
    from fastsd.model.formats.load import load_model

    make_tiny_model(folder, UNetConfig(**ONE_LEVEL) if kernels == "reference" else None)
    device = torch.device("cuda")
    model = load_model(ModelTable(base=str(folder)), choose_ops(kernels, device))
    for module in (model.unet, model.text.module):
        module.to(device)
    set_precision(precision, model.unet)
    return model


def pinned_batches(sizes: list[int], weighted: bool = False):
    """Yield a batch for each size in pinned memory, like the loader. `weighted` adds image weights and masks."""
    for i, size in enumerate(sizes):
        batch = batches(1, size, seed=i)[0]
        tensors = batch.latents_BCHW, batch.token_ids_BL, batch.positions_B
        extra = {}
        if weighted:
            extra = {"weight_B": torch.rand(size), "mask_B1HW": torch.randint(256, (size, 1, 16, 16), dtype=torch.uint8)}
        yield type(batch)(*(tensor.pin_memory() for tensor in tensors), [], **extra)


def train(folder, kernels, graph, sizes, after_step=lambda step: None, weighted=False, ranks=ALONE, warn=print, **settings):
    model = gpu_model(folder, kernels, settings["precision"])
    model.unet.checkpointing = settings.get("checkpointing", "none")
    step = Step(model, stage_of(schedule="cosine", **settings), len(sizes), seed=0, graph=graph, ranks=ranks, warn=warn)
    losses = []
    for i, batch in enumerate(pinned_batches(sizes, weighted)):
        losses.append(step(batch, i).loss)
        after_step(step)
    tensors = [tensor.clone() for tensors in step.tensors_by_role().values() for tensor in tensors]
    return tensors, torch.stack(losses), step


def assert_graph_is_bit_equal(folder, kernels, sizes, **settings):
    eager, losses, _ = train(folder / "eager", kernels, False, sizes, **settings)
    replayed, same_losses, step = train(folder / "graph", kernels, True, sizes, **settings)
    assert len(step._graphs._captures) == len(set(sizes))
    assert torch.equal(losses, same_losses) and losses.unique().numel() == len(sizes)
    assert all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))
    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    "gpu_kernels, name, case",
    [*(("stand-in", *pair) for pair in SOME_PAIRS), *(pytest.param("gpu", *pair, marks=pytest.mark.gpu) for pair in PAIRS)],
    indirect=["gpu_kernels"],
)
def test_graph_is_bit_equal_to_eager_steps(name, case, gpu_kernels, tmp_path):
    assert_graph_is_bit_equal(tmp_path, gpu_kernels, [4] * STEPS, **OPTIMIZERS[name], **CASES[case])


def test_graph_reads_when_d_freezes(gpu_kernels, tmp_path):
    settings = {"precision": "fp32", "freeze_d_after": WARM_UP + 2, "growth_rate": 1.5, **OPTIMIZERS["dlion"]}
    assert_graph_is_bit_equal(tmp_path, gpu_kernels, [4] * (WARM_UP + 4), **settings)


def test_one_graph_per_batch_size(gpu_kernels, tmp_path):
    assert_graph_is_bit_equal(tmp_path, gpu_kernels, [4, 2] * STEPS, **OPTIMIZERS["lion"], precision="bf16")


class Mirrored(Ranks):
    """Rank 0 of two, whose other rank has the same gradients and never changes its piece of the weights."""

    def exchange(self, received, sent):
        received.view(2, -1).copy_(sent[: len(sent) // 2])

    def gather(self, received, piece):
        if received.data_ptr() != piece.data_ptr():
            received.view(2, -1).copy_(piece)

    def finish(self, works):
        pass

    def least(self, number):
        return number

    def any_rank(self, event):
        return bool(event)


@dataclass(frozen=True)
class Agreeing(Mirrored):
    """The same. `told` collects the problems that are agreed on, and `other` has those of the other rank by their number."""

    told: list[str | None] = field(default_factory=list)
    other: dict[int, str] = field(default_factory=dict)

    def problem(self, text):
        number = len(self.told)
        self.told.append(text)
        return (0, text) if text else (1, self.other[number]) if number in self.other else None


@pytest.mark.parametrize("shard_state", [False, True])
def test_steps_of_ranks_are_captured(shard_state, stand_in, tmp_path, monkeypatch):
    settings = {**OPTIMIZERS["dlion"], "precision": "bf16", "grad_clip": 0.5, "ema": 0.9, "shard_state": shard_state}
    options = {"batch": 8, "ranks": Mirrored(0, 2, 0, 2)}
    step = assert_graph_is_bit_equal(tmp_path, "reference", [4] * STEPS, **settings, **options)

    # Another rank needs a capture, or eager calls: this one does not replay its graph.
    captures, batch = len(stand_in.capture_options), next(pinned_batches([4]))
    step(batch, STEPS)
    assert len(stand_in.capture_options) == captures
    monkeypatch.setattr(Mirrored, "least", lambda self, number: min(number, -1))
    step(batch, STEPS)
    assert len(stand_in.capture_options) == captures + 1
    monkeypatch.setattr(Mirrored, "least", lambda self, number: min(number, -2))
    step(batch, STEPS)
    assert len(stand_in.capture_options) == captures + 1 and not step._graphs._captures


@pytest.mark.parametrize(
    "owner, method, error",
    [
        (GradientSums, "finish", RuntimeError("operation not permitted")),
        (DLion, "_finish", RuntimeError("operation not permitted")),  # the sums of the update are complete
        (GradientSums, "finish", torch.OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_ranks_agree_on_a_capture_that_fails_on_one(owner, method, error, stand_in, tmp_path, monkeypatch):
    """They exchange as many messages wherever it fails, so none waits, and go on without graphs or with less memory."""
    settings = {**OPTIMIZERS["dlion"], "precision": "bf16", "batch": 8}
    sizes, original, errors = [4] * (WARM_UP + 2), getattr(owner, method), [error]

    def failing(*args):
        if stand_in.capturing is not None and errors:
            raise errors.pop()
        return original(*args)

    def run(name, ranks, *, graph=True):
        warnings = []
        tensors, _, step = train(tmp_path / name, "reference", graph, sizes, warn=warnings.append, ranks=ranks, **settings)
        return tensors, step.micro_batch_size, len(step._graphs._captures) if graph else 0, warnings

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, failing)
        failed = Agreeing(0, 2, 0, 2)
        tensors, micro_batch_size, captures, warnings = run("failed", failed)
    intact = Agreeing(0, 2, 0, 2, other={number: text for number, text in enumerate(failed.told) if text})
    others, *same_end, others_warnings = run("intact", intact)
    assert len(intact.told) == len(failed.told) and len(intact.other) == 1 and not any(intact.told)
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True)) and same_end == [micro_batch_size, captures]
    assert len(warnings) == len(others_warnings) == 1
    if type(error) is RuntimeError:
        assert says(warnings[0], "ranks-no-graph", ranks=2, rank=0, reason=str(error)) and (micro_batch_size, captures) == (
            4,
            0,
        )
        assert says(others_warnings[0], "ranks-no-graph", rank=1)
        if owner is DLion:
            eager, *_ = run("eager", Agreeing(0, 2, 0, 2), graph=False)
            assert all(torch.equal(a, b) for a, b in zip(eager, tensors, strict=True))
    else:
        assert says(warnings[0], "step-out-of-memory", images=4) and micro_batch_size == 2


@pytest.mark.slow
def test_canary_has_a_graph_of_its_own(gpu_kernels, tmp_path):
    settings = {**OPTIMIZERS["lion"], "precision": "bf16"}
    plain, _, _ = train(tmp_path / "plain", gpu_kernels, True, [4] * 2 * STEPS, **settings)
    checked, _, step = train(tmp_path / "checked", gpu_kernels, True, [4] * 2 * STEPS, canary_every=2, **settings)
    assert len(step._graphs._captures) == 2 and int(step.canary_errors) == 0
    assert all(torch.equal(a, b) for a, b in zip(plain, checked, strict=True))


@pytest.mark.slow
def test_work_between_replays_does_not_change_results(gpu_kernels, tmp_path):
    def use_the_unet(step):
        with torch.no_grad():
            latents = torch.randn(3, 4, 16, 16, device="cuda")
            step.model.unet(latents, torch.full((3,), 5, device="cuda"), torch.randn(3, 77, 16, device="cuda"))

    settings = {**OPTIMIZERS["dlion"], "precision": "bf16"}
    undisturbed, _, _ = train(tmp_path / "undisturbed", gpu_kernels, True, [4] * STEPS, **settings)
    disturbed, _, _ = train(tmp_path / "disturbed", gpu_kernels, True, [4] * STEPS, use_the_unet, **settings)
    # Each step after the warm-up captures a graph.
    cleared, _, _ = train(tmp_path / "cleared", gpu_kernels, True, [4] * STEPS, lambda step: step.free_graphs(), **settings)
    for other in (disturbed, cleared):
        assert all(torch.equal(a, b) for a, b in zip(undisturbed, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "gpu_kernels, name, graph",
    [
        *(("stand-in", name, False) for name in OPTIMIZERS),
        ("stand-in", "dlion", True),  # each optimizer is captured above, and a capture refuses to wait
        *(pytest.param("gpu", name, graph, marks=pytest.mark.gpu) for name in OPTIMIZERS for graph in (False, True)),
    ],
    indirect=["gpu_kernels"],
)
def test_step_never_waits_after_warm_up(name, graph, gpu_kernels, tmp_path):
    settings = {**OPTIMIZERS[name], "precision": "bf16", "micro_batch": 2, "grad_clip": 1.0}
    _, _, step = train(tmp_path / "model", gpu_kernels, graph, [4] * STEPS, **settings)
    prepared = list(pinned_batches([4] * 4))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i, batch in enumerate(prepared):
            step(batch, STEPS + i)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_out_of_memory_reduces_the_micro_batch(gpu_kernels, tmp_path):
    warnings: list[str] = []
    model = gpu_model(tmp_path / "model", gpu_kernels, "fp32")
    stage = stage_of(batch=64, **OPTIMIZERS["lion"])
    step = Step(model, stage, 9, seed=0, graph=True, warn=warnings.append)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # Some of the 64 images of a forward fit into this memory, but not all.
    limit = torch.cuda.memory_allocated() + 40 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        for i, batch in enumerate(pinned_batches([64] * STEPS)):
            result = step(batch, i)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert says(warnings[0], "step-out-of-memory", images=64, batch=64) and step.micro_batch_size < 64
    assert bool(torch.isfinite(result.loss)) and float(result.skipped) == 0
