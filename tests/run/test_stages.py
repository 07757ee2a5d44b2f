"""What a stage may say: parts by name, new weights, schedules, averages, cadence, carried state, D-Lion's guards, triggers."""

import json
import math
import shutil
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import final, run, same
from tiny import job, make_tiny_model

from fastsd.config.schema import StageTable
from fastsd.errors import UserError
from fastsd.model.formats.load import load_model
from fastsd.model.select import GROUPS, reinitialise, selected
from fastsd.model.weights import diffusers_names
from fastsd.run import checkpoint
from fastsd.run.dlion_monitor import DLionMonitor
from fastsd.storage import read_safetensors
from fastsd.train.optim import DLion
from fastsd.train.schedule import Interval, ema_decay, learning_rate


def stage(**keys) -> StageTable:
    return StageTable(**{"train": ["unet"], "until": 100, "optimizer": "lion", "lr": 1.0} | keys)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def names_of(model, entry: str) -> set[str]:
    """Diffusers' names of what an entry means."""
    (found,) = selected(model, [entry], "train").values()
    return {piece for name in found for piece in (diffusers_names(name) if entry.startswith("unet") else [name])}


def test_every_group_means_something_and_no_more(model):
    everything = names_of(model, "unet")
    assert names_of(model, "unet.attention") == names_of(model, "unet.self_attention") | names_of(model, "unet.cross_attention")
    assert names_of(model, "unet.conv_in") == {"conv_in.weight", "conv_in.bias"}
    outside = {
        "conv_in.weight",
        "conv_in.bias",
        "conv_out.weight",
        "conv_out.bias",
        "conv_norm_out.weight",
        "conv_norm_out.bias",
    }
    thirds = [names_of(model, f"unet.{part}") for part in ("in", "mid", "out")]
    assert set().union(*thirds) == everything - outside - {n for n in everything if n.startswith("time_embedding")}
    assert sum(map(len, thirds)) == len(set().union(*thirds))
    norms = names_of(model, "unet.norms")
    assert norms == {n for n in everything if "norm" in n} and "conv_norm_out.weight" in norms
    for part, groups in GROUPS.items():
        for group in groups:
            assert 0 < len(names_of(model, f"{part}.{group}")) < len(names_of(model, part)), group


@pytest.mark.parametrize(
    "entry, name",
    [("unet.down_blocks.0", "down_blocks.0.resnets.0.conv1.weight"), ("unet.*.attn2.to_q.*", "attn2.to_q.weight"),
     ("unet.*.attn2.to_?.weight", "attn2.to_k.weight"), ("text_encoder.layers.1", "self_attn.q_proj.weight")],
)  # fmt: skip
def test_names_with_and_without_stars(model, entry, name):
    found = names_of(model, entry)
    assert any(other.endswith(name) for other in found) and len(found) < 60
    if entry == "text_encoder.layers.1":
        assert not any(".0." in other or "layers.10" in other for other in found)


@pytest.mark.parametrize(
    "entry, sentence",
    [("unet.middle", "names 'unet.middle', which is no parameter of it; groups are unet.attention"),
     ("unet.down_blocks.7", "which is no parameter of it"),
     ("unet.*.attn1.to_k.*", "to_q and to_k and to_v are one matrix here; name them together"),
     ("text_encoder.layers.1", "which model.clip_skip 1 leaves out; lower clip_skip, or name other layers")],
)  # fmt: skip
def test_parts_that_are_none(tmp_path, model, entry, sentence):
    from fastsd.config.schema import ModelTable

    skipping = load_model(ModelTable(base=model.name, clip_skip=1))
    with pytest.raises(UserError) as error:
        selected(skipping, [entry], "stage 'unet': train")
    assert sentence in str(error.value) and str(error.value).startswith("stage 'unet': train names")


LION = '[[stage]]\nname = "{name}"\ntrain = {train}\nuntil = 3\nbatch = 4\noptimizer = "lion"\nlr = 1e-3\n'


