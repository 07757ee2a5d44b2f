"""Memory: every name of "out of memory", recovery at any point of a step, and release at the end of a stage."""

import copy
import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from cuda_stand_in import StandIn
from sentences import refused
from step_inputs import OPTIMIZERS, batches, stage_of
from tiny import ONE_LEVEL, make_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.errors import UserError, out_of_memory
from fastsd.model.unet import UNetConfig
from fastsd.train.precision import precision_switches
from fastsd.train.step import Step

# Messages as PyTorch, cuDNN, cuBLAS and Triton write them.
ERRORS = {
    "allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "instantiation": torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later."),
    "no engine": RuntimeError("GET was unable to find an engine to execute this computation"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "capture": RuntimeError("CUDA error: operation failed due to a previous error during capture"),
}
ERRORS["capture"].__context__ = ERRORS["allocator"]
POINTS = len(ERRORS) + 1


@pytest.mark.parametrize("name", ERRORS)
def test_every_name_of_out_of_memory_is_recognised(name):
    assert out_of_memory(ERRORS[name])


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: device-side assert triggered"), ValueError("out of memory"), KeyError("x")]
)
def test_other_errors_are_not(error):
    assert out_of_memory(error) is None


class Failing(TorchDispatchMode):
    """Counts operations, and raises an error instead of operation number `at`. The replay of a graph dispatches none."""

    def __init__(self, at: int = -1, error: Exception | None = None) -> None:
        super().__init__()
        self.at, self.error, self.operations = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        if self.operations == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


def train(model, stage, watch: Failing, reduce: bool = False) -> tuple[list[torch.Tensor], int]:
    """Train two steps, the first under `watch`, and with half the micro-batch if `reduce` is true."""
    step = Step(replace(model, unet=copy.deepcopy(model.unet)), stage, 2, seed=0, warn=lambda _: None)
    first, second = batches(2, 4)
    try:
        if reduce:
            step._discard_step()
            step._reduce_micro_batch("as planned")
        with watch:
            step(first, 0)
        step(second, 1)
        tensors = [tensor.clone() for role in ("weights", "state", "ema") for tensor in step.tensors_by_role()[role]]
        return tensors, step.micro_batch_size
    finally:
        step.release()


