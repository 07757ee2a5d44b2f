"""Runs on several ranks: the same checkpoints as on one, stops and failures that end all ranks, and the start by torchrun."""

import os
import platform
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import psutil
import pytest
import torch
from environment import ROOT
from PIL import Image
from ranks import ended, start_ranks, start_torchrun, store_of_ranks, train_ranks
from runs import cache, checkpoint_steps, final, rows_of, same
from sentences import refused, says
from tiny import job

from fastsd import cli
from fastsd.config.schema import ModelTable, load_config
from fastsd.data.loader import Batch, Stream
from fastsd.errors import UserError
from fastsd.model.formats.load import load_model
from fastsd.run.flow_fit import LAYERS
from fastsd.run.loop import train
from fastsd.run.run import Run
from fastsd.terminal.console import Console
from fastsd.train.optim import FastOptimizer
from fastsd.train.ranks import joined_ranks
from fastsd.train.shards import Shards
from fastsd.train.step import Step, StepResult

pytestmark = pytest.mark.slow

STAGE = """
[[stage]]
name = "one"
train = ["unet"]
until = 4
batch = 4
optimizer = "dlion"
checkpoint_every = 2
"""
SIZES = 'sample.prompts=["red circle", {prompt="star", width=64, height=32}, {prompt="square", steps=3}]'  # three UNet calls
# Settings of runs, by name. A micro-batch is the share of one rank.
CASES = {
    "dlion": [
        "stage.precision=bf16", "stage.ema=0.9", "stage.grad_clip=0.5", "validate.held_out=4", "validate.stabilised=3",
        "validate.batch=2", "validate.every=2", "stage.sample_every=2", SIZES, "sample.weights=ema",
    ],
    "adamw": [
        'stage.train=["unet", "text_encoder"]', "stage.optimizer=adamw", "stage.lr=1e-4", "stage.caption_dropout=0.3",
        "stage.canary_every=2", "model.clip_skip=1",
    ],
    "lora": ['stage.train=["lora"]', "model.lora={rank=2, text_encoder=true}", "stage.optimizer=adamw", "stage.lr=1e-3"],
    "sharded": [
        "stage.precision=bf16", "stage.shard_state=true", "stage.ema={ sigma_rel = [0.1, 0.2] }", "stage.ema_snapshots=4",
        "sample.weights=ema", "validate.held_out=4", "validate.every=2", 'stage.train=["unet", "text_encoder"]',
        "stage.grad_clip=0.5", "stage.canary_every=2",
    ],
    # Its steps change weights by 1e-30, so what is saved is the fit to the base's flow.
    "flow": [
        "model.prediction=flow", "stage.teacher=base", "stage.optimizer=lion", "stage.lr=1e-30", "stage.until=2",
        "sample.prompts=[]", "export.single_file=false",
    ],
    "buckets": ["stage.optimizer=lion", "stage.lr=3e-6", "data.resolution=32", "data.buckets={ min = 16, max = 64, step = 8 }"],
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, tiny_model, images):
    """The overrides of each case for one config, whose images are cached."""
    folder = tmp_path_factory.mktemp("ranks")
    path = job(folder, tiny_model, images, STAGE)
    other = folder / "other"
    other.mkdir()
    for i, size in enumerate([(60, 40), (40, 60), (64, 40), (40, 64), (50, 50)] * 2):
        Image.effect_noise(size, 60).convert("RGB").save(other / f"{i}.png")
    shapes = [f'data.folders=["{images}", "{other}"]', f'cache.dir="{folder / "shapes"}"']
    cases = {name: keys + shapes * (name == "buckets") for name, keys in CASES.items()}
    for keys in cases.values():
        cache(load_config(path, keys), Console(file=StringIO()))
    return path, cases


def train_cases(path: str, folder: str, *lines: str) -> None:
    """Train a run in `folder` for each line, the overrides of which are separated by semicolons, on this rank."""
    with joined_ranks() as ranks:
        for line in lines:
            name, *keys = line.split(";")
            train(load_config(path, [*keys, f"run={folder}/{name}"]), ranks=ranks)


def train_on(world: int, folder: Path, path: Path, cases: dict[str, list[str]]) -> str:
    """Run `train_cases` on ranks. Return the printed text."""
    folder.mkdir(exist_ok=True)
    arguments = [str(path), str(folder), *(";".join([name, *keys]) for name, keys in cases.items())]
    files = [str(folder / "out"), str(folder / "err")]
    with store_of_ranks(world) as shared:
        codes = ended(start_ranks(shared, "call", __file__, "train_cases", arguments, files), 300)
    assert codes == [0] * world, Path(files[1]).read_text()
    return Path(files[0]).read_text()


def inputs(run: Path) -> list[list[object]]:
    """Return what the steps of a run have computed with."""
    return [[row[key] for key in ("step", "images", "order", "timesteps", "noise")] for row in rows_of(run)]


