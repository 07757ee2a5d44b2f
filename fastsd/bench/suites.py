"""`fastsd bench`: compare the real step with baselines in turn, and measure memory, kernels, optimizers, loader and cache.

    step      whole steps (noise, forward, backward, optimizer) of the candidates in `baselines.py`
    memory    bytes saved for backward, and the peak of forward and backward, by checkpointing level
    kernels   the suites under bench/, if the source tree is present
    optim     one optimizer step over the tensors of a UNet, against lion-pytorch, dadaptation and PyTorch
    loader    samples per second from the cache to the step
    cache     images per second from files to latents, by pipeline step, and the VAE's encoder against diffusers'

Without a config, the UNet has SD1.5's shape and random weights, and the data is generated. Candidates take turns in every
round, so disturbances of the machine affect all of them. Times are medians; ratios are ratios of medians. Skipped measurements
are printed and saved with the reason.  Read next: `fastsd/bench/baselines.py`, then `fastsd/bench/counters.py`.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from fastsd.bench import baselines, counters, data, timing
from fastsd.bench.options import OPTIONS, BenchOptions, BenchTarget, Figures, bench_config, bench_target
from fastsd.config.optimizers import OPTIMIZERS
from fastsd.errors import UserError
from fastsd.model.formats.adapters import load_to_train
from fastsd.model.shapes import forward_flops
from fastsd.model.unet import UNet
from fastsd.storage import replace_file
from fastsd.terminal.console import STDOUT, Console, counted
from fastsd.terminal.texts import size_text
from fastsd.train.device import choose_device, describe_ops
from fastsd.train.memory import saved_for_backward_bytes
from fastsd.train.precision import COMPUTE_DTYPE, precision_switches

SUITES = Path(__file__).resolve().parents[2] / "bench"


def bench(
    words: Sequence[str],
    json_file: Path | None = None,
    options: dict[str, Any] | None = None,
    console: Console = STDOUT,
    **more: Any,
) -> None:
    """Run `fastsd bench`.

    Args:
        words: [WHAT] [CONFIG] [key=value ...].
        json_file: file to which all results are also written; None = no file.
        options: entries of `OPTIONS`; values of None are ignored.
        more: the other fields of `BenchOptions`.

    Raises:
        UserError: a word or a value is invalid, a package is missing, or there is too little memory.
    """
    benchmark, config, changes = _parse(words)
    if config:
        console.name_config([config, *changes], more.get("precision"))
    changes += [f"{OPTIONS[name]}={json.dumps(value)}" for name, value in (options or {}).items() if value is not None]
    command_line = BenchOptions(benchmark, config, changes, **more)
    if json_file and not json_file.absolute().parent.is_dir():
        problem = f"--json is {str(json_file)!r}, but its folder does not exist"
        raise UserError("json-folder-missing", f"{problem}; create it or name another file")

    device, figures = BENCHMARKS[benchmark](command_line, console)
    for warning in figures["misses"]:
        console.warn(warning)
    if json_file:
        header = {"stamp": counters.stamp(device), "asked": asdict(command_line)}
        replace_file(json_file, json.dumps({**header, **figures}, indent=1) + "\n")


def _parse(words: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """Parse the words of a command line. Return the benchmark, the config and the key=value changes."""
    arguments = list(words)
    benchmark = arguments.pop(0) if arguments and arguments[0] in BENCHMARKS else None
    config = arguments.pop(0) if arguments and "=" not in arguments[0] else None
    if config and not benchmark and not config.endswith(".toml") and not Path(config).exists():
        matches = difflib.get_close_matches(config, BENCHMARKS, n=1)
        hint = f"did you mean {matches[0]}?" if matches else f"choose from {', '.join(BENCHMARKS)}, or give a config"
        raise UserError("bench-unknown-suite", f"bench {config!r} is not a benchmark; {hint}")
    return benchmark or "step", config, arguments


def bench_step(options: BenchOptions, console: Console) -> Figures:
    """Time whole steps of our candidate and of the baselines, in turn."""
    target = bench_target(options)
    if target.stage.train != ["unet"]:
        problem = f"stage.0.train is {target.stage.train}, but bench step compares training of the UNet"
        raise UserError("bench-trains-other", f"{problem}; add 'stage.0.train=[\"unet\"]'")
    names, warnings = _choose_fitting(options, target)
    if target.config.stage[0].teacher:
        warnings.append("the step is measured without its teacher, whose forward the baselines do not have")
    inputs, problems = _inputs(options, target)
    stage = target.stage
    with precision_switches(stage.precision, inputs.model.unet, deterministic=target.config.deterministic) as switches:
        graph = "CUDA graph" if inputs.graph else "no graph"
        console.echo(f"{counters.device_name(target.device)}, kernels {describe_ops(target.ops)}, {switches}, {graph}")
        batch = f"batch {stage.batch} ({stage.micro_batch_size} per forward)"
        stage_summary = f"{batch}, checkpointing {stage.checkpointing}, {stage.optimizer}"
        console.echo(f"UNet of {sum(target.sizes):,} parameters, {target.config.data.resolution} px, {stage_summary}")

        rows, turns = list[dict[str, Any]](), dict[str, timing.TimedCall]()
        candidates, skipped = baselines.candidates(inputs, names)
        for candidate in candidates:
            row, reasons = baselines.attempt(candidate.name, partial(timing.first_steps, candidate, target.device))
            skipped += reasons
            if row:
                rows.append(row)
                turns[candidate.name] = candidate.step, candidate.turn

        count = options.steps or (20 if target.device.type == "cuda" else 5)
        order = timing.in_turns(turns, count, target.device)
        rate = counters.matmul_rate(target.device, stage.precision, small=options.small)
    flops = 3 * stage.batch * forward_flops(target.cfg, target.side)
    for row in rows:
        counters.put_times(row, order, rows[0])
        seconds = row["ms"]["median"] / 1e3
        row |= {"img_per_s": stage.batch / seconds, "tflop_per_s": flops / seconds / 1e12, "mfu": flops / seconds / rate}
    warnings += [*problems, *skipped, *(warning for candidate in candidates for warning in candidate.warnings)]
    warnings += [f"fastsd is slower than {row['name']}: {row['times']:.2f}x" for row in rows if row["times"] < 1]
    table = [["", "img/s", "ms per step (min - max)", "TFLOP/s", "MFU", "peak", "launches", "waits", "fastsd speedup"]]
    for row in rows:
        opaque = row["host_waits"] is None
        waits = "-" if opaque else str(sum(row["host_waits"].values()))
        usage = ["-"] * 2 if opaque else [size_text(row["peak_gb"] * 1e9), str(row["launches"])]
        speed = [f"{row['img_per_s']:.3g}", counters.milliseconds(row), f"{row['tflop_per_s']:.3g}", f"{row['mfu']:.0%}"]
        table.append([row["name"], *speed, *usage, waits, f"{row['times']:.2f}x"])
    console.table(table)
    console.echo(f"matmul: {rate / 1e12:.3g} TFLOP/s; step: {flops / 1e12:.3g} TFLOP; text embeddings are precomputed for all")
    for row in rows[1:]:
        console.echo(f"{row['name']}: {baselines.BASELINES[row['name']]}")
    settings: dict[str, Any] = {"stage": stage.model_dump(), "resolution": target.config.data.resolution, "graph": inputs.graph}
    settings |= {"switches": switches, "kernels": target.ops.name, "rounds": count}
    figures: dict[str, Any] = {"settings": settings, "matmul_tflop_per_s": rate / 1e12, "tflop": flops / 1e12}
    figures["resident_gb"] = psutil.Process().memory_info().rss / 1e9
    return target.device, {**figures, "results": rows, "order": [name for name, _ in order], "misses": warnings}


def _choose_fitting(options: BenchOptions, target: BenchTarget) -> tuple[list[str], list[str]]:
    """Return the baselines that fit and the reasons for skipping others. Choose a batch or micro-batch that no option sets.

    Raises:
        UserError: nothing fits.
    """
    (names, warnings), parameters = _baseline_names(options, target), sum(target.sizes)

    def estimates() -> list[counters.CandidateMemory]:
        return counters.estimate_memory(target.cfg, parameters, target.stage, target.side, names, target.device)

    def need() -> float:
        return counters.peak_memory(estimates())

    while options.peers is None and len(names) > 1 and need() > target.free:
        warnings.append(f"skipped: baseline {names[-1]}, not enough memory; --peers {names[-1]} runs it alone")
        names.pop()

    base_stage, choices = target.stage, list[dict[str, int]]()
    if base_stage.micro_batch == "auto":
        choices = [{"micro_batch": images} for images in range(base_stage.batch, 0, -1) if base_stage.batch % images == 0]
    elif target.device.type == "cuda" and not options.config and not options.changed("batch"):
        choices = [{"batch": images} for images in (32, 16, 8, 4, 2, 1)]
    for choice in choices:
        target.stage = base_stage.model_copy(update=choice)
        if need() <= target.free:
            break
    if need() > target.free:
        shares = [f"{estimate.name} {size_text(estimate.held)}" for estimate in estimates()]
        shares.append(f"a step {size_text(max(estimate.rise for estimate in estimates()))}")
        raise UserError(
            "bench-step-memory",
            f"bench step needs {size_text(need())} ({', '.join(shares)}, libraries 0.5 GiB), but {size_text(target.free)} is "
            "free; use --optimizer lion, fewer --peers, a smaller --batch or --size, or --small",
        )
    return names, warnings


def _baseline_names(options: BenchOptions, target: BenchTarget) -> tuple[list[str], list[str]]:
    """Return the named baselines, or the usual ones that are installed; and the reasons for skipping others.

    Raises:
        UserError: a named baseline is not available.
    """
    if options.peers is not None:
        names = [] if options.peers == "none" else options.peers.split(",")
        for name in names:
            if name not in baselines.BASELINES:
                choices = ", ".join(baselines.BASELINES)
                raise UserError("bench-unknown-baseline", f"--peers has {name!r}; choose from {choices}, or give none")
            baselines.require(name)
        return names, []
    same = OPTIMIZERS[target.stage.optimizer].package or "diffusers"
    # Compiling for a CPU takes minutes, and at full size memory suffices for only one baseline.
    if target.device.type == "cuda":
        usual = ["diffusers", "compiled", "dadaptation"]
    else:
        usual = ["diffusers", same] if options.small else [same]
    attempts = {name: baselines.attempt(name, partial(baselines.require, name)) for name in usual}
    installed = [name for name, (result, _) in attempts.items() if result]
    return installed, [reason for _, reasons in attempts.values() for reason in reasons]


def _inputs(options: BenchOptions, target: BenchTarget) -> tuple[baselines.BenchInputs, list[str]]:
    """Load the model onto its device. Batches come from the config's cache, or are generated, with a warning."""
    stage, warnings = target.stage, list[str]()
    if options.config:
        model = load_to_train(target.config.model, target.ops)
        try:
            batches = baselines.cached_batches(target.config, model, target.device)
        except UserError as error:
            warnings.append(f"random latents and text embeddings are used: {error}")
            model.text = baselines.random_text_embeddings(target.cfg, model.text.lengths[-1])
            batches = baselines.random_batches(target.cfg.in_channels, target.side, stage.batch)
    else:
        model = baselines.random_model(target.cfg, target.ops)
        batches = baselines.random_batches(target.cfg.in_channels, target.side, stage.batch)
    model.unet.to(target.device)
    model.text.module.to(target.device)
    model.unet.checkpointing = stage.checkpointing
    graph = target.config.cuda_graph and target.device.type == "cuda"
    return baselines.BenchInputs(model, stage, batches, target.device, target.config.seed, graph), warnings


