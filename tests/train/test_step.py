"""The step: arenas, exact masters, lossless changes of precision, too little memory, and fused backward."""

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import final, run, same
from safetensors.torch import load_file
from sentences import refused, says
from step_inputs import OPTIMIZERS, Elsewhere, batches, stage_of
from tiny import job, make_tiny_model

from fastsd.config.schema import ModelTable, StageTable
from fastsd.model.formats.load import load_model
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes, empty_model
from fastsd.model.unet import UNetConfig
from fastsd.plan.plan import plan_stage
from fastsd.run import checkpoint, stage_start
from fastsd.train.device import choose_ops
from fastsd.train.ranks import Ranks
from fastsd.train.step import Step
from fastsd.train.step_inputs import StepInputs
from fastsd.train.trainable import ALIGN, Layout, TrainableComponent
from fastsd_kernels import TRITON, noise
from fastsd_kernels.arena import join_master
from fastsd_kernels.launch import recording


@pytest.fixture
def model(tmp_path):
    """A new model for each test, with the ops that a run on this machine uses."""
    tiny = make_tiny_model(tmp_path / "model")
    return load_model(ModelTable(base=str(tmp_path / "model")), choose_ops("auto", tiny.unet.conv_in.weight.device))


def train_steps(model, stage: StageTable, steps: int = 3, warn=print, **more) -> tuple[dict[str, torch.Tensor], Step]:
    step = Step(model, stage, steps, seed=0, warn=warn, **more)
    for i, batch in enumerate(batches(steps, stage.batch)):
        step(batch, i)
    return {name: tensor.clone() for component in step.components.values() for name, tensor in component.state().items()}, step