def shown(run: Path) -> dict[str, bytes]:
    """Return the results of validation and the samples of a run."""
    return {path.name: path.read_bytes() for path in (*run.glob("validation.jsonl"), *run.glob("samples/*"))}


def test_any_number_of_ranks_writes_the_same_files(tmp_path, jobs):
    path, cases = jobs
    text = train_on(2, tmp_path / "two", path, cases)
    train_on(1, tmp_path / "one", path, {name: [*keys, "stage.micro_batch=2"] for name, keys in cases.items()})
    for name in cases:
        alone, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert inputs(alone) == inputs(two)
        torch.testing.assert_close(final(two), final(alone), rtol=1e-5, atol=1e-5)
        assert checkpoint_steps(two) == ([2] if name == "flow" else [2, 4])
        assert sorted(file.name for file in alone.rglob("*")) == sorted(file.name for file in two.rglob("*"))
        if name == "sharded":  # d, in fp64, may differ in its last bits
            exact = [{key: t for key, t in final(run).items() if t.dtype != torch.float64} for run in (alone, two)]
            assert same(*exact) and rows_of(alone, "validation.jsonl") == rows_of(two, "validation.jsonl")
            snapshots = [sorted((run / "snapshots").iterdir()) for run in (alone, two)]
            assert [len(files) for files in snapshots] == [4, 4]
            assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*snapshots, strict=True))
            continue
        if name == "flow":
            before = load_model(ModelTable(base=str(load_config(path).model.base))).unet.state_dict()
            fits = [load_model(ModelTable(base=str(run / "model"))).unet.state_dict() for run in (alone, two)]
            assert same(*fits) and {key for key in before if (before[key] - fits[0][key]).abs().max() > 1e-20} == set(LAYERS)
        # In the others, matmuls add to the sums before they have added up their own rows: with few columns, or many rows.
        if name not in ("lora", "buckets"):
            assert same(final(alone), final(two)) and rows_of(alone) == rows_of(two)
            assert shown(alone) == shown(two)
    assert text.count("samples: ") == len(cases) - 1 + 3 and text.count("validation at step") == 6  # by rank 0 only
    assert text.count("fitted to the base's flow") == 1
    assert len(shown(tmp_path / "two/dlion")) == 1 + 3


def train_with_an_error(*words: str) -> None:
    """Run the command line. On rank 1, a weight changes in the third step."""
    call = Step.__call__

    def faulty_call(step: Step, batch: Batch, number: int) -> StepResult:
        result = call(step, batch, number)
        if number == 2 and os.environ["RANK"] == "1":
            step.components["unet"].master_hi[5] += 1
        return result

    Step.__call__ = faulty_call
    sys.argv = ["fastsd", *words]
    cli.main()


def command(path: Path, run: Path, *keys: str) -> list[str]:
    return ["train", str(path), f"run={run}", *CASES["dlion"], *keys]


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def test_a_signal_to_one_rank_stops_all_and_any_number_goes_on(tmp_path, jobs):
    path, _ = jobs
    run, output = tmp_path / "run", tmp_path / "out"
    with store_of_ranks(2) as shared:
        ranks = start_ranks(shared, "command_line", command(path, run, "stage.until=1000", "stage.sample_every=0"), output)
        wait_for(lambda: bool(checkpoint_steps(run)))
        os.kill(ranks[1].pid, signal.SIGUSR2)
        wait_for(lambda: len(list((run / "samples").glob("*.png"))) == 1)
        os.kill(ranks[1].pid, signal.SIGTERM)
        assert ended(ranks) == [130, 130]
    assert len(list((run / "samples").glob("*.png"))) == 1 and not list(run.glob("trigger.*"))
    stopped = checkpoint_steps(run)[-1]
    assert output.read_text().count(f"stopped at step {stopped}") == 1
    with store_of_ranks(4) as shared:
        words = command(path, run, "stage.sample_every=0", f"stage.until={stopped + 1}", "stage.shard_state=true")
        assert ended(start_ranks(shared, "command_line", words, output)) == [0] * 4
    whole = tmp_path / "whole"
    with store_of_ranks(1) as shared:
        words = command(path, whole, f"stage.until={stopped + 1}", "stage.micro_batch=2", "stage.sample_every=0")
        assert ended(start_ranks(shared, "command_line", words, output)) == [0]
    assert inputs(run) == inputs(whole)
    torch.testing.assert_close(final(run), final(whole), rtol=1e-5, atol=1e-5)