def bench_memory(options: BenchOptions, console: Console) -> Figures:
    """Measure the bytes that ours and diffusers' UNet save for backward by checkpointing level, in the compute dtype."""
    target = bench_target(options)
    dtype, images = COMPUTE_DTYPE[target.stage.precision], target.stage.micro_batch_size if options.changed("batch") else 1
    # Two models, the gradients of one, and the bytes that diffusers' UNet saves for backward.
    need = 12 * sum(target.sizes) + images * 2e9 * (target.side / 64) ** 2 * target.cfg.block_out_channels[0] / 320
    if need > target.free:
        amounts = f"{size_text(need)}, but {size_text(target.free)} is free"
        advice = "use a smaller --batch or --size, or --small"
        raise UserError("bench-memory-memory", f"bench memory needs about {amounts}; {advice}")

    with target.device:
        unet = UNet(target.cfg, target.ops)
        baseline = baselines.diffusers_unet(unet, target.device).to(dtype)
        latents = torch.randn(images, target.cfg.in_channels, target.side, target.side).to(dtype)
        text_embeds, t_B = torch.randn(images, 77, target.cfg.cross_attention_dim).to(dtype), torch.full((images,), 500)
    unet.to(dtype)
    rows: list[dict[str, Any]] = []

    def measure(name: str, level: str, module: torch.nn.Module, predict: Callable[[], Tensor]) -> None:
        with precision_switches(target.stage.precision):
            saved_bytes = saved_for_backward_bytes(predict, module)
            peak = counters.rise(lambda: predict().float().square().mean().backward(), target.device)
        module.zero_grad()
        rows.append({"name": name, "checkpointing": level, "kept_mb": saved_bytes / images / 1e6, "peak_mb": peak / 1e6})

    for level in counted("checkpointing levels of diffusers", ("none", "block")):
        (baseline.enable_gradient_checkpointing if level == "block" else baseline.disable_gradient_checkpointing)()
        measure("diffusers", level, baseline, lambda: baseline(latents, t_B, text_embeds).sample)
    for level in counted("checkpointing levels", ("none", "ff", "block")):
        unet.checkpointing = level
        measure(baselines.OURS, level, unet, lambda: unet(latents, t_B, text_embeds))
    table = [["", "checkpointing", "saved per image", "vs diffusers", "peak with gradients"]]
    for row in rows:
        row["share"] = row["kept_mb"] / rows[0]["kept_mb"]
        figures = [size_text(row["kept_mb"] * 1e6), f"{row['share']:.2f}x", size_text(row["peak_mb"] * 1e6)]
        table.append([row["name"], row["checkpointing"], *figures])
    size, precision = target.config.data.resolution, target.stage.precision
    console.echo(f"{size} px, {images} per forward, {precision}, kernels {target.ops.name}")
    console.table(table)
    setup = {"precision": precision, "resolution": size, "images": images}
    return target.device, {"settings": {**setup, "kernels": target.ops.name}, "results": rows, "misses": []}