@pytest.mark.parametrize("train", ['["unet.cross_attention"]', '["unet.conv_in", "text_encoder.layers.0"]', '["text_encoder"]'])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_moves_but_what_is_trained(train, precision, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, LION.format(name="one", train=train))
    folder, said = run(path, "sample.prompts=[]", precision=precision)
    moved, still = set(), set()
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before, after = (read_safetensors(root / part / f"{file}.safetensors") for root in (tiny_model, folder / "model"))
        for name in before:
            (still if torch.equal(before[name], after[name]) else moved).add(f"{part}.{name.removeprefix('text_model.')}")
    wanted = {
        '["unet.cross_attention"]': lambda n: ".attn2." in n,
        '["unet.conv_in", "text_encoder.layers.0"]': lambda n: (
            n.startswith(("unet.conv_in", "text_encoder.encoder.layers.0.")) or ".layers.0." in n
        ),
        '["text_encoder"]': lambda n: n.startswith("text_encoder."),
    }[train]
    assert (
        moved
        and all(wanted(name) for name in moved)
        and not any(wanted(n) for n in still if "position" not in n and "token" not in n)
    )
    assert ", 3 steps" in said


def test_frozen_parts_have_no_gradient_and_no_state(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, LION.format(name="one", train='["unet.mid"]'))
    folder, _ = run(path, "sample.prompts=[]")
    state = read_safetensors(checkpoint.checkpoints(folder / "checkpoints")[-1] / "state.safetensors")
    slots = [name for name in state if "/" in name]
    assert slots and all("mid_block" in name for name in slots)


def test_new_weights_depend_on_seed_and_name_alone(model):
    weights = {name: p.detach().clone() for name, p in model.unet.named_parameters()}
    entries = ["unet.conv_in", "unet.norms", "unet.cross_attention"]
    count = reinitialise(model, entries, 7, "reinit")
    first = {name: p.detach().clone() for name, p in model.unet.named_parameters()}
    changed = {name for name in weights if not torch.equal(weights[name], first[name])}
    assert sum(p.numel() for n, p in first.items() if "conv_in." in n or "norm" in n or ".attn2." in n) == count
    assert {"conv_in.weight", "conv_in.bias"} <= changed and not any("resnets.0.conv1" in name for name in changed)
    assert all((p == ("weight" in n)).all() for n, p in first.items() if "norm" in n)
    bound = 1 / math.sqrt(4 * 9)
    conv = first["conv_in.weight"]
    assert conv.abs().max() <= bound and conv.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    reinitialise(model, entries, 7, "reinit")
    assert torch.equal(model.unet.conv_in.weight, conv)
    reinitialise(model, entries, 8, "reinit")
    assert not torch.equal(model.unet.conv_in.weight, conv)


def test_a_stage_starts_parts_again_once(tmp_path, tiny_model, images):
    text = (
        LION.format(name="one", train='["unet"]')
        + 'reinit = ["unet.conv_out", "text_encoder.layers.1"]\ncheckpoint_every = 1\n'
    )
    whole, said = run(job(tmp_path / "a", tiny_model, images, text) if (tmp_path / "a").mkdir() is None else None)
    assert "start from new random weights (unet.conv_out, text_encoder.layers.1)" in said
    (tmp_path / "b").mkdir()
    path = job(tmp_path / "b", tiny_model, images, text)
    run(path, "stage.until=1")
    again, said = run(path)
    assert "new random weights" not in said and same(final(again), final(whole))
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    before, after = (read_safetensors(root / "text_encoder/model.safetensors") for root in (tiny_model, whole / "model"))
    name = next(n for n in before if n.endswith("layers.1.mlp.fc1.weight"))
    assert not torch.equal(before[name], after[name])


def lr(step: int, total: int = 100, **keys) -> float:
    return learning_rate(stage(**keys), step, total, "unet")


def test_schedules_follow_their_formulas():
    for step in range(0, 100, 7):
        x = step / 100
        assert lr(step, schedule="linear") == pytest.approx(1 - x)
        assert lr(step, schedule="cosine") == pytest.approx(0.5 + 0.5 * math.cos(math.pi * x))
        assert lr(step, schedule="rex") == pytest.approx((1 - x) / (0.5 + 0.5 * (1 - x)))
        assert lr(step, schedule="cosine", lr_floor=0.1) == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * x)))
        assert lr(step) == 1.0