def test_ranks_go_back_to_a_checkpoint(tmp_path, jobs):
    path, _ = jobs
    run, output = tmp_path / "run", tmp_path / "out"
    words = command(path, run, "stage.micro_batch=2")[1:]
    train(load_config(path, words[1:]), Console(file=StringIO()))
    whole = final(run)
    assert train_ranks(2, output, *words, "stage.until=1", "--from", "2")[0] == 2
    text = output.read_text()  # by the rank that knows the run's folder
    assert says(text, "stage-beyond-end", folder=run) and text.count("fastsd: ") == 1
    assert train_ranks(2, output, *words, "--from", "2") == [0, 0], output.read_text()
    assert "went back to step-00000002" in output.read_text() and same(final(run), whole)


def test_ranks_end_together_with_one_sentence(tmp_path, jobs):
    """A rank is killed; all have the same error."""
    path, _ = jobs
    output = tmp_path / "killed"
    with store_of_ranks(2) as shared:
        ranks = start_ranks(shared, "command_line", command(path, tmp_path / "run", "stage.until=1000"), output)
        wait_for(lambda: bool(checkpoint_steps(tmp_path / "run")))
        ranks[0].kill()
        ranks[0].join()
        time.sleep(1)
        ranks[1].terminate()  # as torchrun does
        assert ended(ranks) == [-signal.SIGKILL, 2]
    lost = f"rank 0 (process {ranks[0].pid} on {platform.node()})"
    assert says(output.read_text(), "rank-lost", rank=lost) and output.read_text().count("fastsd: ") == 1
    assert "gloo" not in output.read_text()

    output = tmp_path / "same"
    with store_of_ranks(3) as shared:
        assert ended(start_ranks(shared, "command_line", command(path, tmp_path / "run"), output)) == [2] * 3
    assert says(output.read_text(), "ranks-batch", ranks=3, sizes="3 or 6") and output.read_text().count("fastsd: ") == 1

    for key in ("model.base=nowhere", "stage.btach=4"):  # found before the ranks are connected, and after
        output = tmp_path / key
        with store_of_ranks(2) as shared:
            assert ended(start_ranks(shared, "command_line", command(path, tmp_path / "other", key), output)) == [2, 2]
        assert output.read_text().count("fastsd: ") == 1, output.read_text()


def test_ranks_with_different_weights_save_nothing(tmp_path, jobs):
    path, _ = jobs
    words = command(path, tmp_path / "run")
    files = [str(tmp_path / "out"), str(tmp_path / "out")]
    with store_of_ranks(2) as shared:
        assert ended(start_ranks(shared, "call", __file__, "train_with_an_error", words, files)) == [2, 2]
    text = (tmp_path / "out").read_text()
    assert says(text, "ranks-differ", step=4, rank=1, others="rank 0") and text.count("fastsd: ") == 1
    assert checkpoint_steps(tmp_path / "run") == [2]


def train_short_of_memory(path: str, folder: str) -> None:
    """Train with sharded state. Memory is missing on one rank after another, and rank 1 cannot read its fourth batch."""
    output, empty, following, create = StringIO(), Shards.empty, Stream.__next__, Step._optimizer
    fails, reads = {True: 3, False: 3}, []  # allocations that fail: of averages on rank 1, of files on rank 0

    def little_memory(shards: Shards, *count: int, everywhere: bool = False, **options) -> torch.Tensor:
        if shards.ranks.rank == int(everywhere) and fails[everywhere]:
            fails[everywhere] -= 1
            raise torch.OutOfMemoryError("out of memory")
        return empty(shards, *count, everywhere=everywhere, **options)

    def unreadable(stream: Stream) -> Batch:
        reads.append(stream)
        if len(reads) == 4 and os.environ["RANK"] == "1":
            raise UserError("row-unreadable", "image 7 cannot be read")
        return following(stream)

    def start_without_memory(step: Step, name: str) -> FastOptimizer:
        if step.ranks.rank == 1:
            raise torch.OutOfMemoryError("out of memory")
        return create(step, name)

    def module_without_memory(run: Run) -> list[torch.nn.Module]:
        if run.ranks.rank == 1:
            raise torch.OutOfMemoryError("out of memory")
        return []

    starts = [
        ("when the run was opened on cpu", Run, "resident", property(module_without_memory)),
        ("at the start of stage 'one'", Step, "_optimizer", start_without_memory),
    ]
    with joined_ranks() as ranks, pytest.MonkeyPatch.context() as patch:
        config = load_config(path, [*CASES["sharded"], "stage.keep_checkpoints=9", f"run={folder}/run"])
        command = "fastsd plan CONFIG --gpus 2 --machines 1"
        for cause, *replaced in starts:
            fields = {"cause": cause, "reason": "rank 1: out of memory", "command": command}
            with pytest.MonkeyPatch.context() as started, refused("out-of-memory", **fields):
                started.setattr(*replaced)
                train(config, Console(file=output), ranks=ranks)
        patch.setattr(Shards, "empty", little_memory)
        patch.setattr(Stream, "__next__", unreadable)
        with pytest.raises(UserError, match="image 7 cannot be read") as info:
            train(config, Console(file=output), ranks=ranks)
        assert info.value.code == "row-unreadable"
    if ranks.main:
        Path(folder, "text").write_text(output.getvalue())


