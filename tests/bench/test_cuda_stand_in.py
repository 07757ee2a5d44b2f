"""The stand-in for CUDA behaves like CUDA where tests rely on it."""

import copy
import gc
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from cuda_stand_in import StandIn
from environment import ROOT
from torch import nn

CUDA = torch.device("cuda")
KIB = 1024


@pytest.fixture
def x(stand_in):
    return torch.zeros(4, device=CUDA)


def captured(function, **options) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        assert torch.cuda.is_current_stream_capturing()
        function()
    assert not torch.cuda.is_current_stream_capturing()
    return graph


def test_tensors_know_their_device(stand_in):
    host = torch.ones(2, 3)
    gpu = host.to(CUDA, torch.bfloat16)
    assert gpu.is_cuda and not gpu.is_cpu and gpu.device == torch.device("cuda", 0) == host.cuda().device
    results = [gpu * 2, gpu.view(3, 2), gpu.clone(), torch.zeros_like(gpu), torch.stack([gpu, gpu]), copy.deepcopy(gpu)]
    results += [torch.tensor([1.0], device="cuda"), torch.arange(3, device=0), host.to(gpu), gpu.new_zeros(2), gpu.float()[0]]
    with CUDA:
        results.append(torch.rand(2))
    assert all(tensor.is_cuda for tensor in results)
    others = [host, gpu.cpu(), gpu.to("cpu"), torch.empty_like(gpu, device="cpu").copy_(gpu), host.pin_memory(), torch.ones(1)]
    assert not any(tensor.is_cuda for tensor in others) and torch.empty(1, device="meta").device.type == "meta"
    assert gpu.to("meta").is_meta and others[4].is_pinned() and not host.is_pinned()


def test_gradients_and_modules_are_on_the_gpu(stand_in):
    convolution = nn.Conv2d(2, 2, 1).to(device=CUDA, dtype=torch.float32, memory_format=torch.channels_last)
    devices = [parameter.device for parameter in convolution.parameters()]

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            devices.extend([gradient.device, ctx.saved_tensors[0].device, torch.zeros((), device=gradient.device).device])
            return 2 * gradient

    module = nn.Linear(4, 4).to(CUDA)
    module.weight.register_post_accumulate_grad_hook(lambda weight: devices.extend([weight.device, weight.grad.device]))
    Double.apply(module(torch.ones(2, 4, device=CUDA))).sum().backward()
    assert len(devices) == 7 and {device.type for device in devices} == {"cuda"}


def test_a_capture_executes_nothing_and_a_replay_everything(x):
    outside = torch.full((2, 4), 5.0, device=CUDA)
    outputs, python_calls = [], []

    def function():
        python_calls.append(1)
        y = x + len(python_calls)  # a number of Python is fixed by the capture
        outside[0].add_(y)
        x.mul_(2).add_(1)
        outputs.append(outside.sum() + y.view(2, 2).t().reshape(-1).sum())

    graph = captured(function)
    assert x.tolist() == [0] * 4 and outside.tolist() == [[5.0] * 4] * 2 and bool(outputs[0].isnan())
    address = outputs[0].data_ptr()
    expected, row = 0.0, 5.0
    for _ in range(3):
        graph.replay()
        y, expected = expected + 1, 2 * expected + 1
        row += y
        assert x.tolist() == [expected] * 4 and outside[0].tolist() == [row] * 4
        assert outputs[0].item() == 4 * (row + 5 + y) and outputs[0].data_ptr() == address
    assert len(python_calls) == 1
    x.fill_(-1)  # a replay reads what lies in memory now
    graph.replay()
    assert x.tolist() == [-1] * 4


def test_memory_allocated_by_a_capture_is_initialised_by_each_replay(stand_in):
    state = []

    def function():
        if not state:
            state.append(torch.zeros(2, device=CUDA))
        state[0].add_(1)

    graph = captured(function)
    for _ in range(2):
        graph.replay()
        assert state[0].tolist() == [1, 1]


def test_freed_memory_of_others_is_not_replayed(stand_in):
    tensors = [torch.ones(2, device=CUDA)]
    graph = captured(lambda: tensors[0].add_(1))
    tensors.clear()
    with pytest.raises(AssertionError, match="freed"):
        graph.replay()


WAITS = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0]),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "copy from the host": lambda x: x.copy_(torch.ones(4)),
    "numbers of the host": lambda x: torch.tensor([1.0], device=CUDA),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_waits_are_counted_warned_of_refused_and_never_captured(wait, x, stand_in):
    wait(x)
    assert stand_in.waits.total() == 1
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="called a synchronizing CUDA operation"):
        wait(x)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        wait(x)
    torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(RuntimeError, match="previous error during capture") as error:
        captured(lambda: wait(x))
    assert "not permitted when stream is capturing" in str(error.value.__context__)
    x.zero_()
    captured(lambda: x.add_(1)).replay()
    assert x.tolist() == [1] * 4


