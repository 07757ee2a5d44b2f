"""Stage settings: trained names, new weights, schedules, EMA, intervals, carried state, limits of D-Lion's d, triggers."""

import json
import math
import re
from io import StringIO
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import checkpoint_steps, final, rewind, rows_of, run, same
from safetensors.torch import load_file
from sentences import refused, says, sentence
from tiny import job, make_tiny_model

from fastsd.commands.check import check
from fastsd.config.schema import ModelTable, StageTable, load_config
from fastsd.model.formats.load import load_model
from fastsd.model.select import GROUPS, reinitialise, selected
from fastsd.model.weights import diffusers_names
from fastsd.run import checkpoint
from fastsd.run.checkpoint import RunProgress
from fastsd.run.dlion_monitor import DLionMonitor
from fastsd.run.position import Position
from fastsd.terminal.console import Console
from fastsd.train.optim import DLion
from fastsd.train.schedule import Interval, ema_decay, learning_rate


def stage(**keys) -> StageTable:
    return StageTable(**{"train": ["unet"], "until": 100, "optimizer": "lion", "lr": 1.0} | keys)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def names_of(model, entry: str) -> set[str]:
    """Return the diffusers names of the parameters that an entry selects."""
    (names,) = selected(model, [entry], "train").values()
    return {n for name in names for n in (diffusers_names(name) if entry.startswith("unet") else [name])}


def test_groups_select_the_expected_parameters(model):
    everything = names_of(model, "unet")
    assert names_of(model, "unet.attention") == names_of(model, "unet.self_attention") | names_of(model, "unet.cross_attention")
    assert names_of(model, "unet.conv_in") == {"conv_in.weight", "conv_in.bias"}
    outside = {f"{layer}.{kind}" for layer in ("conv_in", "conv_out", "conv_norm_out") for kind in ("weight", "bias")}
    thirds = [names_of(model, f"unet.{third}") for third in ("in", "mid", "out")]
    assert set().union(*thirds) == everything - outside - {n for n in everything if n.startswith("time_embedding")}
    assert sum(map(len, thirds)) == len(set().union(*thirds))
    norms = names_of(model, "unet.norms")
    assert norms == {n for n in everything if "norm" in n} and "conv_norm_out.weight" in norms
    for component, groups in GROUPS.items():
        for group in groups:
            assert 0 < len(names_of(model, f"{component}.{group}")) < len(names_of(model, component)), group


@pytest.mark.parametrize(
    "entry, name",
    [
        ("unet.down_blocks.0", "down_blocks.0.resnets.0.conv1.weight"),
        ("unet.*.attn2.to_q.*", "attn2.to_q.weight"),
        ("unet.*.attn2.to_?.weight", "attn2.to_k.weight"),
        ("text_encoder.layers.1", "self_attn.q_proj.weight"),
    ],
)
def test_names_and_wildcards_select_parameters(model, entry, name):
    names = names_of(model, entry)
    assert any(other.endswith(name) for other in names) and len(names) < 60
    if entry == "text_encoder.layers.1":
        assert not any(".0." in other or "layers.10" in other for other in names)


@pytest.mark.parametrize(
    "entry, code, facts",
    [
        ("unet.middle", "selected-nothing", ["'unet.middle'", "unet.attention"]),
        ("unet.down_blocks.7", "selected-nothing", ["'unet.down_blocks.7'"]),
        ("unet.*.attn1.to_k.*", "selected-within-fused", ["to_q", "to_k", "to_v"]),
        ("text_encoder.layers.1", "selected-skipped", ["model.clip_skip", "1"]),
    ],
)
def test_names_that_select_nothing_are_refused(model, entry, code, facts):
    skipping = load_model(ModelTable(base=model.name, clip_skip=1))
    with refused(code) as error:
        selected(skipping, [entry], "stage 'unet': train")
    assert all(fact in str(error.value) for fact in facts) and str(error.value).startswith("stage 'unet': train")


LION = '[[stage]]\nname = "{name}"\ntrain = {train}\nuntil = 3\nbatch = 4\noptimizer = "lion"\nlr = 1e-3\n'