@st.composite
def dense_tensors(draw):
    """A tensor of any shape whose dimensions lie in memory in any order, such as channels last or transposed."""
    shape = draw(st.lists(st.integers(1, 6), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    tensor = torch.randn([shape[dim] for dim in order])
    return tensor.permute([order.index(dim) for dim in range(len(shape))])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(dense_tensors(), max_size=6))
def test_layout_keeps_the_memory_order_of_every_tensor(tensors):
    layout = Layout(tensors)
    flat = torch.full((layout.size,), torch.nan)
    for view, tensor in zip(layout.views(flat), tensors, strict=True):
        assert view.stride() == tensor.stride() and view.shape == tensor.shape
        assert view.data_ptr() - flat.data_ptr() == 4 * view.storage_offset() and view.storage_offset() % ALIGN == 0
        assert view.isnan().all()  # no element belongs to two views
        view.copy_(tensor)
    assert all(torch.equal(view, tensor) for view, tensor in zip(layout.views(flat), tensors, strict=True))
    gaps = flat.isnan().sum().item()
    assert gaps == layout.size - sum(tensor.numel() for tensor in tensors) and gaps <= len(tensors) * (ALIGN - 1)


def test_changing_precision_and_back_keeps_all_bits(model):
    module = model.unet
    names = [name for name, _ in module.named_parameters()]
    with torch.no_grad():  # use numbers of every kind: all exponents, subnormals, ties, -0.0
        for parameter in module.parameters():
            bits = torch.randint(-(2**31), 2**31, parameter.shape, dtype=torch.int64).to(torch.int32)
            numbers = bits.view(torch.float32)
            parameter.copy_(torch.where(numbers.isfinite(), numbers, -0.0))
    before = {name: parameter.detach().clone().view(torch.int32) for name, parameter in module.named_parameters()}
    for trained, precision in itertools.product((set(names), set(names[::2]), set()), ("bf16", "fp32", "tf32", "bf16")):
        component = TrainableComponent("unet", module, trained, precision)
        exact = component.state()
        assert all(torch.equal(exact[name].view(torch.int32), bits) for name, bits in before.items())
        expected_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        assert {parameter.dtype for parameter in module.parameters()} == {expected_dtype}
        component.release()
        after = {name: parameter.detach().view(torch.int32) for name, parameter in module.named_parameters()}
        assert all(torch.equal(after[name], bits) for name, bits in before.items())


def three_stages(optimizer: str, lr: float) -> str:
    """Stages of three steps with a checkpoint after each: fp32, bf16 of both components with accumulation, and fp32."""
    stages = ("fp32", '["unet"]', 4), ("bf16", '["unet", "text_encoder"]', 2), ("fp32", '["unet"]', 4)
    return "".join(
        f'[[stage]]\ntrain = {train}\nuntil = 3\nbatch = 4\nmicro_batch = {micro}\nprecision = "{precision}"\n'
        f'optimizer = "{optimizer}"\nlr = {lr}\ncheckpoint_every = 1\nkeep_checkpoints = 99\n'
        for precision, train, micro in stages
    )


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, lr", [("dlion", 1.0), ("lion", 1e-4), ("adamw", 1e-4)])
def test_run_with_two_precision_changes_resumes_from_any_step(optimizer, lr, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, three_stages(optimizer, lr))
    keys = "sample.prompts=[]", "export.single_file=false"
    uninterrupted, _ = run(path, *keys)
    assert [p.name[-2:] for p in checkpoint.checkpoints(uninterrupted / "checkpoints")] == [f"{n:02d}" for n in range(1, 10)]
    for n in range(1, 9, 2 if optimizer == "dlion" else 3):
        folder = tmp_path / f"from-{n}"
        shutil.copytree(uninterrupted, folder)
        for later in checkpoint.checkpoints(folder / "checkpoints")[n:]:
            shutil.rmtree(later)
        run(path, f"run={folder}", *keys)
        assert same(final(folder), final(uninterrupted)), f"resumed at step {n}"
        assert (folder / "log.jsonl").read_bytes() == (uninterrupted / "log.jsonl").read_bytes()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masters_in_halves_equal_fp32_masters(name, tmp_path):
    masters = []
    for precision in ("fp32", "bf16"):
        step = Step(make_tiny_model(tmp_path / precision), stage_of(precision=precision, **OPTIMIZERS[name]), 3, seed=0)
        component, optimizer = step.components["unet"], step.optimizers["unet"]
        step.lrs["unet"].fill_(1e-3 if name != "dlion" else 1.0)
        for i in range(20):
            optimizer.update(torch.randn(component.layout.size, generator=torch.Generator().manual_seed(i)))
            optimizer.finish()
        masters.append(
            component.master_hi if component.master_lo is None else join_master(component.master_hi, component.master_lo)
        )
    assert torch.equal(masters[0], masters[1])


def test_gradients_do_not_carry_over_to_the_next_step(model):
    """With and without accumulation, the second step has the gradient of the second batch."""
    results = []
    for micro in (4, 2, 1):
        step = Step(model, stage_of(**OPTIMIZERS["lion"]), 2, seed=0, micro_batch_size=micro)
        gradients = []
        for batch in batches(2, 4):
            step._accumulate(StepInputs.of(batch, step.objective.timesteps(batch.positions_B), step.device))
            gradients.append(step.components["unet"].gradients.flat.clone())
        results.append(gradients)
        step.release()
    for gradients in results[1:]:
        for accumulated, expected in zip(gradients, results[0], strict=True):
            assert (accumulated - expected).norm() <= 1e-5 * expected.norm()
    assert (results[0][0] - results[0][1]).norm() > 0.1 * results[0][0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_backward_trains_the_same(name, precision, tmp_path, tiny_model, images):
    stage = stage_of(precision=precision, train=["unet", "text_encoder"], **OPTIMIZERS[name])
    results = []
    for fused_backward in (False, True):
        tiny = make_tiny_model(tmp_path / str(fused_backward))
        weights, step = train_steps(tiny, stage.model_copy(update={"fused_backward": fused_backward}))
        results.append((weights, {component: float(d) for component, d in step.d().items()}))
        assert bool(step.tensors_by_role()["gradients"]) is not fused_backward
    (collected, d), (fused, fused_d) = results
    assert d == pytest.approx(fused_d, rel=1e-6)
    if name == "dlion":  # its sums over all parameters have another order, so d differs in the last digits
        error = max(float((collected[key] - fused[key]).norm() / collected[key].norm()) for key in collected)
        assert error < 1e-5
    else:
        assert same(collected, fused)


def test_fused_backward_stops_at_the_first_gradient_that_is_not_finite(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    step = Step(model, stage_of(fused_backward=True, **OPTIMIZERS["lion"]), 3, seed=0)
    batch, bad_batch = batches(2, 4)
    step(batch, 0)
    before = {name: tensor.clone() for name, tensor in step.components["unet"].state().items()}
    bad_batch.latents_BCHW[0, 0, 0, 0] = torch.inf
    result = step(bad_batch, 1)
    assert same(step.components["unet"].state(), before) and float(result.skipped) == 1
    assert float(step(batch, 2).skipped) == 1 and not same(step.components["unet"].state(), before)


def out_of_memory_above(monkeypatch, model, limit: int) -> list[int]:
    """Limit the UNet's memory to `limit` images. Return a list to which each call adds its number of images."""
    forward, sizes = model.unet.forward, []

    def limited(latents, *rest):
        sizes.append(len(latents))
        if len(latents) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore words")
        return forward(latents, *rest)

    monkeypatch.setattr(model.unet, "forward", limited)
    return sizes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_out_of_memory_reduces_the_micro_batch_not_the_batch(precision, tmp_path, monkeypatch):
    stage = stage_of(batch=6, precision=precision, **OPTIMIZERS["adamw"])
    expected, _ = train_steps(make_tiny_model(tmp_path / "a"), stage, micro_batch_size=2)
    model, warnings = make_tiny_model(tmp_path / "b"), []
    sizes = out_of_memory_above(monkeypatch, model, 2)
    weights, step = train_steps(model, stage, warn=warnings.append)
    assert sizes[:4] == [6, 3, 2, 2] and step.micro_batch_size == 2
    assert len(warnings) == 2 and says(warnings[1], "step-out-of-memory", images=3, smaller=2, batch=6, micro_batch=2)
    assert same(weights, expected)  # as if training had started with this micro-batch
    assert step.components["unet"].gradients.flat.dtype == torch.float32


def test_out_of_memory_with_one_image_is_an_error(tmp_path, monkeypatch):
    model = make_tiny_model(tmp_path / "model")
    out_of_memory_above(monkeypatch, model, 0)
    with refused("out-of-memory", cause="even with one image per forward"):
        train_steps(model, stage_of(**OPTIMIZERS["lion"]))


def test_run_resumes_with_its_reduced_micro_batch(tmp_path, tiny_model, images, monkeypatch):
    from fastsd.model.unet import UNet

    forward = UNet.forward

    def limited(self, latents, *rest):
        if self.training and torch.is_grad_enabled() and len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, latents, *rest)

    monkeypatch.setattr(UNet, "forward", limited)
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 4\nbatch = 6\noptimizer = "lion"\nlr = 1e-4\ncheckpoint_every = 2\n'
    path = job(tmp_path, tiny_model, images, stage)
    folder, text = run(path)
    assert all(says(text, "step-out-of-memory", smaller=smaller) for smaller in (3, 2))
    uninterrupted = final(folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    _, text = run(path)
    assert not says(text, "step-out-of-memory") and same(final(folder), uninterrupted)


def test_each_component_has_its_own_lr(tmp_path):
    def largest_changes(lr) -> list[float]:
        model = make_tiny_model(tmp_path / str(lr))
        before = [p.detach().clone() for p in (model.unet.conv_in.weight, *model.text.module.parameters())]
        stage = stage_of(train=["unet", "text_encoder"], optimizer="lion", lr=lr)
        step = Step(model, stage, 1, seed=0)
        step(batches(1, 4)[0], 0)
        step.release()
        after = [model.unet.conv_in.weight, *model.text.module.parameters()]
        changes = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]
        return [changes[0], max(changes[1:])]

    assert largest_changes({"unet": 1e-3, "text_encoder": 1e-5}) == pytest.approx([1e-3, 1e-5], rel=1e-2)
    assert largest_changes(1e-4) == pytest.approx([1e-4, 1e-4], rel=1e-2)


def test_layers_excluded_by_clip_skip_are_not_trained(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    assert model.trainable("text_encoder") == {name for name, _ in model.text.module.named_parameters()}
    model.text.clip_skip = 1
    excluded = {name for name, _ in model.text.module.named_parameters()} - model.trainable("text_encoder")
    assert excluded and all("layers.1." in name for name in excluded)
    stage = stage_of(train=["text_encoder"], optimizer="lion", lr=1e-3, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.text.module.named_parameters()}
    after, _ = train_steps(model, stage)
    assert all(torch.equal(after[name], before[name]) for name in excluded)
    assert all(not torch.equal(after[name], before[name]) for name in before.keys() - excluded - {"position_ids"})


def test_ema_matches_its_formula_and_is_exported(tmp_path, tiny_model, images):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 4\nbatch = 6\noptimizer = "lion"\nlr = 1e-3\nema = 0.5\n'
    path = job(tmp_path, tiny_model, images, stage + "checkpoint_every = 1\nkeep_checkpoints = 9\n")
    folder, _ = run(path)
    name, file = "conv_in.weight", "unet/diffusion_pytorch_model.safetensors"
    average = load_file(tiny_model / file)[name].double()
    for step in checkpoint.checkpoints(folder / "checkpoints"):
        average += 0.5 * (load_file(step / file)[name].double() - average)
        torch.testing.assert_close(checkpoint.load_state(step)[f"unet@ema/{name}"].double(), average, rtol=1e-6, atol=1e-7)
    exported = load_file(folder / "model-ema" / file)
    assert torch.equal(exported[name], checkpoint.load_state(step)[f"unet@ema/{name}"])
    assert json.loads((folder / "model-ema" / "model_index.json").read_text())
    uninterrupted = final(folder)
    for later in checkpoint.checkpoints(folder / "checkpoints")[2:]:
        shutil.rmtree(later)
    run(path)
    assert same(final(folder), uninterrupted) and same(load_file(folder / "model-ema" / file), exported)


ACCUMULATED = {"optimizer": "dlion", "precision": "bf16", "micro_batch": 2, "grad_clip": 1.0, "ema": 0.9}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {**ACCUMULATED, "train": ["unet", "text_encoder"]},
        {"optimizer": "lion", "lr": 1e-4, "precision": "fp32", "checkpointing": "block"},
        {"optimizer": "adamw", "lr": 1e-4, "precision": "tf32", "checkpointing": "ff", "fused_backward": True},
    ],
)
def test_step_stays_on_the_device_after_warm_up(settings):
    """With meta tensors, every transfer to or from the host is visible. A CUDA graph could not capture it."""
    unet = UNetConfig(block_out_channels=(32, 64), attention=(True, False), layers_per_block=1, heads=2, norm_groups=4)
    empty = empty_model(Shapes(unet, {**SD15_TEXT, "num_hidden_layers": 2}, SD15_VAE, clip_skip=1), TRITON)
    # At the start, the low halves of frozen components move to the host.
    with recording(86), mock.patch.object(torch.Tensor, "cpu", lambda self: self):
        step = Step(empty, stage_of(**settings), 9, seed=0)
        shapes = (4, 4, 16, 16), (4,), (4,), (4, 77)
        dtypes = torch.float16, *[torch.int64] * 3
        inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, dtypes, strict=True)]
        inputs += [None, None, None]  # text embeddings, weights, masks
        step._compute(*inputs)
        with Elsewhere() as watch:
            step._compute(*inputs)
    assert watch.operations > 1000 and not watch.found


