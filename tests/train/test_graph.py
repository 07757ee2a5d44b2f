"""The step on a GPU: as a CUDA graph it has the bits of a plain step, it never waits, and it lives with little memory."""

import pytest
import torch
from step_inputs import OPTIMIZERS, batches, stage_of
from tiny import make_tiny_model

from fastsd.train.graph import WARM_UP
from fastsd.train.precision import choose_ops, set_precision
from fastsd.train.step import Step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = WARM_UP + 5
CASES = {
    "fp32": {"precision": "fp32"},
    "tf32, accumulated": {"precision": "tf32", "micro_batch": 2},
    "bf16": {"precision": "bf16"},
    "bf16, accumulated and clipped": {"precision": "bf16", "micro_batch": 2, "grad_clip": 0.5, "ema": 0.9},
    "bf16, gradients used at once": {"precision": "bf16", "fused_backward": True},
    "bf16, block": {"precision": "bf16", "checkpointing": "block"},
    "bf16, noise and loss of several kinds": {
        "precision": "bf16",
        "immiscible": 3,
        "pyramid_noise": 0.3,
        "noise_offset": 0.1,
        "input_perturbation": 0.1,
        "loss": "huber",
        "weighting": "min_snr",
        "timesteps": "logit_normal",
    },
    "both parts": {"precision": "bf16", "train": ["unet", "text_encoder"]},
    "weights and masks": {"precision": "bf16", "counted": True, "unmasked_weight": 0.1},
    "a group, a warm average": {"precision": "bf16", "train": ["unet.cross_attention"], "ema": 0.9, "ema_power": 0.75},
}


def gpu_model(folder, precision):
    from fastsd.config.schema import ModelTable
    from fastsd.model.formats.load import load_model

    make_tiny_model(folder)
    device = torch.device("cuda")
    model = load_model(ModelTable(base=str(folder)), choose_ops("triton", device))
    for module in (model.unet, model.text.module):
        module.to(device)
    set_precision(precision, model.unet)
    return model


def pinned(sizes: list[int], counted: bool = False):
    """One batch a size, in pinned memory as the loader's are; with weights and masks of the images if they are `counted`."""
    for i, size in enumerate(sizes):
        batch = batches(1, size, seed=i)[0]
        weight_B, mask_B1HW = (
            (None, None) if not counted else (torch.rand(size), torch.randint(256, (size, 1, 16, 16), dtype=torch.uint8))
        )
        tensors = batch.latents_BCHW, batch.token_ids_BL, batch.positions_B
        yield type(batch)(*(tensor.pin_memory() for tensor in tensors), [], weight_B=weight_B, mask_B1HW=mask_B1HW)


def trained(folder, graph, sizes, between=lambda step: None, counted=False, **settings):
    model = gpu_model(folder, settings["precision"])
    model.unet.checkpointing = settings.get("checkpointing", "none")
    step = Step(model, stage_of(**settings), len(sizes), seed=0, graph=graph)
    losses = []
    for i, batch in enumerate(pinned(sizes, counted)):
        losses.append(step(batch, i).loss)
        between(step)
    tensors = [tensor.clone() for tensors in step.tensors_by_role().values() for tensor in tensors]
    return tensors, torch.stack(losses), step


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_graph_has_the_bits_of_a_plain_step(name, case, tmp_path):
    settings = {**OPTIMIZERS[name], **CASES[case]}
    plain, losses, _ = trained(tmp_path / "plain", False, [4] * STEPS, **settings)
    replayed, same_losses, step = trained(tmp_path / "graph", True, [4] * STEPS, **settings)
    assert len(step._run._recorded) == 1
    assert torch.equal(losses, same_losses) and losses.unique().numel() == STEPS
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


def test_a_graph_for_every_size(tmp_path):
    sizes = [4, 2] * STEPS
    settings = {**OPTIMIZERS["lion"], "precision": "bf16"}
    plain, losses, _ = trained(tmp_path / "plain", False, sizes, **settings)
    replayed, same_losses, step = trained(tmp_path / "graph", True, sizes, **settings)
    assert len(step._run._recorded) == 2 and torch.equal(losses, same_losses)
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


def test_what_happens_between_replays_changes_nothing(tmp_path):
    def busy(step):
        with torch.no_grad():
            latents = torch.randn(3, 4, 16, 16, device="cuda")
            step.model.unet(latents, torch.full((3,), 5, device="cuda"), torch.randn(3, 77, 16, device="cuda"))

    settings = {**OPTIMIZERS["dlion"], "precision": "bf16"}
    quiet, _, _ = trained(tmp_path / "quiet", True, [4] * STEPS, **settings)
    disturbed, _, _ = trained(tmp_path / "busy", True, [4] * STEPS, busy, **settings)
    cleared, _, _ = trained(tmp_path / "cleared", True, [4] * 2 * STEPS, lambda step: step.clear_graphs(), **settings)
    whole, _, _ = trained(tmp_path / "whole", True, [4] * 2 * STEPS, **settings)
    assert all(torch.equal(a, b) for a, b in zip(quiet, disturbed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(cleared, whole, strict=True))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_steady_step_never_waits(name, graph, tmp_path):
    settings = {**OPTIMIZERS[name], "precision": "bf16", "micro_batch": 2, "grad_clip": 1.0}
    _, _, step = trained(tmp_path / "model", graph, [4] * STEPS, **settings)
    ready = list(pinned([4] * 4))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i, batch in enumerate(ready):
            step(batch, STEPS + i)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_too_little_memory_makes_the_micro_batch_smaller(tmp_path):
    said: list[str] = []
    model = gpu_model(tmp_path / "model", "fp32")
    stage = stage_of(batch=64, **OPTIMIZERS["lion"])
    step = Step(model, stage, 9, seed=0, graph=True, warn=said.append)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # Room for some of the 64 images of a forward, not for all.
    room = torch.cuda.memory_allocated() + 40 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        for i, batch in enumerate(pinned([64] * STEPS)):
            result = step(batch, i)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said and "going on with" in said[0] and step.micro < 64
    assert bool(torch.isfinite(result.loss)) and float(result.skipped) == 0
