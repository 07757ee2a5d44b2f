"""Loss weights, from metadata and folders to the batch, and their effect, like that of masks, on a training step."""

import json
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from caching import StubVae, draw_many, flip, with_data
from masked import ENDING, loader, stage
from PIL import Image
from runs import run
from safetensors.torch import load_file
from sentences import says, sentence
from tiny import job, write_images

from fastsd.config.schema import ModelTable
from fastsd.data.building.build import build_cache
from fastsd.data.building.upkeep import verify
from fastsd.data.cache import LatentCache, View, view_name
from fastsd.data.loader import Batch
from fastsd.model.formats.load import load_model
from fastsd.run.restart import compare_images
from fastsd.train.step import Step, StepResult


def weighted(root, key="score", loss_weights=(1.0, 1.0), **keys):
    folders = [{"path": str(root / name), "loss_weight": weight} for name, weight in zip("ab", loss_weights, strict=True)]
    return with_data(root, folders=folders, weight_key=key, **keys)


def write_weights(root):
    """Draw two folders of three images each. Two images of `a` have weights in a metadata file."""
    for folder in "ab":
        draw_many(root / folder, 3)
    rows = ['{"file_name": "images/000.png", "score": 2}', '{"file_name": "images/001.png", "score": 0.25}']
    (root / "a/metadata.jsonl").write_text("\n".join(rows))


def test_weights_reach_the_batch(tmp_path):
    write_weights(tmp_path)
    config = weighted(tmp_path)
    assert build_cache(config, StubVae()).encoded == 3  # both folders have the same pictures
    view = view_name(config, "stub")
    with closing(LatentCache.open(config.cache.dir, view)) as cache:
        assert cache.captions(range(6)) == [f"picture {i}" for i in range(3)] * 2
        assert cache.weights([1, 0, 5, 1]).tolist() == [0.25, 2, 1, 0.25]
        for folders, expected in [((1.0, 1.0), [2, 0.25, 1, 1, 1, 1]), ((0.5, 3.0), [1, 0.125, 0.5, 3, 3, 3])]:
            batch = loader(weighted(tmp_path, loss_weights=folders), cache).batch(0, 6)
            assert batch.weight_B.dtype == torch.float32 and batch.mask_B1HW is None
            assert batch.weight_B.tolist() == [expected[i] for i in batch.samples_B.tolist()]
        alone = loader(weighted(tmp_path, "", (0.5, 3.0)), cache).batch(0, 6)
        assert alone.weight_B.tolist() == [0.5 if i < 3 else 3.0 for i in alone.samples_B.tolist()]
        assert loader(weighted(tmp_path, ""), cache).batch(0, 6).weight_B is None


def test_editing_a_weight_rebuilds_only_the_view(tmp_path):
    write_weights(tmp_path)
    config = weighted(tmp_path)
    build_cache(config, StubVae())
    directory = tmp_path / "cache"
    path = directory / f"views/{view_name(config, 'stub')}.safetensors"
    before = View(path).metadata
    table = tmp_path / "a/metadata.jsonl"
    table.write_text(table.read_text().replace("0.25", "0.75"))
    assert build_cache(config, StubVae()).encoded == 0
    with closing(LatentCache.open(directory)) as cache:
        assert cache.weights([0, 1, 2]).tolist() == [2, 0.75, 1]
    after = View(path).metadata
    assert after["sha256"] == before["sha256"]  # token ids and text embeddings stay valid
    assert after["sha256_weight"] != before["sha256_weight"]
    stamp = path.stat().st_mtime_ns
    build_cache(config, StubVae())
    assert path.stat().st_mtime_ns == stamp
    flip(path, -2)  # damages the last weight
    assert verify(directory) == [sentence("verify-deleted", path=path, damage=sentence("damage-sha256"))] and not path.exists()
    assert build_cache(config, StubVae()).encoded == 0 and verify(directory) == []
    plain = build_cache(weighted(tmp_path, ""), StubVae())
    with closing(LatentCache.open(directory, plain.view)) as cache:
        assert cache.weights([0]) is None
    assert plain.encoded == 0


def train(base, batch=None, change=None, **keys):
    """Take one step, if there is a batch. Return the UNet's weights, the loss and the gradient norm."""
    step = Step(load_model(ModelTable(base=str(base))), stage(**keys), 9, seed=0)
    if change:
        change(step)
    result = step(batch, 0) if batch else StepResult(*torch.zeros(3))
    weights = torch.cat([tensor.flatten() for tensor in step.components["unet"].state().values()])
    assert result.skipped == 0
    return weights, result.loss.item(), result.grad_norm.item()


def batch_of(latents, **more):
    ids = torch.randint(1, 20, (4, 77), generator=torch.Generator().manual_seed(1))
    return Batch(latents, ids, torch.arange(4), [""] * 4, **more)