def test_auto_micro_batch_plans_one_of_several_ranks(monkeypatch):
    """With the whole batch and sharded state, of which each rank has its share. The advice names all ranks."""
    planned, ranks = [], Ranks(1, 4, 1, 2)
    monkeypatch.setattr(Ranks, "least", lambda _, number: number)
    monkeypatch.setattr(stage_start, "free_memory", lambda device: 0)
    monkeypatch.setattr(stage_start.Shapes, "of", lambda model: SimpleNamespace(step=8))

    def plan(shapes, stage, *_, **options):
        planned.append((stage, options["ranks"]))
        return SimpleNamespace(largest_micro_batch=lambda: 0)

    monkeypatch.setattr(stage_start, "plan_stage", plan)
    stage = stage_of(batch=8, micro_batch="auto", shard_state=True)
    config = SimpleNamespace(stage=[stage], data=SimpleNamespace(resolution=32, buckets=None), stage_name=lambda index: "one")
    position, data = SimpleNamespace(progress=None), SimpleNamespace(text_embeddings=None)
    run = SimpleNamespace(config=config, position=position, data=data, ranks=ranks, model=None, ops=None, resident=[])
    run.device = torch.device("cpu")
    with refused("stage-does-not-fit", command="fastsd plan CONFIG --gpus 4 --machines 2"):
        stage_start._micro_batch_size(run, 0, resumed=False)
    assert planned == [(stage, ranks)]