@pytest.mark.parametrize(
    "settings",
    [
        {**OPTIMIZERS["dlion"], "precision": "bf16", "grad_clip": 1.0},
        {**OPTIMIZERS["adamw"], "ema": 0.9, "fused_backward": True},
    ],
)
def test_recovers_at_any_point_of_a_step_or_says_so(settings, tmp_path, monkeypatch):
    """After recovery all later bits are those of a run that had the smaller micro-batch from the start."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # it takes longer than a step
    model, stage, watch = make_tiny_model(tmp_path, UNetConfig(**ONE_LEVEL)), stage_of(**settings), Failing()
    plain = train(model, stage, watch)
    fused = stage.fused_backward
    reduced = None if fused else train(model, stage, Failing(), reduce=True)
    outcomes = []
    for i in range(POINTS):
        error = list(ERRORS.values())[i % len(ERRORS)]
        at = 1 + i * (watch.operations - 1) // (POINTS - 1)
        try:
            tensors, micro_batch_size = train(model, stage, Failing(at, error))
        except UserError as refusal:
            assert refusal.code == "out-of-memory"
            outcomes.append("refused")
            continue
        assert not fused and micro_batch_size == 2
        outcomes.append("recovered")
        for tensor, expected in zip(tensors, reduced[0], strict=True):
            assert torch.equal(tensor, expected)
    assert plain[1] == 4
    if not fused:
        assert outcomes == sorted(outcomes), "recovery ends where the update begins"
        assert outcomes.count("recovered") > POINTS / 2


def test_larger_gradient_arena_that_does_not_fit_is_one_sentence(tmp_path, monkeypatch):
    """With several micro-batches, bf16 gradients are summed in fp32, which needs a larger arena."""
    step = Step(make_tiny_model(tmp_path), stage_of(precision="bf16", **OPTIMIZERS["lion"]), 3, seed=0, warn=lambda _: None)
    zeros = torch.zeros

    def limited(*size, dtype=None, **options):
        if dtype == torch.float32 and size and size[0] == step.components["unet"].layout.size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.20 GiB.")
        return zeros(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "zeros", limited)
    with refused("out-of-memory", cause="for gradients in fp32"), Failing(50, ERRORS["no engine"]):
        step(batches(1, 4)[0], 0)


@pytest.mark.parametrize(
    "settings",
    [
        {**OPTIMIZERS["dlion"], "precision": "bf16", "ema": 0.9},
        {**OPTIMIZERS["lion"], "micro_batch": 2, "precision": "bf16"},
        {**OPTIMIZERS["adamw"], "fused_backward": True},
        {**OPTIMIZERS["adamw"], "train": ["unet", "text_encoder"], "grad_clip": 1.0},
        {**OPTIMIZERS["dlion"], "train": ["unet.mid"], "freeze_d_after": 1, "precision": "tf32"},
    ],
)
def test_finished_stage_frees_its_memory_without_a_collection(settings, tmp_path):
    model = make_tiny_model(tmp_path)
    gc.collect()
    gc.disable()
    try:
        step = Step(model, stage_of(**settings), 1, seed=0)
        step(batches(1, 4)[0], 0)
        lasting = {id(parameter) for name in ("unet", "text_encoder") for parameter in model.component(name).parameters()}
        tensors = [tensor for tensors in step.tensors_by_role().values() for tensor in tensors if id(tensor) not in lasting]
        owners = [step, step.objective, *step.components.values(), *step.optimizers.values()]
        references = [weakref.ref(value) for value in (*tensors, *owners)]
        step.release()
        del step, tensors, owners
        assert len(references) > 5 and not [reference() for reference in references if reference() is not None]
    finally:
        gc.enable()


@pytest.mark.slow
def test_recovers_at_any_point_of_steps_with_a_graph(tmp_path, monkeypatch):
    """The points lie in eager steps, in the capture, and around a replay. All later bits are those of a planned reduction."""
    monkeypatch.setattr(gc, "collect", lambda: 0)
    settings = stage_of(**OPTIMIZERS["dlion"], precision="bf16", grad_clip=1.0)
    steps, outcomes = 3, Counter()

    def train(at: int = -1, error: Exception | None = None, reduce_at: int | None = None):
        """Train. Return the state, the images per forward, the number of operations, and the step that had the error."""
        with StandIn() as gpu, precision_switches("bf16"):
            model, failing, failed_at = make_tiny_model(tmp_path / "model", UNetConfig(**ONE_LEVEL)), Failing(at, error), None
            for module in (model.unet, model.text.module):
                module.to("cuda")
            step = Step(model, settings, steps, seed=0, graph=True, warn=lambda _: None)
            for i, batch in enumerate(batches(steps, 4)):
                if reduce_at == i:
                    step._weights_touched = step._graphs.replayed = False
                    step._discard_step()
                    step._reduce_micro_batch("as planned")
                before, captures = failing.operations, len(gpu.capture_options)
                with failing:
                    step(batch, i)
                if before < at <= failing.operations:
                    failed_at = i, len(gpu.capture_options) > captures
            tensors = [tensor.clone() for role in ("weights", "state") for tensor in step.tensors_by_role()[role]]
            return tensors, step.micro_batch_size, failing.operations, failed_at

    _, _, operations, _ = train()
    reduced = [train(reduce_at=i)[0] for i in range(steps)]
    for point in range(POINTS):
        error = list(ERRORS.values())[point % len(ERRORS)]
        try:
            tensors, micro_batch_size, _, (failed_at, in_capture) = train(1 + point * (operations - 1) // (POINTS - 1), error)
        except UserError as refusal:
            assert refusal.code == "out-of-memory"
            outcomes["refused"] += 1
            continue
        outcomes["capture" if in_capture else "eager"] += 1
        assert micro_batch_size == 2
        assert all(torch.equal(*pair) for pair in zip(tensors, reduced[failed_at], strict=True)), (point, failed_at)
    assert outcomes["eager"] and outcomes["capture"] and outcomes["refused"] < POINTS / 4, outcomes