LATENTS = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"micro_batch": 1}, {"fused_backward": True}, {"loss": "huber"}], ids=str)
def test_samples_of_weight_0_do_not_affect_training(tiny_model, keys):
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0])
    other = torch.where(weight[:, None, None, None] > 0, LATENTS, -3 * LATENTS)
    weights, *result = train(tiny_model, batch_of(LATENTS, weight_B=weight), **keys)
    other_weights, *other_result = train(tiny_model, batch_of(other, weight_B=weight), **keys)
    assert torch.equal(weights, other_weights) and result == other_result and result[0] > 0
    plain, *expected = train(tiny_model, batch_of(LATENTS), **keys)
    assert not torch.equal(weights, plain)
    assert train(tiny_model, batch_of(LATENTS, weight_B=torch.ones(4)), **keys)[1:] == pytest.approx(expected, rel=1e-5)
    threefold = train(tiny_model, batch_of(LATENTS, weight_B=torch.full((4,), 3.0)), **keys)[1]
    assert threefold == pytest.approx(3 * expected[0], rel=1e-5)
    untrained, *result = train(tiny_model, batch_of(LATENTS, weight_B=torch.zeros(4)), **keys)
    assert result == [0, 0] and torch.equal(untrained, train(tiny_model)[0])


@pytest.mark.parametrize("keys", [{}, {"micro_batch": 2, "precision": "bf16"}], ids=str)
def test_a_black_mask_trains_nothing_and_a_white_one_everything(tiny_model, keys):
    black, white = (torch.full((4, 1, 16, 16), level, dtype=torch.uint8) for level in (0, 255))
    untouched, *result = train(tiny_model, batch_of(LATENTS, mask_B1HW=black), **keys)
    assert result == [0, 0] and torch.equal(untouched, train(tiny_model)[0])
    _, *expected = train(tiny_model, batch_of(LATENTS), **keys)
    assert train(tiny_model, batch_of(LATENTS, mask_B1HW=white), **keys)[1:] == pytest.approx(expected, rel=1e-4)
    twice = batch_of(LATENTS, mask_B1HW=black, weight_B=torch.full((4,), 2.0))
    assert train(tiny_model, twice, unmasked_weight=0.25, **keys)[1] == pytest.approx(expected[0] / 2, rel=1e-5)
    halves = [torch.cat(sides, dim=3) for sides in ((white, black), (black, white))]
    sides = [train(tiny_model, batch_of(LATENTS, mask_B1HW=mask[..., 8:24].contiguous()), **keys)[1] for mask in halves]
    assert min(sides) > 0 and sum(sides) == pytest.approx(expected[0], rel=1e-5)


def test_a_folder_of_weight_0_trains_as_if_its_losses_were_0(tmp_path, tiny_model):
    write_weights(tmp_path)
    config = weighted(tmp_path, "", (1.0, 0.0), resolution=128)
    build_cache(config, StubVae())
    with closing(LatentCache.open(config.cache.dir)) as cache:
        batch = loader(config, cache).batch(0, 4)
    factors_B = (batch.samples_B < 3).float()
    assert 0 < factors_B.sum() < 4 and torch.equal(batch.weight_B, factors_B)
    factors = iter(factors_B)

    def zero_others(step):
        loss = step.objective.loss
        step.objective.loss = lambda prediction, target, t_B, *_: loss(prediction, target, t_B) * next(factors)

    weights, *_ = train(tiny_model, batch, micro_batch=1)
    expected, *_ = train(tiny_model, replace(batch, weight_B=None), zero_others, micro_batch=1)
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("level, is_unchanged", [(0, True), (255, False)])
def test_a_run_applies_masks_and_weights(tmp_path, tiny_model, level, is_unchanged):
    write_images(tmp_path / "images", 8)
    for path in sorted((tmp_path / "images").glob("*.png"))[:7]:
        Image.new("L", (40, 40), level).save(path.with_name(path.stem + ENDING))
    rows = [{"file_name": f"{i:04}.png", "score": float(i < 7)} for i in range(8)]  # the last image has no mask, and weight 0
    (tmp_path / "images/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = job(tmp_path, tiny_model, tmp_path / "images", '[[stage]]\ntrain = ["unet"]\nuntil = 2\nbatch = 4\nd0 = 1e-3\n')
    folder, out = run(path, f"data.masks={ENDING}", "data.weight_key=score", "sample.prompts=[]")
    assert says(out, "images-cached", cached=8, images=8)
    weights = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(tiny_model / weights), load_file(folder / "model" / weights)
    assert all(torch.equal(after[name], before[name]) for name in before) == is_unchanged


def test_a_run_is_told_about_changed_weights(tmp_path):
    write_weights(tmp_path)
    config = weighted(tmp_path)

    def warnings():
        build_cache(config, StubVae())
        with closing(LatentCache.open(config.cache.dir)) as cache:
            return compare_images(tmp_path / "images.json", cache, config, resumed=(tmp_path / "images.json").exists())

    assert warnings() == [] == warnings()
    table = tmp_path / "a/metadata.jsonl"
    table.write_text(table.read_text().replace("0.25", "0.75"))
    (text,) = warnings()
    assert says(text, "cache-content-changed", contents="weights") and warnings() == []
    build_cache(weighted(tmp_path, ""), StubVae())
    with closing(LatentCache.open(config.cache.dir)) as cache:
        assert cache.weight_hash == ""