def test_warm_up_then_the_schedule_from_its_top():
    for schedule in ("linear", "cosine", "rex"):
        curve = [lr(step, schedule=schedule, warmup=0.1) for step in range(100)]
        assert curve[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert curve[10] == 1.0 and all(a > b for a, b in pairwise(curve[10:])) and 0 < curve[-1] < 0.05
    assert lr(99, schedule="linear", lr_floor=0.25, warmup=20) == pytest.approx(0.25 + 0.75 / 80)


def test_restarts_are_equal_cycles():
    curve = [lr(step, schedule="cosine", restarts=3, warmup=20) for step in range(100)]
    assert [i for i, value in enumerate(curve) if value == 1.0] == [19, 20, 40, 60, 80]
    assert curve[20:40] == pytest.approx(curve[80:])


def test_decay_of_the_average():
    assert [ema_decay(stage(ema=0.99), n) for n in (0, 5)] == [0.99, 0.99]
    warm = [ema_decay(stage(ema=0.99, ema_power=2 / 3), n) for n in range(20000)]
    assert warm[0] == pytest.approx(1 - 2 ** (-2 / 3)) and warm[-1] == 0.99 and warm == sorted(warm)
    assert [ema_decay(stage(ema=0.99, ema_after=3), n) for n in range(5)] == [0, 0, 0, 0.99, 0.99]


def test_cadence_in_steps_epochs_and_seconds():
    def steps(amount, batch=4, epoch=10):
        every = Interval("sample_every", amount, batch, epoch)
        return [step for step in range(1, 16) if every.due(step, step * 10.0)]

    assert steps(5) == [5, 10, 15] and steps(0) == []
    assert steps("1e") == [3, 5, 8, 10, 13, 15]  # the first steps with 10, 20, 30, ... images done
    assert steps("0.5e") == [2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15]
    assert steps("30s") == [3, 6, 9, 12, 15] and steps("1m") == [6, 12]


CHAIN = """
[[stage]]
name = "one"
train = ["unet"]
until = {first}
batch = 4
optimizer = "{optimizer}"
{more}
[[stage]]
name = "two"
train = ["unet"]
until = {second}
batch = 4
optimizer = "{optimizer}"
state = "{state}"
checkpoint_every = 2
{more}
"""
MORE = {"dlion": "d0 = 1e-4", "lion": "lr = 1e-3", "adamw": "lr = 1e-3"}


def chain(
    folder: Path, model: Path, images: Path, *overrides: str, optimizer="dlion", state="carry", more=""
) -> tuple[Path, str]:
    folder.mkdir()
    more = f"{MORE[optimizer]}\n{more}"
    text = CHAIN.format(first=4, second=6, optimizer=optimizer, state=state, more=more)
    return run(job(folder, model, images, text), "sample.prompts=[]", *overrides)


@pytest.mark.parametrize("optimizer", MORE)
def test_carried_state_is_as_one_long_stage(optimizer, tmp_path, tiny_model, images):
    more = "ema = 0.9\nema_power = 0.75"
    carried, said = chain(tmp_path / "two", tiny_model, images, optimizer=optimizer, more=more)
    assert "two: fp32" in said and "optimizer state: carried over from the stage before" in said
    (tmp_path / "one").mkdir()
    text = f'[[stage]]\ntrain = ["unet"]\nuntil = 10\nbatch = 4\noptimizer = "{optimizer}"\n{MORE[optimizer]}\n{more}\n'
    whole, _ = run(job(tmp_path / "one", tiny_model, images, text), "sample.prompts=[]")
    assert same(final(carried), final(whole))


def test_state_begins_anew_unless_carried(tmp_path, tiny_model, images):
    longer = "stage.one.until=10", "data.resolution=32"
    carried, _ = chain(tmp_path / "carry", tiny_model, images, *longer)
    reset, said = chain(tmp_path / "reset", tiny_model, images, *longer, state="reset")
    assert "optimizer state: begins anew" in said
    rows = [json.loads(line) for line in (reset / "log.jsonl").read_text().splitlines()]
    assert rows[10]["d"] == 1e-4 < rows[9]["d"]
    assert not same(final(carried), final(reset))


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_carried_state_survives_a_stop(stop, tmp_path, tiny_model, images):
    whole, _ = chain(tmp_path / "whole", tiny_model, images, more="ema = 0.9")
    cut, _ = chain(tmp_path / "cut", tiny_model, images, more="ema = 0.9")
    for path in checkpoint.checkpoints(cut / "checkpoints"):
        if int(path.name[5:]) > stop:
            shutil.rmtree(path)
    if stop == 2:  # within the first stage nothing was saved: from the start
        assert not checkpoint.checkpoints(cut / "checkpoints")
    again, _ = run(tmp_path / "cut" / "job.toml", "sample.prompts=[]")
    assert same(final(again), final(whole))
    assert (again / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()


def test_each_stage_starts_where_the_former_ended(tmp_path, tiny_model, images):
    text = "".join(LION.format(name=n, train=t) for n, t in (("u", '["unet"]'), ("t", '["text_encoder"]'), ("v", '["unet"]')))
    folder, _ = run(job(tmp_path, tiny_model, images, text), "sample.prompts=[]")
    ends = checkpoint.checkpoints(folder / "checkpoints")
    assert [path.name for path in ends] == ["step-00000003", "step-00000006", "step-00000009"]

    def weights(path, part, file="diffusion_pytorch_model"):
        return read_safetensors(path / part / f"{file}.safetensors")

    assert same(weights(ends[0], "unet"), weights(ends[1], "unet")) and not same(
        weights(ends[1], "unet"), weights(ends[2], "unet")
    )
    texts = [weights(path, "text_encoder", "model") for path in (tiny_model, *ends)]
    assert same(texts[0], texts[1]) and not same(texts[1], texts[2]) and same(texts[2], texts[3])


def test_a_stage_may_end_by_the_clock(tmp_path, tiny_model, images, monkeypatch):
    looks = count()  # whoever looks at the clock finds it an eighth of a second later
    monkeypatch.setattr("fastsd.run.position.time", SimpleNamespace(monotonic=lambda: next(looks) / 8))
    text = LION.format(name="one", train='["unet"]').replace("until = 3", 'until = "2s"') + 'sample_every = "1s"\n'
    text += LION.format(name="two", train='["unet"]')
    folder, said = run(job(tmp_path, tiny_model, images, text))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    first = [row for row in rows if row["stage"] == "one"]
    assert first and rows[-1]["stage"] == "two" and rows[-1]["stage_step"] == 3
    assert json.loads((checkpoint.checkpoints(folder / "checkpoints")[0] / "state.json").read_text())["seconds"] >= 2
    assert "one 1 | epoch" in said and len(list((folder / "samples").glob("one-*.png"))) >= 2
    _, said = run(tmp_path / "job.toml")
    assert "resumed" in said and "one " not in said.split("stages")[1].split("model:")[0].split("\n", 2)[2]


def test_checkpoints_with_a_name_stay(tmp_path, tiny_model, images):
    text = LION.format(name="one", train='["unet"]').replace("until = 3", 'until = "4e"')
    text += 'checkpoint_every = 1\nkeep_checkpoints = 1\ncheckpoint_at = ["1e", 9]\n'  # 21 images: 6 steps of 4 for the first
    folder, _ = run(job(tmp_path, tiny_model, images, text), "sample.prompts=[]")
    kept = [int(path.name[5:]) for path in checkpoint.checkpoints(folder / "checkpoints")]
    assert kept == [6, 9, 21]


def test_triggers_ask_for_a_checkpoint_and_samples(tmp_path, tiny_model, images, monkeypatch):
    from fastsd.run import loop

    class Touching(loop.Triggers):
        def log(self):
            if self.run.position.progress.step == 5:
                (self.run.folder / "trigger.checkpoint").touch()
                (self.run.folder / "trigger.sample").touch()
            if self.run.position.progress.step == 7:  # what is no file asks for nothing, and stops nothing
                (self.run.folder / "trigger.sample").mkdir()
            return super().log()

    monkeypatch.setattr(loop, "Triggers", Touching)
    text = LION.format(name="one", train='["unet"]').replace("until = 3", "until = 12") + "keep_checkpoints = 1\n"
    folder, _ = run(job(tmp_path, tiny_model, images, text))
    assert [int(path.name[5:]) for path in checkpoint.checkpoints(folder / "checkpoints")] == [5, 12]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["one-00000005.png", "one-00000012.png"]
    assert [path.is_dir() for path in folder.glob("trigger.*")] == [True]


def test_runs_that_differ_in_one_thing_see_the_same(tmp_path, tiny_model, images):
    def seen(name, *overrides):
        (tmp_path / name).mkdir()
        text = LION.format(name="one", train='["unet"]').replace("until = 3", "until = 8") + "caption_dropout = 0.1\n"
        folder, _ = run(job(tmp_path / name, tiny_model, images, text), *overrides)
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [[row[key] for key in ("order", "timesteps", "noise")] for row in rows], [row["loss"] for row in rows]

    base, loss = seen("base")
    for change in (
        "stage.lr=2e-3",
        "stage.caption_dropout=0.5",
        "model.clip_skip=1",
        "stage.optimizer=adamw",
        "stage.micro_batch=2",
    ):
        other, other_loss = seen(change.split("=")[0], change)
        assert other == base, change
        assert other_loss != loss
    assert seen("seed", "seed=1")[0] != base
    assert all(a != b for row, after in pairwise(base) for a, b in zip(row, after, strict=True))


def problem(seed: int = 0, size: int = 64):
    """A quadratic, its parameter 1 away from the best in every coordinate."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.ones(size)), torch.rand(size, generator=generator) + 0.5


def d_of(steps: int, freeze_after: int | None = None, **guards) -> list[float]:
    weight, scale = problem()
    optimizer, found = DLion([weight], d0=1e-6, **guards), []
    for step in range(steps):
        weight.grad = (scale * weight).detach()
        if freeze_after is not None:
            optimizer.frozen = torch.tensor(step >= freeze_after)
        optimizer.step()
        found.append(optimizer.d())
    return found


def test_guards_of_d():
    free = d_of(60)
    assert max(b / a for a, b in pairwise(free)) > 1.05 and free[-1] > 1e-5
    slow = d_of(60, growth_rate=1.02)
    assert all(b <= a * 1.02 * (1 + 1e-12) for a, b in pairwise(slow)) and slow[-1] > slow[0]
    assert max(d_of(60, d_max=5e-6)) == 5e-6 and d_of(60, d_max=1.0) == free
    frozen = d_of(60, freeze_after=20)
    assert frozen[:20] == free[:20] and set(frozen[19:]) == {free[19]}
    for key, value in (("growth_rate", 1.0), ("d_max", 1e-9)):
        with pytest.raises(ValueError, match=key):
            d_of(1, **{key: value})


def test_guards_from_a_config(tmp_path, tiny_model, images):
    def d(name, more):
        (tmp_path / name).mkdir()
        text = f'[[stage]]\ntrain = ["unet"]\nuntil = 12\nbatch = 4\nd0 = 1e-5\n{more}\n'
        folder, _ = run(job(tmp_path / name, tiny_model, images, text), "sample.prompts=[]", "data.resolution=32")
        return [json.loads(line)["d"] for line in (folder / "log.jsonl").read_text().splitlines()]

    free = d("free", "")
    assert free[-1] > 2e-5
    frozen = d("frozen", "freeze_d_after = 5")
    assert frozen[:5] == free[:5] and len(set(frozen[5:])) == 1
    assert max(d("top", "d_max = 2e-5")) == 2e-5


def test_d_is_watched():
    dlion = StageTable(train=["unet"], until=1000, d0=1e-6)
    watch = DLionMonitor("unet", dlion)
    assert not any(watch.row(step, 1e-6) for step in range(10, 200, 10))
    (warning,) = watch.row(200, 1e-6)
    assert "still d0 = 1e-06 after 200 steps" in warning and not watch.row(210, 1e-6)
    rising = [{"stage_step": step, "d": min(1e-6 * 1.1**step, 5e-4)} for step in range(10, 400, 10)]
    watch = DLionMonitor("unet", dlion, rising)
    assert not watch.row(400, 5e-4) and not watch.row(410, 5.2e-4)
    (warning,) = watch.row(420, 6e-4)
    assert "d of unet rises again, from 0.0005 to 0.0006 in step 420" in warning and "d_max = 0.0005" in warning
    assert not watch.row(430, 9e-4)  # told once a plateau
