"""`fastsd bench`: contenders do the same work in turn, planted waits are found, what is wrong gets one sentence."""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commandline import STAGE, fastsd
from tiny import job

from fastsd.bench import baselines, counters, options, suites, timing
from fastsd.bench.counters import COPY, SCALAR, SHAPE, host_waits
from fastsd.commands.cache import cache
from fastsd.config.schema import StageTable, load_config
from fastsd.errors import UserError
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.weights import diffusers_state_dict
from fastsd.train.graph import WARM_UP
from fastsd.train.objective import Objective, alphas_cumprod
from fastsd.train.precision import choose_ops
from fastsd_kernels import workload

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `fastsd bench` on the CPU, words split at spaces: (its output, its figures), or for `code` 2 its error."""
    monkeypatch.setattr("fastsd.train.precision.INTERPRETED", False)
    file = tmp_path / "figures.json"

    def call(*words, code=0):
        split = [part for word in words for part in (word.split() if isinstance(word, str) else [word])]
        found, out, err = fastsd("bench", *split, "--json", file, monkeypatch=monkeypatch, capsys=capsys)
        assert found == code, err
        if code:
            assert "Traceback" not in err + out and len(err.strip().splitlines()) == 1
            return err
        return out, json.loads(file.read_text())

    return call


def work(device: str = "cpu", **stage) -> baselines.BenchInputs:
    """A small model and made batches, for contenders."""
    where = torch.device(device)
    table = StageTable(**{"train": ["unet"], "until": 9, "batch": 4, **stage})
    model = baselines.made_model(baselines.SMALL, choose_ops("auto", where))
    for module in (model.unet, model.text.module):
        module.to(where)
    model.unet.checkpointing = table.checkpointing
    return baselines.BenchInputs(model, table, baselines.made_batches(4, 8, table.batch), where)


def test_bench_step(run):
    out, figures = run("--small --steps 3 device=cpu")
    assert figures["stamp"].keys() >= {"device", "torch", "diffusers", "python", "commit", "date"}
    assert figures["asked"]["what"] == "step" and figures["settings"]["stage"]["optimizer"] == "dlion"
    names = ["fastsd", "diffusers", "dadaptation"]
    assert figures["order"] == names * 3  # in turn, in every round
    rows = {row["name"]: row for row in figures["results"]}
    ours = rows["fastsd"]
    for name in names:
        row = rows[name]
        assert len(row["ms"]["all"]) == 3 and row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["img_per_s"] == pytest.approx(2e3 / row["ms"]["median"])
        assert row["tflop_per_s"] == pytest.approx(figures["tflop"] / row["ms"]["median"] * 1e3)
        assert row["mfu"] == pytest.approx(row["tflop_per_s"] / figures["matmul_tflop_per_s"])
        assert row["times"] == pytest.approx(row["ms"]["median"] / ours["ms"]["median"])
        assert row["peak_gb"] > row["held_gb"] > 0 and row["launches"] > 0 and 0 < row["first_loss"] < 10
        assert any(line.startswith(name) and "x" in line for line in out.splitlines())
    assert ours["host_waits"] == {} and rows["diffusers"]["host_waits"] == {}
    assert rows["dadaptation"]["host_waits"] == {SCALAR: 2 * len(diffusers_state_dict(UNet(baselines.SMALL)))}
    slower = [row["name"] for row in figures["results"] if row["times"] < 1]
    assert [miss.split(",")[0] for miss in figures["misses"]] == [f"fastsd is slower than {name}" for name in slower]


def test_other_settings_reach_every_contender(run):
    words = "--batch 4 --micro-batch 2 --optimizer lion --precision bf16 --size 32 --peers lion-pytorch --steps 1"
    out, figures = run("step --small", words, "stage.checkpointing=block device=cpu")
    assert "32 px, batch 4 (2 a forward), checkpointing block, lion" in out
    assert figures["settings"]["stage"]["precision"] == "bf16"
    assert figures["order"] == ["fastsd", "lion-pytorch"]
    assert figures["results"][0]["host_waits"] == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision, within", [("fp32", 1e-6), ("bf16", 1e-3)])
def test_contenders_do_the_same_work(precision, within, device, monkeypatch):
    """With our noise and timesteps handed to the peer, the first loss is the same, and in fp32 the sign of every gradient."""
    given = work(device, precision=precision, batch=4, micro_batch=2, optimizer="lion", lr=1e-6)
    abar = alphas_cumprod(given.model.scheduler).to(device)
    ours_draw = Objective(abar, given.seed, given.model.unet.ops)

    def draw(latents_BCHW, positions_B, timesteps):
        assert timesteps == 1000
        _, t_B, noise_BCHW = ours_draw.noised(latents_BCHW, positions_B)
        return noise_BCHW, t_B

    monkeypatch.setattr(baselines, "draw", draw)
    ours, peer = baselines.candidates(given, ["lion-pytorch"], [])
    losses = []
    for contender in (ours, peer):
        with contender.turn():
            losses.append(contender.step().item())
    assert losses[0] == pytest.approx(losses[1], rel=within)
    if precision == "fp32":
        after, theirs = diffusers_state_dict(given.model.unet), peer.unet.state_dict()
        same = torch.cat([(after[name] == theirs[name]).flatten() for name in theirs])
        assert same.float().mean() > 0.999


def test_eager_peers_share_a_model_and_the_compiled_one_has_its_own():
    make = baselines.baseline_maker(given := work())
    eager, other, compiled = make("diffusers"), make("dadaptation"), make("compiled")
    assert eager.unet is other.unet and eager.optimizer is not other.optimizer
    others = {p.data_ptr() for p in (*compiled.parameters, *given.model.unet.parameters())}
    assert not others & {p.data_ptr() for p in eager.parameters}
    weight = next(p for p in compiled.parameters if p.ndim == 4 and p.shape[-1] == 3)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert compiled.optimizer.defaults["fused"] and not eager.optimizer.defaults["fused"]


def test_a_parked_arena_changes_no_bit():
    """Between our turns the gradients' arena is handed back; training goes on as if it were not."""
    plain, parked = baselines.OurStep(work()), baselines.OurStep(work())
    for _ in range(3):
        expected = plain.step()
        with parked.turn():
            assert torch.equal(parked.step(), expected)
        (arena,) = parked.trainer.tensors_by_role()["gradients"]
        assert arena.untyped_storage().nbytes() == 0
    weights = [part["weights"][0] for part in (plain.trainer.tensors_by_role(), parked.trainer.tensors_by_role())]
    assert torch.equal(*weights)


