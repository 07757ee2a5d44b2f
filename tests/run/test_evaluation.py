"""Samples and validation of a run: without memory for them, with errors, and interrupted by kills and signals."""

import signal
from contextlib import contextmanager, nullcontext

import pytest
import torch
from runs import checkpoint_steps, final, rows_of, run, same
from sentences import refused, says
from tiny import job

from fastsd.errors import Stopped
from fastsd.model.unet import UNet
from fastsd.run import export
from fastsd.run.evaluation import Evaluation
from fastsd.run.folder import read_grid
from fastsd.run.signals import StopSignals
from fastsd.run.validation import Validation
from fastsd.train import trainable
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

    monkeypatch.setattr(Validation, "measure", broken)
    other, text = run(path, f"run={tmp_path / 'run'}", f"sample.prompts_file={prompts}", *OVERRIDES)
    assert same(final(other), final(folder))
    assert says(text, "evaluation-failed", task="validation", reason="'sampler'")
    assert says(text, "evaluation-failed", task="sampling") and str(prompts) in text
    assert not (other / "samples").exists() and (other / "model" / "README.md").exists()


class Killed(BaseException):
    """Ends a run like a kill: nothing more is written."""


EMA = *OVERRIDES, "stage.0.ema=0.5", "stage.0.checkpoint_every=2"


def test_grids_of_the_ema_weights_have_names_of_their_own(plain, with_averages, tmp_path):
    """A stage without EMA draws with its weights. The card says by which weights its samples are drawn."""
    path, folder, _ = plain
    ema = with_averages["ema"]
    names = [f"stage-1-ema-{step:08d}.png" for step in (0, 2, 4)]
    assert sorted(path.name for path in (ema / "samples").iterdir()) == names
    grids = [
        read_grid(root / "samples" / name.replace(word, ""), "", 0)
        for root, word in ((ema, ""), (folder, "-ema"))
        for name in names
    ]
    assert [grid.weights for grid in grids] == ["ema"] * 3 + ["model"] * 3
    equal = [a.whole().tobytes() == b.whole().tobytes() for a, b in zip(grids[:3], grids[3:], strict=True)]
    assert equal == [True, False, False]  # the average starts with the weights
    assert same(final(ema), final(with_averages["model"]))
    cards = [(root / name / "README.md").read_text() for root, name in ((ema, "model"), (ema, "model-ema"), (folder, "model"))]
    assert [("with the EMA weights" in card, "with the non-EMA weights" in card) for card in cards] == [
        (True, False), (False, False), (False, False),
    ]  # fmt: skip
    with refused("config-invalid") as info:
        run(path, f"run={tmp_path / 'none'}", "sample.weights=ema")
    assert "no stage has ema" in str(info.value)


@pytest.fixture(scope="module")
def with_averages(plain, tmp_path_factory):
    """Return the folder of an uninterrupted run with an EMA, by the weights that draw its samples."""
    root = tmp_path_factory.mktemp("averages")
    return {
        weights: run(plain[0], f"run={root / weights}", *EMA, f"sample.weights={weights}")[0] for weights in ("model", "ema")
    }