def bench_optim(options: BenchOptions, console: Console) -> Figures:
    """Time one step of our optimizers and the baselines in turn, over all of the UNet's tensors or a fraction of them."""
    target = bench_target(options)
    chosen, with_bf16 = options.changed("optimizer"), target.stage.precision == "bf16"
    families = [target.stage.optimizer] if chosen or options.config else list(OPTIMIZERS)
    bytes_each = max(baselines.optimizer_bytes(family, with_bf16=with_bf16) for family in families)
    largest_fraction = min(1.0, 0.7 * target.free / (bytes_each * sum(target.sizes)))
    fraction = largest_fraction if options.fraction is None else options.fraction
    if not 0 < fraction <= 1:
        advice = "give the fraction of the UNet's tensors to use, above 0 and at most 1"
        raise UserError("bench-fraction", f"--fraction is {fraction:g}; {advice}")
    sizes = baselines.spread_sizes(target.sizes, fraction)
    if bytes_each * sum(sizes) > target.free:
        amounts = f"{size_text(bytes_each * sum(sizes))}, but {size_text(target.free)} is free"
        raise UserError("bench-optim-memory", f"bench optim needs {amounts}; use a smaller --fraction or a single --optimizer")

    arenas = baselines.random_arenas(sizes, target.device)
    copy_rate, rounds = counters.copy_rate(target.device, small=options.small), options.steps or 7
    console.echo(f"{counters.device_name(target.device)}, kernels {describe_ops(target.ops)}, copy: {copy_rate / 1e9:.3g} GB/s")
    console.echo(f"{len(sizes)} of {len(target.sizes)} tensors, {sum(sizes):,} parameters")
    rows, order, warnings = list[dict[str, Any]](), list[str](), list[str]()
    for family in families:
        steps, skipped = baselines.optimizer_steps(family, arenas, target.ops, with_bf16=with_bf16)
        warnings += skipped
        family_start = len(rows)
        for name, step in steps.items():
            step.run()
            waits, launches = counters.host_waits(step.run, target.device, step.on_host())
            rows.append({"name": name, "optimizer": family, "bytes": step.num_bytes})
            rows[-1] |= {"host_waits": dict(waits), "launches": launches}
        turns = timing.in_turns({name: (step.run, nullcontext) for name, step in steps.items()}, rounds, target.device)
        order += [f"{family}: {name}" for name, _ in turns]
        for row in rows[family_start:]:
            counters.put_times(row, turns, rows[family_start])
            row["gb_per_s"] = row["bytes"] / row["ms"]["median"] / 1e6
            row["share_of_copy"] = row["gb_per_s"] * 1e9 / copy_rate
        del steps

    table = [["optimizer", "", "ms (min - max)", "GB/s", "of copy rate", "waits", "fastsd speedup"]]
    for row in rows:
        figures = [counters.milliseconds(row), f"{row['gb_per_s']:.3g}", f"{row['share_of_copy']:.0%}"]
        figures += [str(sum(row["host_waits"].values())), f"{row['times']:.2f}x"]
        table.append([row["optimizer"], row["name"], *figures])
    console.table(table)
    setup = {"fraction": fraction, "tensors": len(sizes), "numbers": sum(sizes), "rounds": rounds, "kernels": target.ops.name}
    settings, rate = {**setup, "precision": target.stage.precision}, copy_rate / 1e9
    return target.device, {"settings": settings, "copy_gb_per_s": rate, "results": rows, "order": order, "misses": warnings}