def test_asynchronous_work_is_no_wait(x, stand_in):
    torch.cuda.set_sync_debug_mode("error")
    pinned = torch.ones(4).pin_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x.copy_(pinned, non_blocking=True)
        pinned.to(CUDA, non_blocking=True)
        torch.empty(4, pin_memory=True).copy_(x, non_blocking=True)
        torch.where(x > 0, x, 0).sum().add_(1)
    assert not stand_in.waits
    graph = captured(lambda: x.copy_(pinned, non_blocking=True))
    pinned.fill_(7)
    graph.replay()
    torch.cuda.set_sync_debug_mode("default")
    assert x.tolist() == [7] * 4
    for function in (torch.cuda.synchronize, torch.cuda.Event().synchronize, lambda: x.copy_(torch.ones(4), non_blocking=True)):
        with pytest.raises(RuntimeError, match="capture"):
            captured(function)


def test_operands_on_two_devices_are_refused():
    with StandIn(count=2):
        first, second = (torch.ones(2, device=f"cuda:{i}") for i in range(2))
        assert second.device.index == 1 and second.sum().get_device() == 1
        for other in (second, torch.ones(2)):
            with pytest.raises(RuntimeError, match="same device"):
                first + other
        assert (first + torch.tensor(2.0)).tolist() == [3, 3] and torch.ones(2)[first.cpu().long() - 1].tolist() == [1, 1]
        first.copy_(second * 2)
        assert first.tolist() == [2, 2] and second.to("cuda:0").device.index == 0
        with pytest.raises(TypeError, match="can't convert cuda"):
            first.numpy()
        with pytest.raises(TypeError, match="can't convert cuda"):
            np.asarray(first)
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.ones(1, device="cuda:2")


def test_a_graph_contains_the_operations_of_the_current_gpu_only():
    with StandIn(count=2):
        first, second = (torch.zeros(1, device=f"cuda:{i}") for i in range(2))

        def function():
            first.add_(1)
            second.add_(1)

        for current in range(2):
            torch.cuda.set_device(current)
            for tensor in (first, second):
                tensor.zero_()
            graph = captured(function, stream=torch.cuda.Stream())
            graph.replay()
            graph.replay()
            counts = first.item(), second.item()
            assert counts == ((2, 1) if current == 0 else (1, 2))  # the other operation ran once, during the capture


def test_memory_is_counted_and_limited(stand_in):
    def tensor(kib: int) -> torch.Tensor:
        return torch.zeros(kib * KIB, dtype=torch.uint8, device=CUDA)

    total = torch.cuda.get_device_properties(0).total_memory
    a = tensor(4)
    view = a[:10]
    del a
    assert torch.cuda.memory_allocated() == 4 * KIB and torch.cuda.mem_get_info() == (total - 4 * KIB, total)
    del view
    assert torch.cuda.memory_allocated() == 0 and torch.cuda.max_memory_allocated() == 4 * KIB
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(10 * KIB / total)
    kept = tensor(6)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        tensor(5)
    assert torch.cuda.max_memory_allocated() == 6 * KIB and tensor(4).numel() and kept.numel()


def test_a_pool_keeps_its_peak_until_its_last_graph_is_freed(stand_in):
    kept = []

    def function(kib: int) -> None:
        temporary = torch.zeros(kib * KIB, dtype=torch.uint8, device=CUDA)
        other = temporary + 1
        kept.append(other[:1].clone())

    first = captured(lambda: function(3))
    assert torch.cuda.memory_allocated() == 1 and torch.cuda.memory_reserved() == 6 * KIB + 1
    second = captured(lambda: function(2), pool=first.pool())
    assert torch.cuda.memory_reserved() == 6 * KIB + 1
    del first
    assert torch.cuda.memory_reserved() == 6 * KIB + 1
    del second
    gc.collect()
    assert torch.cuda.memory_reserved() == torch.cuda.memory_allocated() == 2
    torch.cuda.set_per_process_memory_fraction(5 * KIB / torch.cuda.mem_get_info()[1])
    with pytest.raises(torch.OutOfMemoryError):
        captured(lambda: function(3))


def test_everything_is_as_before_at_the_end():
    before = vars(torch.cuda).copy(), vars(torch.Tensor).copy()
    with StandIn(), StandIn():
        assert torch.cuda.is_available()
    assert (vars(torch.cuda), vars(torch.Tensor)) == before and not torch.ones(1).is_cuda


def test_command_runs_a_script_on_the_stand_in(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, torch\nprint(sys.argv[1:], torch.ones(1, device='cuda').device, __name__)\n")
    command = [sys.executable, str(ROOT / "bench" / "cuda_stand_in.py"), str(script), "a", "--b"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "['a', '--b'] cuda:0 __main__\n", run.stderr