@pytest.mark.parametrize(("task", "weights"), [("validate", "model"), ("sample", "model"), ("sample", "ema")])
@pytest.mark.parametrize("step", [2, 4])
def test_an_evaluation_that_a_kill_prevented_is_done_at_the_next_start(
    step, task, weights, plain, with_averages, tmp_path, monkeypatch
):
    """The checkpoint is committed before: in the middle of the stage and at its end. No step is trained again."""
    settings, uninterrupted = (*EMA, f"sample.weights={weights}"), with_averages[weights]
    evaluate, trained, train_step = getattr(Evaluation, task), [], Step.__call__

    def killed(self, *args):
        if self.position.progress.step == step:
            raise Killed
        return evaluate(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Evaluation, task, killed)
        run(plain[0], f"run={tmp_path / 'run'}", *settings)
    assert checkpoint_steps(tmp_path / "run")[-1] == step
    if task == "sample":  # a part of the rows that were measured before is lost too
        rows = (tmp_path / "run/validation.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "run/validation.jsonl").write_text("".join(rows[:-1]))
    monkeypatch.setattr(Step, "__call__", lambda self, batch, number: trained.append(number) or train_step(self, batch, number))
    folder, _ = run(plain[0], f"run={tmp_path / 'run'}", *settings)
    assert trained == list(range(step, 4))
    assert same(final(folder), final(uninterrupted))
    assert (folder / "validation.jsonl").read_bytes() == (uninterrupted / "validation.jsonl").read_bytes()
    grids = [{path.name: path.read_bytes() for path in (root / "samples").iterdir()} for root in (folder, uninterrupted)]
    assert grids[0] == grids[1] and len(grids[0]) == 3


TWO_STAGES = STAGE.replace("until = 4", 'until = 2\nprecision = "bf16"\nema = 0.5') + STAGE.replace("until = 4", "until = 1")


def test_an_evaluation_at_the_end_of_a_stage_that_has_no_memory_changes_no_bit(tmp_path, tiny_model, images, monkeypatch):
    """Memory runs out when half of the weights were rounded to bf16. The next stage trains the exact ones."""
    path, overrides = job(tmp_path, tiny_model, images, TWO_STAGES), [*OVERRIDES, "sample.prompts=[]"]
    uninterrupted, _ = run(path, f"run={tmp_path / 'uninterrupted'}", *overrides)

    def killed(self, *_):
        if self.position.progress.step == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Evaluation, "validate", killed)
        run(path, *overrides)

    split, steps, start = trainable.split_master, [], Step.__init__

    def started(self, *args, evaluates_only=False, **options):
        steps.append(evaluates_only)
        splits.clear()
        start(self, *args, evaluates_only=evaluates_only, **options)
        assert not evaluates_only and self.optimizers

    def limited(weight):
        splits.append(weight)
        if steps[-1] and len(splits) == 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return split(weight)

    splits = []
    monkeypatch.setattr(trainable, "split_master", limited)
    monkeypatch.setattr(Step, "__init__", started)
    folder, text = run(path, *overrides)
    assert steps == [True, False] and same(final(folder), final(uninterrupted))
    assert says(text, "evaluation-at-end-skipped", stage="'stage-1'", reason="CUDA out of memory.")


def test_a_run_that_cannot_be_opened_for_lack_of_memory_ends_with_one_sentence(plain, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore words")

    @contextmanager
    def noticed_changes(*_):  # the last thing before the model is moved; loading one moves it too
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Module, "to", fail)
            yield

    fields = {"cause": "when the run was opened on cpu", "reason": "CUDA out of memory.", "command": "fastsd plan CONFIG"}
    for name, replacement in (("SmoothedLoss.load_state_dict", fail), ("noticed_changes", noticed_changes)):
        with monkeypatch.context() as patch, refused("out-of-memory", **fields):
            patch.setattr(f"fastsd.run.run.{name}", replacement)
            run(plain[0], f"run={tmp_path / 'run'}")


def test_an_evaluation_that_has_results_is_not_repeated(plain, monkeypatch):
    def repeated(*_):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(Evaluation, "validate", repeated)
    monkeypatch.setattr(Evaluation, "sample", repeated)
    run(plain[0], *OVERRIDES)


@pytest.mark.parametrize("task", ["sampling", "validation"])
def test_a_signal_interrupts_an_evaluation(task, plain, tmp_path, monkeypatch):
    """The run stops after at most one more forward, and the evaluation follows when the run continues."""
    _, uninterrupted, _ = plain
    forward, forwards, signals = UNet.forward, [], StopSignals()

    def counting(unet, latents, *rest):
        evaluates = not torch.is_grad_enabled() and trained
        if evaluates and (len(latents) == 3) == (task == "validation"):
            forwards.append(latents)
            if len(forwards) == 2:
                signals.receive(signal.SIGINT)
        return forward(unet, latents, *rest)

    trained, train_step = [], Step.__call__
    with monkeypatch.context() as patch:
        patch.setattr(UNet, "forward", counting)
        patch.setattr(Step, "__call__", lambda self, batch, number: trained.append(number) or train_step(self, batch, number))
        patch.setattr("fastsd.run.loop.stop_signals", lambda run: nullcontext(signals))
        with refused("run-stopped", error=Stopped, step=2):
            run(plain[0], f"run={tmp_path / 'run'}", *OVERRIDES)
    assert len(forwards) == 2 and checkpoint_steps(tmp_path / "run") == [2]
    folder, _ = run(plain[0], f"run={tmp_path / 'run'}", *OVERRIDES)
    assert same(final(folder), final(uninterrupted))
    assert (folder / "validation.jsonl").read_bytes() == (uninterrupted / "validation.jsonl").read_bytes()
    assert {path.name for path in (folder / "samples").iterdir()} == {
        path.name for path in (uninterrupted / "samples").iterdir()
    }


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
