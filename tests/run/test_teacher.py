"""The base as a teacher: what it predicts, whether it is still the same, and bases that cannot teach."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from model_files import make_small_sd15, single_file
from runs import checkpoint_steps, run
from safetensors.torch import load_file, save_file
from sentences import refused, says
from step_inputs import stage_of
from tiny import job, make_tiny_model, tiny_vae

from fastsd.commands.check import check
from fastsd.config.schema import ModelTable, load_config
from fastsd.demo.demo import MODELS
from fastsd.model.formats.load import load_model
from fastsd.model.model import SD15_SCHEDULER
from fastsd.model.shapes import Shapes
from fastsd.plan.plan import plan_stage
from fastsd.plan.rehearsal import moved_by
from fastsd.run import teacher as teacher_module
from fastsd.run.teacher import load_teacher
from fastsd.storage import write_safetensors
from fastsd.terminal.console import Console
from fastsd.train.flow import prediction_of
from fastsd.train.objective import alphas_cumprod
from fastsd_kernels import REFERENCE, TRITON

STAGES = "".join(
    f'[[stage]]\nname = "{name}"\ntrain = ["unet.mid"]\nuntil = 2\nbatch = 6\noptimizer = "lion"\nlr = 1e-3\n'
    f"checkpoint_every = 1\n{teacher}\n"
    for name, teacher in (("plain", ""), ("learned", 'teacher = "base"'))
)
FLOW = ["model.prediction=flow", "sample.prompts=[]"]


@pytest.fixture
def base(tmp_path):
    make_tiny_model(tmp_path / "base")
    return tmp_path / "base"


def change_weights(base: Path) -> None:
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"][0, 0, 0, 0] += 1
    save_file(weights, path)


@pytest.mark.slow
@pytest.mark.parametrize("until", [0, 1])
def test_a_base_that_has_changed_is_refused(until, base, tmp_path, images):
    """Before the stage with the teacher begins, and in its middle. The same base put back continues the run."""
    path = job(tmp_path, base, images, STAGES)
    run(path, *FLOW, *([f"stage.learned.until={until}"] if until else ["stage.plain.until=1"]), f"run={tmp_path / 'run'}")
    weights = (base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    change_weights(base)
    longer = [*FLOW, f"run={tmp_path / 'run'}", "stage.learned.until=3"]
    with refused("teacher-changed", stage="'learned'", base=base):
        run(path, *longer, *([] if until else ["stage.plain.until=1"]))
    (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    run(path, *longer, *([] if until else ["stage.plain.until=1"]))


def test_a_complete_stage_that_goes_on_needs_a_base_that_is_no_flow(base, tmp_path, images):
    """Without a longer end, the base may be anything. Without the teacher, the stage goes on with the images alone."""
    path, keys = job(tmp_path, base, images, STAGES), [*FLOW, "stage.plain.until=1", f"run={tmp_path / 'run'}"]
    run(path, *keys)
    scheduler = {**SD15_SCHEDULER, "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
    (base / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    run(path, *keys)
    with refused("teacher-is-flow", stage="'learned'", base=base):
        run(path, *keys, "stage.learned.until=3")
    run(path, *keys, "stage.learned.until=3", "stage.learned.teacher=")
    assert checkpoint_steps(tmp_path / "run")[-1] == 4


def test_a_base_that_does_not_know_the_latents_is_refused(base, tmp_path, images):
    """At the start of the run, long before the stage, and by `fastsd check`. The base's own VAE, rounded, is no other."""
    tiny_vae(factor=0.25, seed=3).save_pretrained(tmp_path / "vae")
    tiny_vae(seed=0).half().save_pretrained(tmp_path / "half")
    path = job(tmp_path, base, images, STAGES)
    with refused("teacher-and-vae", stage="'learned'", base=base, vae=tmp_path / "vae"):
        run(path, *FLOW, f"model.vae={tmp_path / 'vae'}")
    text = StringIO()
    with refused("check-problems"):
        check(load_config(path, [*FLOW, f"model.vae={tmp_path / 'vae'}"]), Console(file=text, width=9999))
    assert says(text.getvalue(), "teacher-and-vae")
    teacher_module.check_teachers(load_config(path, [*FLOW, f"model.vae={tmp_path / 'half'}"]))
    teacher_module.check_teachers(load_config(path, [*FLOW, f"model.vae={tmp_path / 'vae'}"]), first=2)


