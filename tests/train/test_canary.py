"""The canary: gradients of a step are computed twice and compared bit by bit, and training keeps its bits."""

import pytest
import torch
from step_inputs import OPTIMIZERS, batches, stage_of
from tiny import ONE_LEVEL, make_tiny_model

from fastsd.config.schema import ModelTable
from fastsd.model.formats.load import load_model
from fastsd.model.unet import UNetConfig
from fastsd.train.objective import Objective
from fastsd.train.precision import set_precision
from fastsd.train.step import Step


def train_on_cpu(folder, monkeypatch, wrong_call=None, **settings):
    """Train for six steps. The loss of call `wrong_call` is wrong. Return the tensors, the canary's errors and the calls."""
    if not folder.exists():
        make_tiny_model(folder, UNetConfig(**ONE_LEVEL))
    model = load_model(ModelTable(base=str(folder)))
    set_precision(settings.get("precision", "fp32"), model.unet)
    step, calls, loss = Step(model, stage_of(**settings), 6, seed=0), [], Objective.loss

    def loss_with_an_error(self, *args):
        calls.append(args)
        return loss(self, *args) * (1.001 if len(calls) == wrong_call else 1)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "loss", loss_with_an_error)
        for i, batch in enumerate(batches(6, 4)):
            step(batch, i)
    tensors = [tensor.clone() for tensors in step.tensors_by_role().values() for tensor in tensors]
    return tensors, int(step.canary_errors), len(calls)


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "bf16"}, {"micro_batch": 2, "train": ["unet", "text_encoder"]}], ids=str
)
def test_canary_notices_one_wrong_gradient(settings, tmp_path, monkeypatch):
    settings = {**OPTIMIZERS["lion"], **settings}
    forwards = 4 // settings.get("micro_batch", 4)
    plain, errors, calls = train_on_cpu(tmp_path / "model", monkeypatch, **settings)
    assert (errors, calls) == (0, 6 * forwards)
    checked, errors, calls = train_on_cpu(tmp_path / "model", monkeypatch, canary_every=2, **settings)
    assert (errors, calls) == (0, 9 * forwards)
    assert all(torch.equal(a, b) for a, b in zip(plain, checked, strict=True))
    # In step 2, first the additional computation of the gradients is wrong, then the one that trains.
    for wrong_call, same in ((forwards + 1, True), (2 * forwards + 1, False)):
        other, errors, _ = train_on_cpu(tmp_path / "model", monkeypatch, wrong_call, canary_every=2, **settings)
        assert errors == 1 and all(torch.equal(a, b) for a, b in zip(plain, other, strict=True)) == same
    _, errors, _ = train_on_cpu(tmp_path / "model", monkeypatch, 1, canary_every=2, **settings)
    assert errors == 0  # step 1 has no canary