@pytest.mark.slow
def test_auto_micro_batch_is_the_largest_that_fits(tmp_path, tiny_model, images, monkeypatch):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 2\nbatch = 12\nmicro_batch = "auto"\noptimizer = "lion"\nlr = 1e-4\n'
    path = job(tmp_path, tiny_model, images, stage)
    results, plans = {}, []

    def reuse_plan(*args, **options):  # only device_bytes, the fourth argument, differs between calls
        plans[:] = plans or [plan_stage(*args, **options)]
        plans[0].device_bytes = args[3]
        return plans[0]

    monkeypatch.setattr("fastsd.run.stage_start.plan_stage", reuse_plan)
    for megabytes in (1000, 5, 0):
        monkeypatch.setattr("fastsd.run.stage_start.free_memory", lambda device, free=megabytes: free << 20)
        if megabytes == 0:
            with refused("stage-does-not-fit", command="fastsd plan CONFIG") as error:
                run(path, f"run={tmp_path / 'none'}")
            assert "'stage-1'" in str(error.value)
            break
        folder, text = run(path, f"run={tmp_path / str(megabytes)}")
        results[megabytes] = checkpoint.newest(folder / "checkpoints")[1].micro_batch_size
        assert says(text, "micro-batch-estimated", size=results[megabytes])
    assert results[1000] == 12 > results[5] >= 1 and all(12 % micro == 0 for micro in results.values())
    monkeypatch.setattr("fastsd.run.stage_start.free_memory", lambda device: 1000 << 20)
    _, text = run(path, f"run={tmp_path / '5'}", "stage.0.until=4")  # more memory on resume does not change the micro-batch
    assert checkpoint.newest(tmp_path / "5" / "checkpoints")[1].micro_batch_size == results[5]


