"""`fastsd bench`: candidates do the same work in turn, waits are detected, and bad input is refused in one line."""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commandline import STAGE, fastsd
from sentences import refused, says
from tiny import job

from fastsd.bench import baselines, counters, options, suites, timing
from fastsd.bench.counters import COPY, SCALAR, SHAPE, host_waits
from fastsd.commands.cache import cache
from fastsd.config.optimizers import OPTIMIZERS
from fastsd.config.schema import StageTable, load_config
from fastsd.model.flow_schedule import flow_scheduler
from fastsd.model.model import SD15_SCHEDULER
from fastsd.model.shapes import forward_flops
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.weights import diffusers_state_dict
from fastsd.train.device import choose_ops
from fastsd.train.flow import FlowObjective, objective_of
from fastsd.train.graph import WARM_UP
from fastsd_kernels import noise, workload

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Return a function that runs `fastsd bench` and returns output and figures, or the error if `code` is not 0."""
    monkeypatch.setattr("fastsd.train.device.INTERPRETED", False)
    file = tmp_path / "figures.json"

    def call(*words, code=0):
        arguments = [part for word in words for part in (word.split() if isinstance(word, str) else [word])]
        exit_code, out, err = fastsd("bench", *arguments, "--json", file, monkeypatch=monkeypatch, capsys=capsys)
        assert exit_code == code, err
        if code:
            assert "Traceback" not in err + out and len(err.strip().splitlines()) == 1
            return err
        return out, json.loads(file.read_text())

    return call


def make_inputs(device: str = "cpu", **settings) -> baselines.BenchInputs:
    torch_device = torch.device(device)
    stage = StageTable(**{"train": ["unet"], "until": 9, "batch": 4, **settings})
    model = baselines.random_model(baselines.SMALL, choose_ops("auto", torch_device))
    for module in (model.unet, model.text.module):
        module.to(torch_device)
    model.unet.checkpointing = stage.checkpointing
    return baselines.BenchInputs(model, stage, baselines.random_batches(4, 8, stage.batch), torch_device)


def test_bench_step_reports_every_candidate(run):
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
    assert len(figures["misses"]) == len(slower)
    assert all(says(line, "bench-slower", baseline=name) for line, name in zip(figures["misses"], slower, strict=True))


def test_settings_reach_every_candidate(run):
    words = "--batch 4 --micro-batch 2 --optimizer lion --precision bf16 --size 32 --peers lion-pytorch --steps 1"
    out, figures = run("step --small", words, "stage.checkpointing=block device=cpu")
    assert says(out, "bench-batch", size=32, batch=4, micro_batch=2, checkpointing="block", optimizer="lion")
    assert figures["settings"]["stage"]["precision"] == "bf16"
    assert figures["order"] == ["fastsd", "lion-pytorch"]
    assert figures["results"][0]["host_waits"] == {}


V_PREDICTION = SD15_SCHEDULER | {"prediction_type": "v_prediction"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "precision, tolerance, scheduler",
    [
        ("fp32", 1e-6, SD15_SCHEDULER),
        ("bf16", 1e-3, SD15_SCHEDULER),
        ("fp32", 1e-6, V_PREDICTION),
        ("fp32", 1e-6, flow_scheduler(SD15_SCHEDULER)),
    ],
    ids=["fp32", "bf16", "v", "flow"],
)
def test_candidates_do_the_same_work(precision, tolerance, scheduler, device, monkeypatch):
    """With our noise and timesteps, a baseline has the same first loss, and in fp32 nearly the same weights after a step."""
    inputs = make_inputs(device, precision=precision, batch=4, micro_batch=2, optimizer="lion", lr=1e-6)
    inputs.model.scheduler = scheduler
    objective = objective_of(scheduler, inputs.seed, inputs.model.unet.ops, device=device)

    def draw(latents_BCHW, positions_B, timesteps, *, continuous):
        assert timesteps == 1000 and continuous == isinstance(objective, FlowObjective)
        shape = tuple(latents_BCHW.shape[1:])
        return noise.normal(inputs.seed, noise.Purpose.NOISE, positions_B, shape), objective.timesteps(positions_B)

    monkeypatch.setattr(baselines, "draw", draw)
    ours, baseline = baselines.candidates(inputs, ["lion-pytorch"])[0]
    losses = []
    for candidate in (ours, baseline):
        with candidate.turn():
            losses.append(candidate.step().item())
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    if precision == "fp32":
        our_weights, baseline_weights = diffusers_state_dict(inputs.model.unet), baseline.unet.state_dict()
        is_equal = torch.cat([(our_weights[name] == baseline_weights[name]).flatten() for name in baseline_weights])
        assert is_equal.float().mean() > 0.999


def test_eager_baselines_share_a_model_and_the_compiled_one_does_not():
    inputs = make_inputs()
    make = baselines.baseline_maker(inputs)
    eager, other, compiled = make("diffusers"), make("dadaptation"), make("compiled")
    assert eager.unet is other.unet and eager.optimizer is not other.optimizer
    other_addresses = {p.data_ptr() for p in (*compiled.parameters, *inputs.model.unet.parameters())}
    assert not other_addresses & {p.data_ptr() for p in eager.parameters}
    weight = next(p for p in compiled.parameters if p.ndim == 4 and p.shape[-1] == 3)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert compiled.optimizer.defaults["fused"] and not eager.optimizer.defaults["fused"]


def test_releasing_the_gradient_arena_changes_no_bit():
    keeping, releasing = baselines.OurStep(make_inputs()), baselines.OurStep(make_inputs())
    for _ in range(3):
        expected = keeping.step()
        with releasing.turn():
            assert torch.equal(releasing.step(), expected)
        (arena,) = releasing.trainer.tensors_by_role()["gradients"]
        assert arena.untyped_storage().nbytes() == 0
    assert torch.equal(*(step.trainer.tensors_by_role()["weights"][0] for step in (keeping, releasing)))


def test_baseline_uses_pytorchs_switches_only_in_its_turn(monkeypatch):
    _, baseline = baselines.candidates(make_inputs(), ["diffusers"])[0]
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with baseline.turn():
        assert not torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.deterministic


def test_failed_compilation_skips_only_that_baseline(run, monkeypatch):
    def compile(module):
        def broken(*args, **kwargs):
            raise RuntimeError("no C++ compiler\nwith a long story")

        return broken

    monkeypatch.setattr(torch, "compile", compile)
    out, figures = run("step --small --peers compiled,diffusers --steps 1 device=cpu")
    assert figures["order"] == ["fastsd", "diffusers"]
    for text in (out, "\n".join(figures["misses"])):
        assert says(text, "bench-compile-failed", reason="no C++ compiler") and "long story" not in text


@pytest.mark.parametrize("function", ["forward", "__init__"])
def test_step_that_runs_out_of_memory_is_refused(function, run, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore words")

    monkeypatch.setattr(baselines.OurStep if function == "__init__" else UNet, function, out_of_memory)
    err = run("step --small --peers diffusers --steps 1 device=cpu", code=2)
    assert says(err, "bench-step-failed") and "20.00 MiB" in err


@pytest.mark.slow
def test_config_provides_model_stage_and_batches(run, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    out, _ = run("step", path, "--peers none --steps 1 device=cpu", f"cache.dir={tmp_path / 'none'}")
    assert says(out, "bench-random-inputs")
    assert cache(load_config(path)).cached == 21
    out, _ = run(path, "--peers diffusers --steps 1 device=cpu stage.0.batch=3")
    assert says(out, "bench-batch", size=16, batch=3, micro_batch=3, checkpointing="none", optimizer="lion")
    assert not says(out, "bench-random-inputs")
    flow = "--peers diffusers --steps 1 device=cpu model.prediction=flow stage.0.teacher=base"
    out, figures = run(path, flow)
    assert says(out, "bench-without-teacher") and figures["order"] == ["fastsd", "diffusers"]
    err = run("step", path, 'stage.0.train=["text_encoder"] device=cpu', code=2)
    assert says(err, "bench-trains-other", train=["text_encoder"])


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
def test_step_never_waits_after_warm_up(settings, precision, device):
    for graph in {False, device == "cuda"}:
        inputs = make_inputs(device, precision=precision, **settings)
        inputs.graph = graph
        candidate = baselines.OurStep(inputs)
        with candidate.turn():
            for _ in range(WARM_UP + 2):
                candidate.step()
            waits, launches = host_waits(candidate.step, torch.device(device))
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
def test_wait_is_detected(name):
    kind, waiting_call = WAITS[name]
    assert host_waits(waiting_call, CPU)[0] == {kind: 1}


def test_wait_in_a_backward_is_detected():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * dy.sum().item()

    x = torch.ones(3, requires_grad=True)
    assert host_waits(lambda: Waits.apply(x).sum().backward(), CPU)[0] == {SCALAR: 1}


def test_operations_that_do_not_wait_are_not_counted():
    def without_waits():
        x = X.to(CPU, non_blocking=True)[[0, 2]]
        x = torch.where(x > 1, x, 0.0).masked_fill(x > 2, 3.0)
        x[x > 2] = 1.0
        x.repeat_interleave(2)
        x.repeat_interleave(torch.tensor([1, 2]), output_size=3)
        x.to(X).lerp_(x, 0.5)

    waits, launches = host_waits(without_waits, CPU)
    assert not waits and launches > 5
    count = torch.tensor(1.0)
    assert not host_waits(lambda: count.item(), CPU, [count])[0] and host_waits(lambda: count.item(), CPU)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bench_memory_reports_every_checkpointing_level(run, precision):
    out, figures = run("memory --small device=cpu --precision", precision)
    rows = {(row["name"], row["checkpointing"]): row for row in figures["results"]}
    levels = [("diffusers", "none"), ("diffusers", "block"), ("fastsd", "none"), ("fastsd", "ff"), ("fastsd", "block")]
    assert list(rows) == levels
    saved_mb = [row["kept_mb"] for row in figures["results"]]
    assert saved_mb[0] > saved_mb[2] > saved_mb[3] > saved_mb[4] > 0 and saved_mb[0] > saved_mb[1]
    gradients = sum(p.numel() for p in UNet(baselines.SMALL).parameters()) * (4 if precision == "fp32" else 2) / 1e6
    assert all(row["peak_mb"] > gradients for row in figures["results"])
    assert f"{rows['fastsd', 'none']['share']:.2f}x" in out and precision in out


def test_bench_optim_reports_every_optimizer(run):
    out, figures = run("optim --small --steps 2 --precision bf16 device=cpu")
    rows = {(row["optimizer"], row["name"]): row for row in figures["results"]}
    ours = ("fastsd", "fastsd, bf16", "fastsd, a list")
    names = {"dlion": (*ours, "dadaptation"), "lion": (*ours, "lion-pytorch"), "adamw": (*ours, "torch foreach", "torch fused")}
    assert list(rows) == [(family, name) for family, variants in names.items() for name in variants]
    assert figures["order"] == [f"{family}: {name}" for family, variants in names.items() for name in variants * 2]
    numbers = sum(p.numel() for p in UNet(baselines.SMALL).parameters())
    assert figures["settings"]["numbers"] == numbers and figures["settings"]["tensors"] == 208
    for (family, name), row in rows.items():
        assert row["bytes"] == numbers * ({"lion": 20, "dlion": 28, "adamw": 28}[family] - 2 * name.endswith("bf16"))
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"]["median"] / 1e6)
        assert row["times"] == pytest.approx(row["ms"]["median"] / rows[family, "fastsd"]["ms"]["median"])
        assert row["host_waits"] == ({SCALAR: 2 * 208} if name == "dadaptation" else {})
    assert says(out, "bench-copy-rate")


def test_optimizers_over_an_arena_and_a_list_take_the_same_steps():
    layout, weights, gradient = baselines.random_arenas([5, 128, 700, 3], CPU)
    for family in OPTIMIZERS:
        weights_after = {}
        for name in ("fastsd", "fastsd, a list", *baselines.optimizer_baselines(family)):
            arenas = baselines.Arenas(layout, weights.clone(), gradient)
            baselines.optimizer_steps(family, arenas, choose_ops("auto", CPU), with_bf16=False)[0][name].run()
            weights_after[name] = arenas.weights
        assert not torch.equal(weights_after["fastsd"], weights)
        for name, result in weights_after.items():
            torch.testing.assert_close(result, weights_after["fastsd"], rtol=1e-6, atol=1e-9, msg=f"{family}: {name}")


def test_fraction_of_the_tensors_is_spread_over_their_sizes():
    sizes = list(range(1, 101))
    assert baselines.spread_sizes(sizes, 1.0) == sorted(sizes, reverse=True)
    half = baselines.spread_sizes(sizes, 0.5)
    assert half[0] == 100 and len(half) == 51 and abs(sum(half) - sum(sizes) / 2) < 101
    assert baselines.spread_sizes(sizes, 1e-9) == [100]


def test_bench_loader_reports_first_and_later_passes(run, tmp_path, tiny_model, images):
    out, figures = run("loader --small --steps 2 --rate 50")
    first, later = figures["results"]
    assert first["name"] == "first pass" and len(figures["settings"]["passes"]) == 4
    assert later["share_of_step"] == pytest.approx(50 / later["samples_per_s"])
    assert figures["settings"]["sample_bytes"] == 4 * 8 * 8 * 2 and says(out, "bench-step-share", rate=50)
    path = job(tmp_path, tiny_model, images, STAGE)
    assert cache(load_config(path)).cached == 21
    out, figures = run("loader", path, "--steps 3")
    assert says(out, "bench-samples", samples=21, bytes=512, batch=2)


def test_bench_kernels_runs_the_suites(run, monkeypatch, tmp_path):
    commands = []

    def run_suites(words, cwd):
        commands.append(words)
        with open(words[words.index("--benchmark-json") + 1], "w") as file:
            json.dump({"benchmarks": [{"extra_info": {"op": "geglu"}}]}, file)
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setattr(suites, "subprocess", SimpleNamespace(run=run_suites))
    _, figures = run("kernels --small")
    assert commands[0][1:3] == ["-m", "pytest"] and "--quick" in commands[0] and figures["results"] == [{"op": "geglu"}]
    assert says(run("kernels", code=2), "bench-kernels-failed", status=1) and "--quick" not in commands[1]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytest_benchmark", None)
        assert says(run("kernels", code=2), "pytest-benchmark-missing") and len(commands) == 2
    monkeypatch.setattr(suites, "SUITES", tmp_path)
    assert says(run("kernels", code=2), "bench-no-source")


def test_candidates_take_turns():
    calls = []
    turns = {name: (lambda name=name: calls.append(name), nullcontext) for name in "abc"}
    assert [name for name, _ in timing.in_turns(turns, 3, CPU)] == list("abcabcabc") == calls


def test_flops_match_the_workload():
    assert forward_flops(UNetConfig.sd15(), 64) == workload.FORWARD_FLOPS


def bench_options(*changes: str, **more) -> options.BenchOptions:
    return options.BenchOptions("step", None, ["device=cpu", *changes], **more)


def needed_bytes(target: options.BenchTarget, names: list[str], **changes) -> float:
    stage = target.stage.model_copy(update=changes)
    estimates = counters.estimate_memory(target.cfg, sum(target.sizes), stage, target.side, names, target.device)
    return counters.peak_memory(estimates)


def test_full_size_fits_24_gb_by_default(monkeypatch):
    """Check the default choices of `fastsd bench` on a CPU and their estimated memory, without allocating it."""
    monkeypatch.setattr(counters, "free_bytes", lambda device: 22e9)
    for precision in ("fp32", "bf16"):
        target = options.bench_target(bench_options(precision=precision))
        assert len(target.sizes) == 686 and sum(target.sizes) == 859_520_964
        assert suites._choose_fitting(bench_options(), target) == (["lion-pytorch"], []) and target.stage.optimizer == "lion"
        parameters = sum(target.sizes)
        ours, baseline = counters.estimate_memory(target.cfg, parameters, target.stage, target.side, ["lion-pytorch"], CPU)
        assert ours.held == baseline.held == 8 * 859_520_964
        rise = max(ours.rise, baseline.rise)  # the candidates step one after the other
        assert needed_bytes(target, ["lion-pytorch"]) == ours.held + baseline.held + rise + counters.WORKSPACE < 22e9
    shares = "fastsd 9.6 GiB, dadaptation 9.6 GiB, a step 4.9 GiB"
    with refused("bench-step-memory", need="24.6 GiB", shares=shares, free="20.5 GiB"):
        suites._choose_fitting(bench_options(), options.bench_target(bench_options('stage.optimizer="dlion"')))


def test_default_baselines_are_skipped_if_memory_is_short_and_named_ones_are_not():
    target = options.bench_target(bench_options(small=True))
    target.free = needed_bytes(target, ["diffusers"])
    names, (reason,) = suites._choose_fitting(bench_options(small=True), target)
    assert names == ["diffusers"] and says(reason, "bench-baseline-memory", baseline="dadaptation")
    with refused("bench-step-memory"):
        suites._choose_fitting(bench_options(small=True, peers="diffusers,dadaptation"), target)


def test_gpu_uses_the_largest_batch_that_fits():
    requested = bench_options(small=True, peers="diffusers")
    target = options.bench_target(requested)
    target.device = torch.device("cuda")
    bytes_by_batch = {batch: needed_bytes(target, ["diffusers"], batch=batch) for batch in (1, 16, 32)}
    for batch, free in ((32, bytes_by_batch[32]), (8, bytes_by_batch[16] - 1), (1, bytes_by_batch[1])):
        target.free = free
        suites._choose_fitting(requested, target)
        assert target.stage.batch == batch
    target.free = bytes_by_batch[1] - 1
    with refused("bench-step-memory"):
        suites._choose_fitting(requested, target)


def test_auto_micro_batch_is_the_largest_that_fits():
    requested = bench_options('stage.micro_batch="auto"', "stage.batch=12", small=True, peers="none")
    target = options.bench_target(requested)
    target.free = needed_bytes(target, [], micro_batch=6) - 1
    suites._choose_fitting(requested, target)
    assert (target.stage.batch, target.stage.micro_batch_size) == (12, 4)


@pytest.mark.parametrize(
    "words, code, fields",
    [
        ("stpe", "bench-unknown-suite", {"config": "'stpe'", "hint": "did you mean step?"}),
        ("everything", "bench-unknown-suite", {"hint": "choose from step, memory, kernels, optim, loader, cache"}),
        ("no.toml", "config-missing", {}),
        ("step --peers apex", "bench-unknown-baseline", {"value": "'apex'", "baselines": ", ".join(baselines.BASELINES)}),
        ("device=abacus", "device-unavailable", {"device": "'abacus'"}),
        ("optim --fraction 0", "bench-fraction", {"fraction": 0}),
        ("optim --fraction 1.5", "bench-fraction", {"fraction": 1.5}),
        ("loader --rate 0", "bench-rate", {"rate": 0}),
    ],
)
def test_bad_input_is_refused_in_one_line(words, code, fields, run):
    assert says(run(words, code=2), code, **fields)


@pytest.mark.parametrize(
    "words, facts",
    [
        ("--size 100", ["data.resolution", "100", "64"]),
        ("--batch 3 --micro-batch 2", ["bench: ", "micro_batch is 2", "batch 3"]),
        ("--optimizer sgd", ["bench: stage.0.optimizer", "'sgd'", "'dlion'", "'lion'", "'adamw'"]),
        ("stage.bach=3", ["bench: stage.0.bach", "batch?"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(words, facts, run):
    err = run(words, code=2)
    assert all(fact in err for fact in facts), err


def test_bad_settings_without_a_config_name_bench_and_no_file():
    with refused("bench-config", problem="bench: stage.0.bach") as error:
        options.bench_config(options.BenchOptions("step", None, ["stage.bach=3"]))
    assert str(error.value).startswith("bench: ")


def test_missing_json_folder_is_refused_before_measuring(monkeypatch, capsys, tmp_path):
    code, out, err = fastsd("bench", "--json", tmp_path / "no" / "x.json", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and says(err, "json-folder-missing") and out == ""


@pytest.mark.parametrize(
    "suite, name", [("step", "bench-step-memory"), ("memory", "bench-memory-memory"), ("optim", "bench-optim-memory")]
)
def test_too_little_memory_is_refused_before_allocation(suite, name, run, monkeypatch):
    monkeypatch.setattr(counters, "free_bytes", lambda device: 4e9)
    for module, maker in ((baselines, "random_model"), (baselines, "diffusers_unet"), (baselines, "random_arenas")):
        monkeypatch.setattr(module, maker, lambda *arguments: pytest.fail("allocated"))
    assert says(run(suite, "--fraction 1 device=cpu", code=2), name, free="3.7 GiB")


def test_missing_package_is_named_with_the_command_that_installs_it(run, monkeypatch):
    for package in ("dadaptation", "lion_pytorch"):
        monkeypatch.setitem(sys.modules, package, None)
    err = run("step --small --peers dadaptation device=cpu", code=2)
    assert says(err, "bench-package-missing", baseline="dadaptation", package="dadaptation")
    out, figures = run("step --small --steps 1 device=cpu")
    assert figures["order"] == ["fastsd", "diffusers"]
    assert says(out, "bench-baseline-missing", baseline="dadaptation", package="dadaptation")
    out, figures = run("optim --small --steps 1 device=cpu")
    for package in ("lion-pytorch", "dadaptation"):
        assert says(out, "bench-baseline-missing", package=package)
    assert {row["name"] for row in figures["results"]} == {"fastsd", "fastsd, a list", "torch foreach", "torch fused"}