def test_prediction_by_the_answer_to_noise():
    """With images of deviation 0.5, epsilon repeats the noise up to 0.1 of error, and v is a eps - b x_0."""
    context, generator = torch.zeros(1, 3, 2), torch.Generator().manual_seed(0)

    def error(x):
        return torch.randn(x.shape, generator=generator)

    answers = {
        "epsilon": lambda x, t, c: x + 0.1 * error(x), "v_prediction": lambda x, t, c: 0.068 * x - 0.998 * 0.5 * error(x),
        "": lambda x, t, c: x + error(x),
    }  # fmt: skip
    for expected, answer in answers.items():
        assert prediction_of(answer, SD15_SCHEDULER, context, 4) == expected


def test_prediction_of_a_trained_base():
    """The demo's base predicts epsilon. Its answers in v, (eps - b x) / a, are recognised too."""
    model = load_model(ModelTable(base=str(MODELS / "base")))
    abar = alphas_cumprod(model.scheduler)[-1]
    context = model.text.encode(model.text.tokenize([""]))

    def in_v(x, t, c):
        return (model.unet(x, t, c) - (1 - abar).sqrt() * x) / abar.sqrt()

    for unet, expected in ((model.unet, "epsilon"), (in_v, "v_prediction")):
        assert prediction_of(unet, model.scheduler, context, 4) == expected


def test_a_file_that_does_not_say_what_it_predicts(tmp_path, monkeypatch):
    """Its answer to noise says it, or the user does. A mark in the file needs no answer."""
    path = tmp_path / "base.safetensors"
    single_file(path, make_small_sd15(tmp_path / "base"))
    table = ModelTable(base=str(path), tokenizer=str(tmp_path / "base"), prediction="flow")
    (note,) = load_model(table).notes
    assert says(note, "note-flow", prediction="epsilon or v_prediction, which it does not say")
    for answer in ("v_prediction", "epsilon"):
        monkeypatch.setattr(teacher_module, "prediction_of", lambda unet, *_, answer=answer: answer * (unet.ops is REFERENCE))
        text = StringIO()
        assert load_teacher(table, TRITON or REFERENCE, Console(file=text, width=9999)).velocity == (answer == "v_prediction")
        assert says(text.getvalue(), "teacher-prediction", base=path, prediction=answer)
    monkeypatch.setattr(teacher_module, "prediction_of", lambda *_: "")
    with refused("teacher-prediction-unknown", base=path):
        load_teacher(table)
    marked = {name: tensor.clone() for name, tensor in load_file(path).items()} | {"v_pred": torch.empty(0)}
    write_safetensors(path, marked)
    text = StringIO()
    assert load_teacher(table, REFERENCE, Console(file=text)).velocity and not text.getvalue()


def test_the_plan_counts_what_earlier_stages_have_moved(base):
    """A teacher shares with the model what nothing has trained yet. `Teacher.share` of the real run says the same."""
    shapes = Shapes.of(load_model(ModelTable(base=str(base))))
    keys = {"optimizer": "lion", "lr": 1e-3}
    stage = stage_of(**keys, teacher="base", train=["unet.mid"])

    def copied(*earlier):
        need = plan_stage(shapes, stage, 32, 1 << 40, TRITON or REFERENCE, moved=moved_by(earlier)).need(4)
        return need.owners["teacher, as far as it is trained"]

    unet = load_model(ModelTable(base=str(base))).unet
    sizes = [sum(4 * p.numel() for name, p in unet.named_parameters() if "mid_block" in name or whole) for whole in (0, 1)]
    assert [copied(), copied(stage_of(**keys, train=["unet.mid"])), copied(stage_of(**keys))] == [sizes[0], sizes[0], sizes[1]]
    assert copied(stage_of(**keys, train=["text_encoder"], reinit=["unet.out"])) > sizes[0]
