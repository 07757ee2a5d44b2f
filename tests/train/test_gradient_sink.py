"""Linears write their gradients into the arena: what arrives there, and what no longer passes through autograd."""

import pytest
import torch
from budget import FACTOR
from step_inputs import batches, stage_of
from tiny import make_tiny_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.config.schema import LoraTable
from fastsd.model import matmul
from fastsd.model.gradient_sink import GradientSink, sink_of
from fastsd.model.lora import add_lora
from fastsd.model.matmul import LayerTensors
from fastsd.model.recompute import linear
from fastsd.train.step import Step
from fastsd.train.step_inputs import StepInputs
from fastsd.train.trainable import GradientArena


def received(model, monkeypatch, **settings) -> set[str]:
    """Return the parameters whose gradients autograd delivers in a step of two micro-batches."""
    names: set[str] = set()
    receive = GradientArena.receive

    def record(arena, i, gradient):
        names.update(component.names[i] for component in step.components.values() if component.gradients is arena)
        receive(arena, i, gradient)

    monkeypatch.setattr(GradientArena, "receive", record)
    step = Step(model, stage_of(micro_batch=2, lr=1e-4, optimizer="lion", **settings), 1, seed=0)
    step(batches(1, 4)[0], 0)
    step.release()
    return names


@pytest.mark.parametrize("checkpointing", ["none", "ff", "block"])
def test_no_gradient_of_a_linear_passes_through_autograd(tmp_path, monkeypatch, checkpointing):
    model = make_tiny_model(tmp_path)
    model.unet.checkpointing = checkpointing
    modules = dict(model.unet.named_modules())
    linears = {path for path, module in modules.items() if isinstance(module, nn.Linear) or path.endswith("conv_shortcut")}
    names = received(model, monkeypatch)
    delivered = {name for name in names if name.rpartition(".")[0] in linears}
    assert linears and names and all(name.endswith("ff.net.0.proj.bias") for name in delivered)  # GEGLU's backward sums it


def test_of_an_adapter_only_up_passes_through_autograd(tmp_path, monkeypatch):
    """Up is scaled before its use, and a fused weight has several."""
    model = make_tiny_model(tmp_path)
    add_lora(model, LoraTable(rank=2), seed=0)
    names = received(model, monkeypatch, train=["lora"])
    assert names and all(".lora_B." in name for name in names)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_arena_has_the_gradients_that_autograd_returns(tmp_path, monkeypatch, precision):
    model, (batch,), gradients = make_tiny_model(tmp_path), batches(1, 4), []
    for find in (sink_of, lambda tensor: None):
        monkeypatch.setattr(matmul, "sink_of", find)
        step = Step(model, stage_of(precision=precision, micro_batch=2, lr=1e-4, optimizer="lion"), 1, seed=0)
        for _ in range(2):  # the second step starts anew
            step._accumulate(StepInputs.of(batch, step.objective.timesteps(batch.positions_B), step.device))
        component = step.components["unet"]
        gradients.append([view.clone() for view in component.layout.views(component.gradients.flat)])
        step.release()
    tolerance = 1e-5 if precision == "fp32" else 2**-7
    for ours, expected in zip(*gradients, strict=True):
        assert (ours - expected).norm() <= tolerance * expected.norm() + 1e-8


@pytest.mark.parametrize("dtype, wide", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_sums_over_micro_batches_are_within_the_budget(dtype, wide):
    """The weight is used twice in a micro-batch, once by a layer that knows no sinks."""
    torch.manual_seed(0)
    x_MN, weight, bias = torch.randn(3, 2, 64, 40), torch.randn(24, 40) / 6, torch.randn(24)
    dy_MN = torch.randn(3, 2, 64, 24)

    def gradients(dtype, sum_dtype, sinks):
        parameters = [nn.Parameter(tensor.to(dtype)) for tensor in (weight, bias)]
        sums = [torch.full_like(tensor, torch.nan, dtype=sum_dtype) for tensor in parameters]
        receivers = [GradientSink(tensor.detach(), memory) for tensor, memory in zip(parameters, sums, strict=True)]
        if not sinks:
            for memory in sums:
                memory.zero_()
        for x_N, dy_N in zip(x_MN.to(dtype), dy_MN.to(dtype), strict=True):
            y0 = linear(x_N[0], LayerTensors(*parameters)) if sinks else F.linear(x_N[0], *parameters)
            ((y0 * dy_N[0]).sum() + (F.linear(x_N[1], *parameters) * dy_N[1]).sum()).backward()
            for parameter, receiver in zip(parameters, receivers, strict=True):
                receiver.add(parameter.grad) if sinks else receiver.memory.add_(parameter.grad)
                parameter.grad = None
        return sums

    truth = gradients(torch.float64, torch.float64, False)
    sum_dtype = torch.float32 if wide else dtype
    ours, pytorch = gradients(dtype, sum_dtype, True), gradients(dtype, sum_dtype, False)
    for sums, plain, exact in zip(ours, pytorch, truth, strict=True):
        assert (sums.double() - exact).norm() <= FACTOR * (plain.double() - exact).norm()


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_matmul_adds_to_the_fp32_sum(dtype):
    """Also in bf16, without a result in bf16 and without a pass that adds it."""
    weight = torch.empty(24, 40, dtype=dtype, device="meta")
    sink = GradientSink(weight, torch.empty(24, 40, device="meta"))
    dy, x = (torch.empty(64, features, dtype=dtype, device="meta") for features in (24, 40))
    with Operations() as operations:
        for _ in range(2):
            sink_of(weight).add_product(dy.t(), x)
    names = [func for func in operations.functions if func is not torch.ops.aten.t.default]
    aten = torch.ops.aten
    wide = [aten.mm.dtype_out, aten.addmm.dtype_out]
    assert [f for f in names if "view" not in str(f)] == ([aten.mm.out, aten.addmm.out] if dtype == torch.float32 else wide)
    assert not sink.empty


def test_a_view_of_some_rows_is_not_the_parameter():
    weight = torch.empty(24, 40)
    sink = GradientSink(weight, torch.empty(24, 40))
    assert sink_of(weight.detach()) is sink_of(weight[:, :, None].flatten(1)) is sink
    assert sink_of(weight[:12]) is None and sink_of(weight[12:]) is None


def test_a_released_model_returns_its_gradients_to_autograd(tmp_path):
    model = make_tiny_model(tmp_path)
    step = Step(model, stage_of(lr=1e-4, optimizer="lion"), 1, seed=0)
    weight = model.unet.time_embedding.linear_1.weight
    assert sink_of(weight) is not None
    step.release()
    assert sink_of(weight) is None