@pytest.mark.slow
@pytest.mark.parametrize("train", ['["unet.cross_attention"]', '["unet.conv_in", "text_encoder.layers.0"]', '["text_encoder"]'])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_trained_parameters_change(train, precision, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, LION.format(name="one", train=train))
    folder, text = run(path, "sample.prompts=[]", precision=precision)
    changed, unchanged = set(), set()
    for component, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before, after = (load_file(root / component / f"{file}.safetensors") for root in (tiny_model, folder / "model"))
        for name in before:
            names = unchanged if torch.equal(before[name], after[name]) else changed
            names.add(f"{component}.{name.removeprefix('text_model.')}")
    is_trained = {
        '["unet.cross_attention"]': lambda n: ".attn2." in n,
        '["unet.conv_in", "text_encoder.layers.0"]': lambda n: n.startswith("unet.conv_in") or ".layers.0." in n,
        '["text_encoder"]': lambda n: n.startswith("text_encoder."),
    }[train]
    assert changed and all(map(is_trained, changed))
    assert not any(is_trained(n) for n in unchanged if "position" not in n and "token" not in n)
    assert says(text, "stage-length", stage="one", steps=3)


def test_frozen_parameters_have_no_optimizer_state(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, LION.format(name="one", train='["unet.mid"]'))
    folder, _ = run(path, "sample.prompts=[]")
    state = load_file(checkpoint.checkpoints(folder / "checkpoints")[-1] / "state.safetensors")
    names = [name for name in state if "/" in name]
    assert names and all("mid_block" in name for name in names)


def test_reinitialised_weights_depend_on_seed_and_name_only(model):
    weights = {name: p.detach().clone() for name, p in model.unet.named_parameters()}
    entries = ["unet.conv_in", "unet.norms", "unet.cross_attention"]
    count = reinitialise(model, entries, 7, "reinit")
    drawn = {name: p.detach().clone() for name, p in model.unet.named_parameters()}
    changed = {name for name in weights if not torch.equal(weights[name], drawn[name])}
    assert sum(p.numel() for n, p in drawn.items() if "conv_in." in n or "norm" in n or ".attn2." in n) == count
    assert {"conv_in.weight", "conv_in.bias"} <= changed and not any("resnets.0.conv1" in name for name in changed)
    assert all((p == ("weight" in n)).all() for n, p in drawn.items() if "norm" in n)
    bound = 1 / math.sqrt(4 * 9)
    conv = drawn["conv_in.weight"]
    assert conv.abs().max() <= bound and conv.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    reinitialise(model, entries, 7, "reinit")
    assert torch.equal(model.unet.conv_in.weight, conv)
    reinitialise(model, entries, 8, "reinit")
    assert not torch.equal(model.unet.conv_in.weight, conv)


def test_parameters_are_reinitialised_once(tmp_path, tiny_model, images):
    stages = LION.format(name="one", train='["unet"]')
    stages += 'reinit = ["unet.conv_out", "text_encoder.layers.1"]\ncheckpoint_every = 1\n'
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    uninterrupted, text = run(job(tmp_path / "a", tiny_model, images, stages))
    assert says(text, "parameters-reinitialised", names="unet.conv_out, text_encoder.layers.1")
    path = job(tmp_path / "b", tiny_model, images, stages)
    run(path, "stage.until=1")
    resumed, text = run(path)
    assert not says(text, "parameters-reinitialised") and same(final(resumed), final(uninterrupted))
    before, after = (load_file(root / "text_encoder/model.safetensors") for root in (tiny_model, uninterrupted / "model"))
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


