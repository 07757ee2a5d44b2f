"""Samples and validation of a run that has no memory left for them."""

import pytest
import torch
from runs import final, rows_of, run, same
from sentences import says
from tiny import job

from fastsd.model.unet import UNet
from fastsd.run import export
from fastsd.run.validation import Validation
from fastsd.train.step import Step

STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 4\nbatch = 4\noptimizer = "lion"\nlr = 1e-4\nsample_every = 2\n'
OVERRIDES = ["validate.held_out=3", "validate.every=2", "validate.batch=3"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_model, images):
    path = job(tmp_path_factory.mktemp("plain"), tiny_model, images, STAGE)
    return path, *run(path, *OVERRIDES)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("Triton Error [CUDA]: out of memory")]
)
@pytest.mark.parametrize("limit", [2, 0])
def test_evaluation_without_memory_never_ends_a_run(limit, error, plain, tmp_path, monkeypatch):
    """Evaluation continues with one image at a time, which guidance doubles, or is skipped. Training is not affected."""
    forward, freed = UNet.forward, []

    def limited(unet, latents, *rest):
        if not torch.is_grad_enabled() and len(latents) > limit:
            raise error
        return forward(unet, latents, *rest)

    monkeypatch.setattr(UNet, "forward", limited)
    monkeypatch.setattr(Step, "free_graphs", lambda step: freed.append(step))
    path, folder, _ = plain
    short_of_memory, text = run(path, f"run={tmp_path / 'run'}", *OVERRIDES)
    assert same(final(short_of_memory), final(folder))
    for task in ("sampling", "validation"):
        assert says(text, "evaluation-skipped", task=task) == (limit == 0)
    assert bool(freed) == (limit == 0)
    if limit:
        expected, measured = (rows_of(run_folder, "validation.jsonl") for run_folder in (folder, short_of_memory))
        assert [row["step"] for row in measured] == [row["step"] for row in expected]
        for row, expected_row in zip(measured, expected, strict=True):
            assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-5) and row["items"] == expected_row["items"]
        assert len(list((short_of_memory / "samples").iterdir())) == len(list((folder / "samples").iterdir())) == 3
    else:
        assert not (short_of_memory / "validation.jsonl").exists() and not (short_of_memory / "samples").exists()


def test_a_failing_evaluation_costs_no_step(plain, tmp_path, monkeypatch):
    """The file of prompts is gone, and a measurement has an error of its own."""
    path, folder, _ = plain
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle")

    def broken(*_):
        prompts.unlink(missing_ok=True)
        raise KeyError("sampler")

    monkeypatch.setattr(Validation, "rows", broken)
    other, text = run(path, f"run={tmp_path / 'run'}", f"sample.prompts_file={prompts}", *OVERRIDES)
    assert same(final(other), final(folder))
    assert says(text, "evaluation-failed", task="validation", reason="'sampler'")
    assert says(text, "evaluation-failed", task="sampling") and str(prompts) in text
    assert not (other / "samples").exists() and (other / "model" / "README.md").exists()


def test_a_failing_model_card_costs_no_model(plain, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a title that is no title")

    monkeypatch.setattr(export, "write_card", broken)
    folder, text = run(plain[0], f"run={tmp_path / 'run'}", *OVERRIDES)
    assert says(text, "card-not-written", folder=folder / "model", error="ValueError: a title that is no title")
    assert (folder / "model" / "unet").is_dir() and not (folder / "model" / "README.md").exists()


def test_averages_of_an_earlier_stage_are_removed(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE.replace("until = 4", "until = 1"))
    folder, _ = run(path, "stage.0.ema=0.5")
    averages = [folder / "model-ema", folder / "model-ema.safetensors"]
    assert all(file.exists() for file in averages)
    path.write_text(path.read_text() + STAGE.replace("until = 4", "until = 1"))
    _, text = run(path, "stage.0.ema=0.5")
    assert not any(file.exists() for file in averages) and (folder / "model").is_dir()
    assert all(says(text, "averages-removed", path=file) for file in averages)