def test_ranks_agree_on_what_one_cannot_do(tmp_path, jobs):
    """They end at the opening of a run or the start of a stage, and skip evaluation, snapshots and a checkpoint.

    They save before a bad batch.
    """
    path, _ = jobs
    with store_of_ranks(2) as shared:
        arguments, files = [str(path), str(tmp_path)], [str(tmp_path / "out"), str(tmp_path / "err")]
        codes = ended(start_ranks(shared, "call", __file__, "train_short_of_memory", arguments, files))
    assert codes == [0, 0], (tmp_path / "err").read_text()
    text = (tmp_path / "text").read_text()
    assert says(text, "evaluation-skipped", task="validation")
    for step in (1, 2):
        assert says(text, "snapshot-not-written", step=step, reason="rank 0: out of memory")
    assert says(text, "checkpoint-not-saved", step=2, reason="rank 0: out of memory")
    assert checkpoint_steps(tmp_path / "run") == [3]
    assert {row["step"] for row in rows_of(tmp_path / "run", "validation.jsonl")} == {2}


def train_apart(path: str, folder: str) -> None:
    """Train a run whose folder another machine does not see."""
    with joined_ranks() as ranks:
        train(load_config(path, [f"run={folder}/{ranks.rank}", *CASES["dlion"]]), ranks=ranks)


def test_a_folder_that_is_not_shared_is_refused(tmp_path, jobs):
    path, _ = jobs
    with store_of_ranks(2) as shared:
        arguments, files = [str(path), str(tmp_path)], [str(tmp_path / "out"), str(tmp_path / "err")]
        codes = ended(start_ranks(shared, "call", __file__, "train_apart", arguments, files))
    assert sorted(codes) == [1, 2]  # outside of the command line, the error of one is a traceback
    assert says((tmp_path / "err").read_text(), "ranks-not-shared", rank=1)
    assert not (tmp_path / "1").exists() and not list((tmp_path / "0").glob(".*"))


def launch_lines(*words: str) -> list[list[str]]:
    """Return the lines of the page by which torchrun starts a run: on one machine, and on several. They train `words` here."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    lines = re.findall(
        r"^    torchrun (.*) train configs/xlsd.toml$", (ROOT / "docs/several-gpus.md").read_text(), re.MULTILINE
    )
    lines = [line.replace("--nnodes 4", "--nnodes 2").replace("node1:29500", endpoint) for line in lines]
    ranks = [2, 1]
    lines = [line.replace("--nproc-per-node 8", f"--nproc-per-node {n}") for line, n in zip(lines, ranks, strict=True)]
    return [[*line.split(), *words] for line in lines]


def test_torchrun_starts_ranks_again_after_one_is_killed(tmp_path, jobs):
    """The line for one machine. The run ends with the bits of one that nothing has disturbed, without a command of the user."""
    path, _ = jobs
    run, whole = tmp_path / "run", tmp_path / "whole"
    keys = ["stage.until=16", "stage.sample_every=0", "validate.every=8"]
    torchrun = start_torchrun(launch_lines(*command(path, run, *keys))[0], tmp_path / "out", tmp_path / "err")
    wait_for(lambda: bool(checkpoint_steps(run)) or not torchrun.is_alive())
    _, killed = psutil.Process(torchrun.pid).children()  # in the order of their start
    killed.kill()
    assert ended([torchrun]) == [0], (tmp_path / "err").read_text()
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert train_ranks(2, tmp_path / "text", *command(path, whole, *keys)[1:]) == [0, 0]
    assert same(final(run), final(whole)) and rows_of(run) == rows_of(whole) and shown(run) == shown(whole)
    assert len(re.findall("^ranks ", out, re.MULTILINE)) == 2 and says(out, "run-resumed")
    advice = "torchrun starts all ranks again from the last checkpoint"
    assert (
        says(err, "rank-lost", rank=f"rank 1 (process {killed.pid} on {platform.node()})", advice=advice)
        and err.count("fastsd: ") == 1
    )
    assert err.count("loading PyTorch") == 2 and "FutureWarning" not in err, err  # and the progress of one rank


def test_torchrun_starts_ranks_on_several_machines(tmp_path, jobs):
    path, _ = jobs
    line, output = launch_lines(*command(path, tmp_path / "run"))[1], tmp_path / "out"
    assert ended([start_torchrun(line, output, output) for _ in range(2)]) == [0, 0], output.read_text()
    assert checkpoint_steps(tmp_path / "run") == [2, 4] and output.read_text().count("ranks ") == 1