def test_schedule_starts_after_the_warmup():
    for schedule in ("linear", "cosine", "rex"):
        curve = [lr(step, schedule=schedule, warmup=0.1) for step in range(100)]
        assert curve[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert curve[10] == 1.0 and all(a > b for a, b in pairwise(curve[10:])) and 0 < curve[-1] < 0.05
    assert lr(99, schedule="linear", lr_floor=0.25, warmup=20) == pytest.approx(0.25 + 0.75 / 80)


def test_a_warmup_longer_than_its_stage_is_refused(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, LION.format(name="one", train='["unet"]'))
    keys = ["sample.prompts=[]", "stage.one.until=1e", "stage.one.warmup=7"]  # 21 images: 6 steps of 4
    fields = {"stage": "'one'", "warmup": 7, "total": 6, "until": "'1e'", "epoch": 21}
    with refused("warmup-too-long", **fields):
        run(path, *keys)
    with refused("check-problems") as error:
        check(load_config(path, keys), Console(file=StringIO()))
    assert str(error.value) == sentence("warmup-too-long", **fields)
    folder, _ = run(path, *keys, "stage.one.warmup=6")
    assert len(rows_of(folder)) == 6


def test_restarts_are_equal_cycles():
    curve = [lr(step, schedule="cosine", restarts=3, warmup=20) for step in range(100)]
    assert [i for i, value in enumerate(curve) if value == 1.0] == [19, 20, 40, 60, 80]
    assert curve[20:40] == pytest.approx(curve[80:])


def test_ema_decay():
    assert [ema_decay(stage(ema=0.99), n) for n in (0, 5)] == [0.99, 0.99]
    warm = [ema_decay(stage(ema=0.99, ema_power=2 / 3), n) for n in range(20000)]
    assert warm[0] == pytest.approx(1 - 2 ** (-2 / 3)) and warm[-1] == 0.99 and warm == sorted(warm)
    assert [ema_decay(stage(ema=0.99, ema_after=3), n) for n in range(5)] == [0, 0, 0, 0.99, 0.99]


def test_intervals_in_steps_epochs_and_seconds():
    def steps(amount, batch=4, epoch=10):
        interval = Interval("sample_every", amount, batch, epoch)
        return [step for step in range(1, 16) if interval.due(step, step * 10.0)]

    assert steps(5) == [5, 10, 15] and steps(0) == []
    assert steps("1e") == [3, 5, 8, 10, 13, 15]  # the first steps with 10, 20, 30, ... images done
    assert steps("0.5e") == [2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15]
    assert steps("30s") == [3, 6, 9, 12, 15] and steps("1m") == [6, 12]


TWO_STAGES = """
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
OPTIONS = {"dlion": "d0 = 1e-4", "lion": "lr = 1e-3", "adamw": "lr = 1e-3"}


def run_two_stages(
    folder: Path, model: Path, images: Path, *overrides: str, optimizer="dlion", state="carry", more=""
) -> tuple[Path, str]:
    folder.mkdir()
    more = f"{OPTIONS[optimizer]}\n{more}"
    text = TWO_STAGES.format(first=4, second=6, optimizer=optimizer, state=state, more=more)
    return run(job(folder, model, images, text), "sample.prompts=[]", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIONS)
def test_carried_state_equals_one_long_stage(optimizer, tmp_path, tiny_model, images):
    more = "ema = 0.9\nema_power = 0.75"
    carried, text = run_two_stages(tmp_path / "two", tiny_model, images, optimizer=optimizer, more=more)
    assert "two: fp32" in text and says(text, "state-carried")
    (tmp_path / "one").mkdir()
    stage = f'[[stage]]\ntrain = ["unet"]\nuntil = 10\nbatch = 4\noptimizer = "{optimizer}"\n{OPTIONS[optimizer]}\n{more}\n'
    single, _ = run(job(tmp_path / "one", tiny_model, images, stage), "sample.prompts=[]")
    assert same(final(carried), final(single))


@pytest.mark.slow
def test_state_is_reset_unless_carried(tmp_path, tiny_model, images):
    longer = "stage.one.until=10", "data.resolution=32"
    carried, _ = run_two_stages(tmp_path / "carry", tiny_model, images, *longer)
    reset, text = run_two_stages(tmp_path / "reset", tiny_model, images, *longer, state="reset")
    assert says(text, "state-reset")
    rows = rows_of(reset)
    assert rows[10]["d"] == 1e-4 < rows[9]["d"]
    assert not same(final(carried), final(reset))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 4, 6])
def test_carried_state_survives_a_stop(stop, tmp_path, tiny_model, images):
    uninterrupted, _ = run_two_stages(tmp_path / "uninterrupted", tiny_model, images, more="ema = 0.9")
    stopped, _ = run_two_stages(tmp_path / "stopped", tiny_model, images, more="ema = 0.9")
    rewind(stopped, stop)
    if stop == 2:  # the first stage saves nothing before its end, so the run starts again
        assert not checkpoint_steps(stopped)
    resumed, _ = run(tmp_path / "stopped" / "job.toml", "sample.prompts=[]")
    assert same(final(resumed), final(uninterrupted))
    assert (resumed / "log.jsonl").read_text() == (uninterrupted / "log.jsonl").read_text()


def test_each_stage_starts_from_the_previous_weights(tmp_path, tiny_model, images):
    text = "".join(LION.format(name=n, train=t) for n, t in (("u", '["unet"]'), ("t", '["text_encoder"]'), ("v", '["unet"]')))
    folder, _ = run(job(tmp_path, tiny_model, images, text), "sample.prompts=[]")
    ends = checkpoint.checkpoints(folder / "checkpoints")
    assert [path.name for path in ends] == ["step-00000003", "step-00000006", "step-00000009"]

    unets = [load_file(path / "unet/diffusion_pytorch_model.safetensors") for path in ends]
    assert same(unets[0], unets[1]) and not same(unets[1], unets[2])
    texts = [load_file(path / "text_encoder/model.safetensors") for path in (tiny_model, *ends)]
    assert same(texts[0], texts[1]) and not same(texts[1], texts[2]) and same(texts[2], texts[3])


def test_the_end_by_time_is_that_of_the_latest_step(monkeypatch):
    """All ranks read it from the checkpoint, and none looks at its own clock."""
    stage = StageTable(train=["unet"], until="10s", batch=1)
    for seconds, ended in ((9.9, False), (10.1, True)):
        progress = RunProgress(stage_step=3, step=3, stage_done=True, seconds=seconds)
        position = Position(progress, [stage], [100], extendable=True)
        monkeypatch.setattr("fastsd.run.position.time", SimpleNamespace(monotonic=lambda: 1e9))
        assert position.at_end(0) == position.finished(0) == ended


def test_a_stage_can_end_by_time(tmp_path, tiny_model, images, monkeypatch):
    calls = count()  # the clock advances by an eighth of a second per call
    monkeypatch.setattr("fastsd.run.position.time", SimpleNamespace(monotonic=lambda: next(calls) / 8))
    stages = LION.format(name="one", train='["unet"]').replace("until = 3", 'until = "2s"') + 'sample_every = "1s"\n'
    stages += LION.format(name="two", train='["unet"]')
    folder, text = run(job(tmp_path, tiny_model, images, stages))
    rows = rows_of(folder)
    assert any(row["stage"] == "one" for row in rows) and rows[-1]["stage"] == "two" and rows[-1]["stage_step"] == 3
    assert json.loads((checkpoint.checkpoints(folder / "checkpoints")[0] / "state.json").read_text())["seconds"] >= 2
    assert says(text, "log-row", stage="one", step=1) and len(list((folder / "samples").glob("one-*.png"))) >= 2
    _, text = run(tmp_path / "job.toml")
    assert says(text, "run-resumed") and not re.search("^one[: ]", text, re.MULTILINE)


@pytest.mark.slow
def test_checkpoints_in_checkpoint_at_are_kept(tmp_path, tiny_model, images):
    text = LION.format(name="one", train='["unet"]').replace("until = 3", 'until = "4e"')
    text += 'checkpoint_every = 1\nkeep_checkpoints = 1\ncheckpoint_at = ["1e", 9]\n'  # 21 images: 6 steps of 4 for the first
    folder, _ = run(job(tmp_path, tiny_model, images, text), "sample.prompts=[]")
    assert checkpoint_steps(folder) == [6, 9, 21]


def test_trigger_files_request_a_checkpoint_and_samples(tmp_path, tiny_model, images, monkeypatch):
    from fastsd.run import loop

    class TouchesTriggerFiles(loop.Triggers):
        def after_step(self):
            if self.run.position.progress.step == 5:
                (self.run.folder / "trigger.checkpoint").touch()
                (self.run.folder / "trigger.sample").touch()
            if self.run.position.progress.step == 7:  # a folder of that name requests nothing
                (self.run.folder / "trigger.sample").mkdir()
            return super().after_step()

    monkeypatch.setattr(loop, "Triggers", TouchesTriggerFiles)
    text = LION.format(name="one", train='["unet"]').replace("until = 3", "until = 12") + "keep_checkpoints = 1\n"
    folder, _ = run(job(tmp_path, tiny_model, images, text))
    assert checkpoint_steps(folder) == [5, 12]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["one-00000005.png", "one-00000012.png"]
    assert [path.is_dir() for path in folder.glob("trigger.*")] == [True]


@pytest.mark.slow
def test_runs_with_one_changed_setting_see_the_same_data(tmp_path, tiny_model, images):
    def data_and_losses(name, *overrides):
        (tmp_path / name).mkdir()
        text = LION.format(name="one", train='["unet"]').replace("until = 3", "until = 8") + "caption_dropout = 0.1\n"
        folder, _ = run(job(tmp_path / name, tiny_model, images, text), *overrides)
        rows = rows_of(folder)
        return [[row[key] for key in ("order", "timesteps", "noise")] for row in rows], [row["loss"] for row in rows]

    base, base_losses = data_and_losses("base")
    values = {"lr": 2e-3, "caption_dropout": 0.5, "optimizer": "adamw", "micro_batch": 2}
    for change in ("model.clip_skip=1", *(f"stage.{key}={value}" for key, value in values.items())):
        data, losses = data_and_losses(change.split("=")[0], change)
        assert data == base, change
        assert losses != base_losses
    assert data_and_losses("seed", "seed=1")[0] != base
    for row, next_row in pairwise(base):
        assert all(a != b for a, b in zip(row, next_row, strict=True))


def quadratic(seed: int = 0, size: int = 64):
    """Return the parameter and the curvatures of a quadratic whose minimum is at 0. The parameter is 1 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.ones(size)), torch.rand(size, generator=generator) + 0.5