def run_suites(options: BenchOptions, console: Console) -> Figures:
    """Run the benchmarks of the kernels with pytest. Raises UserError if there is no source tree or a benchmark fails."""
    if not (SUITES / "conftest.py").is_file():
        advice = "clone the repository and run `fastsd bench kernels` in it"
        raise UserError("bench-no-source", f"bench kernels needs the source code of fastsd; {advice}")
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise UserError("pytest-benchmark-missing", "pytest-benchmark is not installed; run `pip install pytest-benchmark`")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        quick = ["--quick"] if options.small else []
        command = [sys.executable, "-m", "pytest", str(SUITES), "--benchmark-json", str(file), *quick]
        status = subprocess.run(command, cwd=SUITES.parent).returncode
        if status:
            raise UserError("bench-kernels-failed", f"a kernel benchmark failed (pytest status {status}); see its output above")
        figures = [benchmark["extra_info"] for benchmark in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]]
    console.echo("for goals and a result file with a stamp, run on a GPU: python bench/gpu.py")
    return choose_device("auto"), {"settings": {}, "results": figures, "misses": []}


BENCHMARKS: dict[str, Callable[[BenchOptions, Console], Figures]] = {
    "step": bench_step,
    "memory": bench_memory,
    "kernels": run_suites,
    "optim": bench_optim,
    "loader": lambda options, console: data.bench_loader(options, bench_config(options), console),
    "cache": lambda options, console: data.bench_cache(options, bench_config(options), console),
}
