"""Whole runs on a stand-in for CUDA: a CUDA graph changes no bit, and a run continues with little memory."""

import pytest
import torch
import torch.nn.functional as F
from cuda_stand_in import StandIn
from runs import final, rows_of, run, same
from sentences import says
from step_inputs import OPTIMIZERS, batches, stage_of
from tiny import ONE_LEVEL, job, make_tiny_model, write_images

from fastsd.model.unet import UNetConfig
from fastsd.train.graph import WARM_UP
from fastsd.train.precision import precision_switches
from fastsd.train.step import Step
from fastsd.train.step_inputs import StepInputs

STEPS = WARM_UP + 2
STAGES = f"""
[[stage]]
train = ["unet"]
until = {STEPS}
batch = 4
precision = "bf16"
schedule = "linear"
ema = 0.9
ema_power = 0.75
sample_every = {WARM_UP + 1}
[[stage]]
train = ["unet", "text_encoder"]
until = {STEPS}
batch = 4
micro_batch = 2
optimizer = "lion"
lr = 1e-3
grad_clip = 1.0
"""
VALIDATION = ["validate.held_out=4", "validate.stabilised=4", f"validate.every={WARM_UP + 1}"]
CONFIG = UNetConfig(**ONE_LEVEL)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "one-level"
    make_tiny_model(folder, CONFIG)
    return folder


def run_on_gpu(folder, model, images, stages: str, *overrides: str):
    """Run a job on the stand-in. Return the run's folder, the printed text and the stand-in."""
    folder.mkdir()
    with StandIn(count=2) as gpu:
        return *run(job(folder, model, images, stages), 'device="cuda"', 'kernels="reference"', *overrides), gpu


@pytest.mark.slow
def test_run_with_a_graph_has_the_bits_of_one_without(tmp_path, small_model, images):
    """Samples and validation come between the replays. Each stage captures its graph, on the GPU of the config."""
    results = []
    for i, (device, graph) in enumerate((("cuda:1", "true"), ("cuda", "false"))):
        settings = *VALIDATION, f'device="{device}"', f"cuda_graph={graph}"
        folder, text, gpu = run_on_gpu(tmp_path / str(i), small_model, images, STAGES, *settings)
        assert len(gpu.capture_options) == (2 if graph == "true" else 0)
        assert "RTX 4090" in text and not gpu.gpus[device == "cuda"].live.peak
        rows = [row for name in ("log.jsonl", "validation.jsonl") for row in rows_of(folder, name)]
        results.append((final(folder), rows))
    (tensors, rows), (expected, expected_rows) = results
    assert same(tensors, expected) and rows == expected_rows
    assert {row["stage_step"] for row in rows if "loss_smooth" in row} == {*range(1, STEPS + 1)}


@pytest.mark.slow
def test_each_number_of_tokens_has_a_graph(tmp_path, small_model, monkeypatch):
    """With an automatic number of chunks, it changes from batch to batch."""
    write_images(tmp_path / "images", 6)
    for i, count in enumerate([1, 1, 40, 40, 1, 80]):
        (tmp_path / f"images/{i:04d}.txt").write_text("red circle " * count)
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 12\nbatch = 1\noptimizer = "lion"\nlr = 1e-4\n'
    lengths, copy, results = list[int](), StepInputs.of, []

    def copied(batch, t_B, device):
        lengths.append(batch.token_ids_BL.shape[1])
        return copy(batch, t_B, device)

    monkeypatch.setattr(StepInputs, "of", copied)
    for graph in ("true", "false"):
        lengths.clear()
        settings = "model.chunks=auto", f"cuda_graph={graph}"
        folder, _, gpu = run_on_gpu(tmp_path / graph, small_model, tmp_path / "images", stage, *settings)
        captured = {length for length in lengths if lengths.count(length) > WARM_UP}
        assert len(captured) > 1 and set(lengths) <= {77, 154, 231}
        assert (len(gpu.capture_options) >= len(captured)) == (graph == "true")
        results.append((final(folder), [row["loss"] for row in rows_of(folder)]))
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@pytest.mark.slow
def test_memory_of_a_stage_is_free_before_the_next(tmp_path, small_model, images):
    """The second stage chooses the micro-batch that it would choose alone."""
    first, second = STAGES.split("[[stage]]")[1:]
    second = second.replace("micro_batch = 2", 'micro_batch = "auto"')
    lines = []
    for name, stages in (("alone", [second]), ("both", [first, second])):
        text = "".join(f"[[stage]]\n{stage}" for stage in stages)
        _, output, _ = run_on_gpu(tmp_path / name, small_model, images, text, "sample.prompts=[]")
        lines.append([line for line in output.splitlines() if line.startswith("micro-batch")])
    assert lines[0] == lines[1] and len(lines[0]) == 1