def d_after_each_step(steps: int, freeze_after: int | None = None, **limits) -> list[float]:
    weight, scale = quadratic()
    optimizer, values = DLion([weight], d0=1e-6, **limits), []
    for step in range(steps):
        weight.grad = (scale * weight).detach()
        if freeze_after is not None:
            optimizer.frozen = torch.tensor(step >= freeze_after)
        optimizer.step()
        values.append(optimizer.d())
    return values


def test_limits_of_d():
    free = d_after_each_step(60)
    assert max(b / a for a, b in pairwise(free)) > 1.05 and free[-1] > 1e-5
    slow = d_after_each_step(60, growth_rate=1.02)
    assert all(b <= a * 1.02 * (1 + 1e-12) for a, b in pairwise(slow)) and slow[-1] > slow[0]
    assert max(d_after_each_step(60, d_max=5e-6)) == 5e-6 and d_after_each_step(60, d_max=1.0) == free
    frozen = d_after_each_step(60, freeze_after=20)
    assert frozen[:20] == free[:20] and set(frozen[19:]) == {free[19]}
    for key, value in (("growth_rate", 1.0), ("d_max", 1e-9)):
        with pytest.raises(ValueError, match=key):
            d_after_each_step(1, **{key: value})


@pytest.mark.slow
def test_limits_of_d_from_a_config(tmp_path, tiny_model, images):
    def d(name, more):
        (tmp_path / name).mkdir()
        text = f'[[stage]]\ntrain = ["unet"]\nuntil = 12\nbatch = 4\nd0 = 1e-5\n{more}\n'
        folder, _ = run(job(tmp_path / name, tiny_model, images, text), "sample.prompts=[]", "data.resolution=32")
        return [row["d"] for row in rows_of(folder)]

    free = d("free", "")
    assert free[-1] > 2e-5
    frozen = d("frozen", "freeze_d_after = 5")
    assert frozen[:5] == free[:5] and len(set(frozen[5:])) == 1
    assert max(d("top", "d_max = 2e-5")) == 2e-5