def test_a_peer_has_pytorchs_switches_in_its_turn_only(monkeypatch):
    _, peer = baselines.candidates(work(), ["diffusers"], [])
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with peer.turn():
        assert not torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.deterministic


def test_a_compiler_that_fails_stops_nothing(run, monkeypatch):
    def compile(module):
        def broken(*args, **kwargs):
            raise RuntimeError("no C++ compiler\nwith a long story")

        return broken

    monkeypatch.setattr(torch, "compile", compile)
    out, figures = run("step --small --peers compiled,diffusers --steps 1 device=cpu")
    assert figures["order"] == ["fastsd", "diffusers"]
    assert "left out: peer compiled, torch.compile failed (no C++ compiler)" in figures["misses"]
    assert "note: left out: peer compiled" in out and "long story" not in out


def test_a_config_gives_model_stage_and_batches(run, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    out, _ = run("step", path, "--peers none --steps 1 device=cpu", f"cache.dir={tmp_path / 'none'}")
    assert "note: latents and text states are made here" in out
    assert fastsd_cache(path)
    out, _ = run(path, "--peers diffusers --steps 1 device=cpu stage.0.batch=3")
    assert "16 px, batch 3 (3 a forward), checkpointing none, lion" in out and "made here" not in out
    err = run("step", path, 'stage.0.train=["text_encoder"] device=cpu', code=2)
    assert "stage.0.train is ['text_encoder'], and bench step compares training of the UNet" in err


def fastsd_cache(path) -> bool:
    return cache(load_config(path)).cached == 21


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "dlion"},
        {"optimizer": "dlion", "micro_batch": 2, "grad_clip": 1.0, "ema": 0.99},
        {"optimizer": "dlion", "fused_backward": True},
        {"optimizer": "lion", "lr": 1e-4, "warmup": 5, "checkpointing": "block"},
        {"optimizer": "adamw", "lr": 1e-4, "micro_batch": 1, "checkpointing": "ff"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_steady_step_never_waits(settings, precision, device):
    for graph in {False, device == "cuda"}:
        given = work(device, precision=precision, **settings)
        given.graph = graph
        contender = baselines.OurStep(given)
        with contender.turn():
            for _ in range(WARM_UP + 2):
                contender.step()
            waits, launches = host_waits(contender.step, torch.device(device))
        assert not waits and launches > 100


X, MASK = torch.arange(4.0), torch.tensor([True, False, True, False])
WAITS = {
    "item": (SCALAR, lambda: X[0].item()),
    "bool": (SCALAR, lambda: bool((X > 0).all())),
    "float": (SCALAR, lambda: float(X.sum())),
    "equal": (SCALAR, lambda: torch.equal(X, X)),
    "tolist": (COPY, lambda: X.tolist()),
    "numpy": (COPY, lambda: X.numpy()),
    "array": (COPY, lambda: np.asarray(X)),
    "cpu": (COPY, lambda: X.cpu()),
    "to cpu": (COPY, lambda: X.to("cpu")),
    "to device=cpu": (COPY, lambda: X.to(device="cpu")),
    "nonzero": (SHAPE, lambda: X.nonzero()),
    "where of one": (SHAPE, lambda: torch.where(X > 1)),
    "mask": (SHAPE, lambda: X[MASK]),
    "masked_select": (SHAPE, lambda: X.masked_select(MASK)),
    "put by mask": (SHAPE, lambda: X.clone().index_put_((MASK,), torch.ones(2))),
    "unique": (SHAPE, lambda: X.unique()),
    "repeat": (SHAPE, lambda: X.repeat_interleave(torch.tensor([1, 2, 1, 1]))),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_planted_wait_is_found(name):
    kind, planted = WAITS[name]
    assert host_waits(planted, CPU)[0] == {kind: 1}


def test_a_wait_in_a_backward_is_found():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * dy.sum().item()

    x = torch.ones(3, requires_grad=True)
    assert host_waits(lambda: Waits.apply(x).sum().backward(), CPU)[0] == {SCALAR: 1}


def test_what_is_no_wait_is_not_counted():
    def harmless():
        x = X.to(CPU, non_blocking=True)[[0, 2]]
        x = torch.where(x > 1, x, 0.0).masked_fill(x > 2, 3.0)
        x[x > 2] = 1.0
        x.repeat_interleave(2)
        x.repeat_interleave(torch.tensor([1, 2]), output_size=3)
        x.to(X).lerp_(x, 0.5)

    waits, launches = host_waits(harmless, CPU)
    assert not waits and launches > 5
    count = torch.tensor(1.0)
    assert not host_waits(lambda: count.item(), CPU, [count])[0] and host_waits(lambda: count.item(), CPU)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bench_memory(run, precision):
    out, figures = run("memory --small device=cpu --precision", precision)
    rows = {(row["name"], row["checkpointing"]): row for row in figures["results"]}
    levels = [("diffusers", "none"), ("diffusers", "block"), ("fastsd", "none"), ("fastsd", "ff"), ("fastsd", "block")]
    assert list(rows) == levels
    kept = [row["kept_mb"] for row in figures["results"]]
    assert kept[0] > kept[2] > kept[3] > kept[4] > 0 and kept[0] > kept[1]
    gradients = sum(p.numel() for p in UNet(baselines.SMALL).parameters()) * (4 if precision == "fp32" else 2) / 1e6
    assert all(row["peak_mb"] > gradients for row in figures["results"])
    assert f"{rows['fastsd', 'none']['share']:.2f}x" in out and precision in out


def test_bench_optim(run):
    out, figures = run("optim --small --steps 2 --precision bf16 device=cpu")
    rows = {(row["optimizer"], row["name"]): row for row in figures["results"]}
    ours = ("fastsd", "fastsd, bf16", "fastsd, a list")
    names = {"lion": (*ours, "lion-pytorch"), "dlion": (*ours, "dadaptation"), "adamw": (*ours, "torch foreach", "torch fused")}
    assert list(rows) == [(family, name) for family, all in names.items() for name in all]
    assert figures["order"] == [f"{family}: {name}" for family, all in names.items() for name in all * 2]
    numbers = sum(p.numel() for p in UNet(baselines.SMALL).parameters())
    assert figures["settings"]["numbers"] == numbers and figures["settings"]["tensors"] == 208
    for (family, name), row in rows.items():
        assert row["bytes"] == numbers * (baselines.MOVED[family] - 2 * name.endswith("bf16"))
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"]["median"] / 1e6)
        assert row["times"] == pytest.approx(row["ms"]["median"] / rows[family, "fastsd"]["ms"]["median"])
        assert row["host_waits"] == ({SCALAR: 2 * 208} if name == "dadaptation" else {})
    assert "a copy" in out


def test_optimizers_over_an_arena_and_a_list_take_the_same_steps():
    layout, weights, gradient = baselines.made_arenas([5, 128, 700, 3], CPU)
    for family, others in baselines.OPTIMIZER_BASELINES.items():
        after = {}
        for name in ("fastsd", "fastsd, a list", *others):
            arenas = baselines.Arenas(layout, weights.clone(), gradient)
            baselines.optimizer_steps(family, arenas, choose_ops("auto", CPU), False, [])[name].run()
            after[name] = arenas.weights
        assert not torch.equal(after["fastsd"], weights)
        for name, found in after.items():
            torch.testing.assert_close(found, after["fastsd"], rtol=1e-6, atol=1e-9, msg=f"{family}: {name}")


def test_a_share_of_the_tensors_is_spread_over_their_sizes():
    sizes = list(range(1, 101))
    assert baselines.even_choice(sizes, 1.0) == sorted(sizes, reverse=True)
    half = baselines.even_choice(sizes, 0.5)
    assert half[0] == 100 and len(half) == 51 and abs(sum(half) - sum(sizes) / 2) < 101
    assert baselines.even_choice(sizes, 1e-9) == [100]


def test_bench_loader(run, tmp_path, tiny_model, images):
    out, figures = run("loader --small --steps 2 --rate 50")
    first, later = figures["results"]
    assert first["name"] == "first pass" and len(figures["settings"]["passes"]) == 4
    assert later["share_of_step"] == pytest.approx(50 / later["samples_per_s"])
    assert figures["settings"]["sample_bytes"] == 4 * 8 * 8 * 2 and "of a step at 50 img/s" in out
    path = job(tmp_path, tiny_model, images, STAGE)
    assert fastsd_cache(path)
    out, figures = run("loader", path, "--steps 3")
    assert "21 samples of 512 bytes, batch 2" in out


def test_bench_kernels_runs_the_suites_of_the_source(run, monkeypatch, tmp_path):
    commands = []

    def run_suites(words, cwd):
        commands.append(words)
        with open(words[words.index("--benchmark-json") + 1], "w") as file:
            json.dump({"benchmarks": [{"extra_info": {"op": "geglu"}}]}, file)
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setattr(suites, "subprocess", SimpleNamespace(run=run_suites))
    _, figures = run("kernels --small")
    assert commands[0][1:3] == ["-m", "pytest"] and "--quick" in commands[0] and figures["results"] == [{"op": "geglu"}]
    assert "a suite of the kernels failed" in run("kernels", code=2) and "--quick" not in commands[1]
    monkeypatch.setattr(suites, "SUITES", tmp_path)
    assert "come with the source only" in run("kernels", code=2)


def test_contenders_take_turns():
    calls = []
    turns = {name: (lambda name=name: calls.append(name), nullcontext) for name in "abc"}
    assert [name for name, _ in timing.in_turns(turns, 3, CPU)] == list("abcabcabc") == calls


def test_flops_are_those_of_the_workload():
    assert counters.forward_flops(UNetConfig.sd15(), 64) == workload.FORWARD_FLOPS


def asked(*changes: str, **more) -> options.BenchOptions:
    return options.BenchOptions("step", None, ["device=cpu", *changes], **more)


def need(of: options.BenchTarget, names: list[str], **changed) -> float:
    stage = of.stage.model_copy(update=changed)
    return counters.peak_memory(counters.estimate_memory(of.cfg, sum(of.sizes), stage, of.side, names, of.device))


def test_full_size_fits_24_gb_by_default(monkeypatch):
    """What `fastsd bench` chooses on a CPU, and what it takes by arithmetic; nothing is made here."""
    monkeypatch.setattr(counters, "free_bytes", lambda device: 22e9)
    for precision in ("fp32", "bf16"):
        of = options.bench_target(asked(precision=precision))
        assert len(of.sizes) == 686 and sum(of.sizes) == 859_520_964
        assert suites._fitting(asked(), of, []) == ["lion-pytorch"] and of.stage.optimizer == "lion"
        ours, peer = counters.estimate_memory(of.cfg, sum(of.sizes), of.stage, of.side, ["lion-pytorch"], CPU)
        assert ours.held == peer.held == 8 * 859_520_964
        largest = max(ours.rise, peer.rise)  # only one steps at a time
        assert need(of, ["lion-pytorch"]) == ours.held + peer.held + largest + counters.WORKSPACE < 22e9
    sentence = r"needs 26\.4 GB \(fastsd 10\.3, dadaptation 10\.3, a step 5\.3, libraries 0\.5\) and 22\.0 GB are free; use"
    with pytest.raises(UserError, match=sentence):
        suites._fitting(asked(), options.bench_target(asked('stage.optimizer="dlion"')), [])


def test_usual_peers_give_way_to_memory_and_named_ones_do_not():
    of, misses = options.bench_target(asked(small=True)), []
    of.free = need(of, ["diffusers"])
    assert suites._fitting(asked(small=True), of, misses) == ["diffusers"]
    assert misses == ["left out: peer dadaptation, for memory is short; --peers dadaptation runs it alone"]
    with pytest.raises(UserError, match="GB are free"):
        suites._fitting(asked(small=True, peers="diffusers,dadaptation"), of, [])


def test_a_gpu_gets_the_largest_batch_that_fits():
    given = asked(small=True, peers="diffusers")
    of = options.bench_target(given)
    of.device = torch.device("cuda")
    sizes = {batch: need(of, ["diffusers"], batch=batch) for batch in (1, 16, 32)}
    for batch, free in ((32, sizes[32]), (8, sizes[16] - 1), (1, sizes[1])):
        of.free = free
        suites._fitting(given, of, [])
        assert of.stage.batch == batch
    of.free = sizes[1] - 1
    with pytest.raises(UserError, match="GB are free"):
        suites._fitting(given, of, [])


def test_an_automatic_micro_batch_is_the_largest_that_fits():
    given = asked('stage.micro_batch="auto"', "stage.batch=12", small=True, peers="none")
    of = options.bench_target(given)
    of.free = need(of, [], micro_batch=6) - 1
    suites._fitting(given, of, [])
    assert (of.stage.batch, of.stage.micro_batch_size) == (12, 4)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("stpe", "bench 'stpe' is nothing that can be measured; did you mean step?"),
        ("everything", "choose from step, memory, kernels, optim, loader, cache, or name a config"),
        ("no.toml", "no.toml does not exist; use"),
        ("step --peers apex", "--peers names 'apex'; choose from diffusers, compiled, dadaptation, lion-pytorch, or none"),
        ("--size 100", "data.resolution is 100, no multiple of 64 as this UNet needs; use 64"),
        ("--batch 3 --micro-batch 2", "micro_batch is 2, not a divisor of batch 3"),
        ("--optimizer sgd", "bench: stage.0.optimizer is 'sgd'; choose 'dlion', 'lion' or 'adamw'"),
        ("stage.bach=3", "bench: stage.0.bach: unknown key; did you mean batch?"),
        ("device=cuda:9", "device is 'cuda:9', which does not work here"),
        ("optim --fraction 0", "--fraction is 0; give the share of the UNet's tensors"),
        ("optim --fraction 1.5", "--fraction is 1.5; give the share of the UNet's tensors"),
        ("loader --rate 0", "--rate is 0; give the images a second of a step"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_2(words, sentence, run):
    assert sentence in run(words, code=2)


def test_a_folder_that_is_not_there_is_said_first(monkeypatch, capsys, tmp_path):
    code, out, err = fastsd("bench", "--json", tmp_path / "no" / "x.json", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "that folder is not there" in err and out == ""


@pytest.mark.parametrize("what", ["step", "memory", "optim"])
def test_too_little_memory_is_one_sentence_and_nothing_is_made(what, run, monkeypatch):
    monkeypatch.setattr(counters, "free_bytes", lambda device: 4e9)
    for module, maker in ((baselines, "made_model"), (baselines, "diffusers_unet"), (baselines, "made_arenas")):
        monkeypatch.setattr(module, maker, lambda *arguments: pytest.fail("made"))
    assert "4.0 GB are free; use" in run(what, "--fraction 1 device=cpu", code=2)


def test_a_missing_package_is_named_with_the_command_that_mends_it(run, monkeypatch):
    for package in ("dadaptation", "lion_pytorch"):
        monkeypatch.setitem(sys.modules, package, None)
    err = run("step --small --peers dadaptation device=cpu", code=2)
    assert "peer dadaptation is not installed; pip install dadaptation" in err
    out, figures = run("step --small --steps 1 device=cpu")
    assert figures["order"] == ["fastsd", "diffusers"]
    assert "note: left out: peer dadaptation is not installed; pip install dadaptation" in out
    out, figures = run("optim --small --steps 1 device=cpu")
    assert "pip install lion-pytorch" in out and "pip install dadaptation" in out
    assert {row["name"] for row in figures["results"]} == {"fastsd", "fastsd, a list", "torch foreach", "torch fused"}