def train(folder, sizes: list[int], limit: float | None = None, graph: bool = True, capture_error=None, calls=None, **settings):
    """Train one step per batch size on a GPU with `limit` bytes. Return copies of the state, the warnings and the peaks."""
    warnings, peaks = [], []
    with StandIn() as gpu:
        gpu.capture_error = capture_error
        gpu.calls = [] if calls is None else calls
        model = make_tiny_model(folder, CONFIG)
        for module in (model.unet, model.text.module):
            module.to("cuda")
        step = Step(
            model, stage_of(batch=8, **OPTIMIZERS["lion"], **settings), len(sizes), seed=0, graph=graph, warn=warnings.append
        )
        if limit:
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        for i, size in enumerate(sizes):
            torch.cuda.reset_peak_memory_stats()
            step(batches(1, size, seed=i)[0], i)
            peaks.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
        tensors = [tensor.clone() for tensors in step.tensors_by_role().values() for tensor in tensors]
        return tensors, warnings, peaks, step.micro_batch_size, len(gpu.capture_options)


def test_graphs_are_freed_before_the_eager_steps_of_another_shape(tmp_path):
    """With memory for eager steps, but not beside a graph, the run goes on with the same images per forward."""
    sizes = [8] * (WARM_UP + 2) + [4] * (WARM_UP + 2) + [8, 4, 8]
    expected, _, peaks, _, _ = train(tmp_path / "eager", sizes, graph=False)
    (resident, largest), (_, smaller) = peaks[1], peaks[WARM_UP + 2]
    activations = largest - resident
    limit = resident + 1.2 * activations
    assert resident + activations + (smaller - resident) > limit
    tensors, warnings, _, micro_batch_size, captures = train(tmp_path / "graph", sizes, limit)
    assert not warnings and micro_batch_size == 8 and captures == 3
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("graph", [False, True])
def test_too_little_memory_reduces_the_images_per_forward(graph, tmp_path):
    sizes = [8] * (WARM_UP + 3)
    _, _, peaks, _, _ = train(tmp_path / "measured", sizes, graph=False)
    resident, largest = peaks[1]
    limit = resident + 0.6 * (largest - resident)
    tensors, warnings, limited_peaks, micro_batch_size, captures = train(tmp_path / "limited", sizes, limit, graph)
    assert micro_batch_size == 4 and captures == graph and max(peak for _, peak in limited_peaks) <= limit
    assert len(warnings) == 1 and says(warnings[0], "step-out-of-memory", images=8, smaller=4, batch=8)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize("graph", [False, True])
def test_an_algorithm_without_memory_counts_as_out_of_memory(graph, tmp_path, monkeypatch):
    """cuDNN takes another one, which rounds differently, without an error. A resumed run might have the memory again."""
    conv2d, swallowed = F.conv2d, []

    def convolve(x, *arguments, **options):
        try:
            torch.empty(len(x), 64 << 20, dtype=torch.uint8, device="cuda")  # the workspace
        except torch.OutOfMemoryError:
            swallowed.append(len(x))
        return conv2d(x, *arguments, **options)

    monkeypatch.setattr(F, "conv2d", convolve)
    limit = 450 << 20
    with precision_switches("fp32"):
        _, warnings, _, micro_batch_size, captures = train(tmp_path / "plain", [8] * (WARM_UP + 3), limit, graph)
        assert set(swallowed) == {8} and micro_batch_size == 4 and captures == graph
        assert len(warnings) == 1 and says(warnings[0], "step-out-of-memory", images=8, smaller=4, batch=8)
        _, warnings, _, _, _ = train(tmp_path / "fused", [8] * (WARM_UP + 3), limit, graph, fused_backward=True)
        assert len(warnings) == 1 and says(warnings[0], "algorithm-without-memory")
    with precision_switches("fp32", deterministic=False):
        assert train(tmp_path / "timed", [8] * 2, limit, graph)[1] == []


def test_a_capture_that_runs_out_of_memory_starts_again_with_fewer_images(tmp_path):
    """It has changed no weight, and the steps with fewer images run eagerly before their capture."""
    sizes = [8] * (2 * WARM_UP + 2)
    error, calls = torch.OutOfMemoryError("CUDA out of memory"), []
    tensors, warnings, _, micro_batch_size, captures = train(tmp_path / "graph", sizes, capture_error=error, calls=calls)
    assert micro_batch_size == 4 and len(warnings) == 1 and captures == 2
    first, second = (i for i, text in enumerate(calls) if text == "capture")
    assert calls[:first].count("enter side") == WARM_UP == calls[first:second].count("enter side")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def test_a_graph_is_not_used_after_memory_ran_out(tmp_path, monkeypatch):
    """It has the old number of images per forward. The next steps run eagerly, and another graph is captured."""
    copy, copies = StepInputs.of, []

    def limited(batch, t_B, device):
        copies.append(batch)
        if len(copies) == WARM_UP + 3:  # the third replay
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copy(batch, t_B, device)

    monkeypatch.setattr(StepInputs, "of", limited)
    calls = []
    _, warnings, _, micro_batch_size, captures = train(tmp_path, [8] * (2 * WARM_UP + 4), calls=calls)
    assert micro_batch_size == 4 and len(warnings) == 1 and captures == 2
    first, second = (i for i, text in enumerate(calls) if text == "capture")
    assert calls[first:second].count("enter side") == WARM_UP and calls[first:second].count("replay 0") == 2