def test_warnings_about_d():
    dlion = StageTable(train=["unet"], until=1000, d0=1e-6)
    monitor = DLionMonitor("unet", dlion)
    assert not any(monitor.row(step, 1e-6) for step in range(10, 200, 10))
    (warning,) = monitor.row(200, 1e-6)
    assert says(warning, "d-stuck", component="unet", d0="1e-06", steps=200) and not monitor.row(210, 1e-6)
    rising = [{"stage_step": step, "d": min(1e-6 * 1.1**step, 5e-4)} for step in range(10, 400, 10)]
    monitor = DLionMonitor("unet", dlion, rising)
    assert not monitor.row(400, 5e-4) and not monitor.row(410, 5.2e-4)
    (warning,) = monitor.row(420, 6e-4)
    assert says(warning, "d-rises", component="unet", before=0.0005, after=0.0006, step=420, d_max=0.0005)
    assert not monitor.row(430, 9e-4)  # one warning per plateau


@pytest.mark.parametrize("plateau, step, warns", [(99, 199, False), (100, 200, True), (199, 1000, False), (200, 1000, True)])
def test_a_rise_of_d_is_reported_after_a_plateau_of_a_fifth_of_the_steps(plateau, step, warns):
    dlion = StageTable(train=["unet"], until=1000, d0=1e-6)
    monitor = DLionMonitor("unet", dlion)
    assert not monitor.row(step - plateau, 2e-6) and not monitor.row(step - 1, 2e-6 * 1.1)
    assert len(monitor.row(step, 2e-6 * 1.11)) == warns
    # The first growth above d0 is no rise after a plateau.
    monitor = DLionMonitor("unet", dlion)
    assert not monitor.row(1, 1e-6) and not monitor.row(900, 5e-6)


def test_warnings_about_d_follow_the_component_of_a_row():
    dlion = StageTable(train=["unet", "text_encoder"], until=1000, d0=1e-6)
    rows = [{"stage_step": 10, "d": 1e-5, "d_text_encoder": 1e-6}, {"stage_step": 200, "d": 1e-5, "d_text_encoder": 1e-6}]
    # The second component has been reported before the run was stopped, and the first has grown.
    for component in ("unet", "text_encoder"):
        assert not DLionMonitor(component, dlion, rows).row(210, 1e-6 if component == "text_encoder" else 1e-5)
    assert len(DLionMonitor("text_encoder", dlion, rows[:1]).row(210, 1e-6)) == 1