@pytest.mark.parametrize("train", [["unet"], ["unet.cross_attention"], ["text_encoder"]], ids=str)
def test_only_trained_weights_get_gradients(model, train):
    step = Step(model, stage_of(train=train), 9, seed=0)
    step(batches(1, 4)[0], 0)
    count = 0
    for name in ("unet", "text_encoder"):
        for key, parameter in model.component(name).named_parameters():
            assert parameter.requires_grad == (key in step.trained.get(name, ())), key
            count += parameter.requires_grad
    assert count == sum(map(len, step.trained.values())) > 0


def test_decay_and_lr_on_the_device_are_exact(tiny_model):
    """A decay that changes from step to step is a tensor, and gives the bits of the same decay as a number."""
    results = []
    for warm_up in ({}, {"ema_power": 60.0}):  # the warm-up is over at once
        model = load_model(ModelTable(base=str(tiny_model)))
        step = Step(model, stage_of(optimizer="adamw", lr=1e-3, ema=0.999, **warm_up), 9, seed=0)
        for i, batch in enumerate(batches(2, 4)):
            step(batch, i)
        results.append(step.components["unet"].ema_state())
        assert all(lr.dtype == torch.float64 and float(lr) == 1e-3 for lr in step.lrs.values())
    assert all(torch.equal(a, b) for a, b in zip(*(result.values() for result in results), strict=True))
    assert len(results[0]) > 0


def test_fingerprints_are_hashes_of_order_timesteps_and_the_first_noise(model):
    def hashed(tensor):
        return xxhash.xxh3_64_hexdigest(tensor.numpy().tobytes())

    step = Step(model, stage_of(), 9, seed=3)
    batch = replace(batches(1, 4)[0], samples_B=torch.tensor([5, 2, 9, 1]))
    noise_B = noise.normal(3, noise.Purpose.NOISE, batch.positions_B, (4, 16, 16))
    assert step.batch_fingerprints(batch) == {
        "order": hashed(batch.samples_B), "timesteps": hashed(step.objective.timesteps(batch.positions_B)),
        "noise": hashed(noise_B[:1]),
    }  # fmt: skip
    assert "order" not in step.batch_fingerprints(batches(1, 4)[0])


def test_a_single_parameter_can_be_trained(model):
    before = {name: parameter.clone() for name, parameter in model.unet.named_parameters()}
    step = Step(model, stage_of(train=["unet.conv_in.bias"]), 9, seed=0)
    step(batches(1, 4)[0], 0)
    changed = [name for name, parameter in model.unet.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == ["conv_in.bias"]


def test_out_of_memory_in_an_update_ends_the_run(model, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("no memory\nat all")

    warnings = []
    step = Step(model, stage_of(optimizer="lion", lr=1e-3), 9, seed=0, warn=warnings.append)
    first, second = batches(2, 4)
    step(first, 0)
    with monkeypatch.context() as patch:  # a forward changes no weights, so a smaller micro-batch can try again
        calls = iter([fail])
        forward = model.unet.forward
        patch.setattr(model.unet, "forward", lambda *tensors: next(calls, forward)(*tensors))
        step(second, 1)
    assert len(warnings) == 1 and step.micro_batch_size == 2
    monkeypatch.setattr(step.optimizers["unet"], "update", fail)
    with refused("out-of-memory", cause="while weights were updated", reason="no memory"):
        step(second, 2)
    assert len(warnings) == 1
