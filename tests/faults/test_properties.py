"""Properties of what a run rests on: commits of checkpoints, configs there and back, and the partition of each epoch."""

import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny import ONE_LEVEL, make_tiny_model

from fastsd.config.schema import StageTable, dump_config, parse_config
from fastsd.data.cache import Group
from fastsd.data.loader import Loader
from fastsd.errors import UserError
from fastsd.run import checkpoint
from fastsd.run.checkpoint import RunProgress


class Killed(BaseException):
    """The end of a process. No cleanup after it changes the disk either."""


@contextmanager
def killed_at(number):
    """Kill the block at its `number`-th call that changes names or flushes. None = never. Yield a list with the reason."""
    calls, death = [], []

    def dying(function):
        def call(*args, **kwargs):
            calls.append(function)
            if death or len(calls) == number:
                death.append("killed")
                raise Killed
            return function(*args, **kwargs)

        return call

    with patch.multiple(
        os, **{name: dying(getattr(os, name)) for name in ("fsync", "rename", "replace", "link", "unlink", "rmdir")}
    ):
        with patch.object(shutil, "rmtree", dying(shutil.rmtree)):
            with suppress(Killed):
                yield death


KILLS = st.one_of(st.none(), st.integers(1, 60))


class Commits(RuleBasedStateMachine):
    """Checkpoints that are saved, retained, damaged and killed in any order. A start always finds the newest whole one."""

    model = None

    @initialize()
    def begin(self):
        self.temporary = TemporaryDirectory()
        self.folder, self.step = Path(self.temporary.name, "checkpoints"), 0
        self.whole: dict[int, bool] = {}  # step -> it must stay
        if Commits.model is None:
            from fastsd.model.unet import UNetConfig

            Commits.model = make_tiny_model(Path(self.temporary.name, "base"), UNetConfig(**ONE_LEVEL))

    def on_disk(self):
        return {int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(self.folder)}

    @rule(keep=st.booleans(), kill=KILLS)
    def save(self, keep, kill):
        self.step += 1
        weights, state = dict.fromkeys(("unet", "text_encoder"), dict), {"loss": torch.tensor(float(self.step))}
        with killed_at(kill) as death:
            checkpoint.save(self.folder, RunProgress(step=self.step), self.model, weights, {"unet"}, state, keep=keep)
        if not death or self.step in self.on_disk():
            self.whole[self.step] = keep

    @rule(count=st.integers(1, 3), kill=KILLS)
    def retain(self, count, kill):
        newest = sorted(self.whole)[-count:]
        with killed_at(kill) as death:
            checkpoint.retain(self.folder, count, set())
        staying = {step for step, stays in self.whole.items() if stays} | set(newest)
        assert staying <= self.on_disk() and (death or staying == self.on_disk())
        self.whole = {step: stays for step, stays in self.whole.items() if step in self.on_disk()}

    @precondition(lambda self: len(self.whole) > 1)
    @rule()
    def damage(self):
        path = self.folder / checkpoint.name_of(max(self.whole)) / checkpoint.TENSORS  # no other checkpoint has a copy
        path.write_bytes(path.read_bytes()[:-1])
        del self.whole[max(self.whole)]

    @invariant()
    def a_start_continues_with_the_newest_whole_one(self):
        newest = checkpoint.newest(self.folder) if hasattr(self, "folder") and self.folder.exists() else None
        assert (newest[1].step if newest else None) == max(getattr(self, "whole", {}), default=None)
        if newest:
            assert checkpoint.load_state(newest[0])["loss"] == newest[1].step
            assert self.on_disk() == self.whole.keys() and not list(self.folder.glob(".tmp-*"))

    def teardown(self):
        if hasattr(self, "temporary"):
            self.temporary.cleanup()


TestCommits = pytest.mark.slow(Commits.TestCase)
TestCommits.settings = settings(max_examples=12, stateful_step_count=10, deadline=None, derandomize=True)


def optional(**values):
    return st.fixed_dictionaries({}, optional=values)


FRACTION = st.floats(0, 1, exclude_max=True)
TRAIN = st.lists(
    st.sampled_from(["unet", "text_encoder", "unet.mid", "unet.up_blocks.1.*"]), min_size=1, max_size=3, unique=True
)
UNTIL = {"until": st.sampled_from([7, "2e", "1.5 epochs", "640 images"])}
STAGE = {
    "precision": st.sampled_from(["fp32", "tf32", "bf16"]),
    "batch": st.integers(1, 64), "optimizer": st.sampled_from(["dlion", "lion", "adamw"]),
    "betas": st.lists(FRACTION, min_size=2, max_size=2), "d0": st.floats(1e-9, 1e-3), "ema": FRACTION,
    "caption_dropout": FRACTION, "schedule": st.sampled_from(["constant", "cosine"]),
    "state": st.sampled_from(["reset", "carry"]), "checkpoint_at": st.lists(st.sampled_from(["1e", 5000, "10e"]), max_size=2),
    "tag_separator": st.text(min_size=1, max_size=3), "timestep_range": st.sampled_from([[0, 1000], [100, 900]]),
    "loss": st.sampled_from(["mse", "huber"]),
}  # fmt: skip
LORA = {"rank": st.integers(1, 64), "alpha": st.floats(0.1, 64), "text_encoder": st.booleans()}
TABLES = {
    "run": st.text(min_size=1), "seed": st.integers(0, 2**63 - 1), "deterministic": st.booleans(),
    "sample": optional(prompts=st.lists(st.text(), max_size=3), guidance=st.floats(0, 30)),
    "validate": st.fixed_dictionaries({"held_out": st.integers(1, 99), "every": st.sampled_from([5, "30m", "1e"])}),
    "export": optional(title=st.text(), dtype=st.sampled_from(["fp16", "bf16", "fp32"])),
}  # fmt: skip
ALWAYS = {
    "model": st.fixed_dictionaries({"base": st.text(min_size=1)}, optional={"lora": optional(**LORA)}),
    "data": st.just({"folders": ["a", {"path": "b", "repeats": 2}]}),
    "stage": st.lists(
        st.fixed_dictionaries({"train": TRAIN, "lr": st.floats(1e-9, 1), **UNTIL}, optional=STAGE), min_size=1, max_size=3
    ),
}
CONFIG = st.fixed_dictionaries(ALWAYS, optional=TABLES)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(CONFIG)
def test_a_config_survives_the_way_to_the_disk_and_back(table):
    try:
        config = parse_config(table, "job.toml")
    except UserError:
        assume(False)  # no valid config
    text = dump_config(config)
    assert parse_config(json.loads(text), "config.json") == config and dump_config(parse_config(json.loads(text), "")) == text


def samples_of(counts):
    """Return a stub of a cache with one shape for each count. A latent holds its sample's number."""
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    groups = [Group((1, 1, width), 0, first, count) for width, (first, count) in enumerate(zip(firsts, counts, strict=True), 1)]

    def get(index_B, _):
        (shape,) = {group.shape for i in index_B.tolist() for group in groups if 0 <= i - group.first < group.count}
        return {"latents": index_B[:, None, None, None].expand(-1, *shape)}

    return SimpleNamespace(groups=groups, versions=1, get=get, variants=lambda index_B: [["a"] for _ in index_B])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=4), st.integers(1, 6), st.sampled_from([1, 2, 3, 4]), st.integers(0, 99)
)
def test_each_epoch_has_each_sample_once_for_any_count_buckets_batch_and_world(counts, share, world, seed):
    """The workers' parts of a batch are disjoint and of one shape. Each shape's sequence is one permutation after another."""
    batch, cache = share * world, samples_of(counts)
    stage = StageTable(train=["unet"], until=1, batch=batch)
    workers = [
        Loader(cache, lambda texts: torch.zeros(len(texts), 1), seed, stage, rank=rank, world=world) for rank in range(world)
    ]
    starts = [group.first for group in cache.groups]
    taken: list[list[int]] = [[] for _ in counts]
    batches = [sum(epoch * count // batch for count in counts) for epoch in range(4)]  # before each epoch
    for number in range(batches[-1]):
        parts = [worker.batch(number * batch, batch) for worker in workers]
        samples = [sample for part in parts for sample in part.latents_BCHW[:, 0, 0, 0].tolist()]
        assert [p for part in parts for p in part.positions_B.tolist()] == list(range(number * batch, (number + 1) * batch))
        (shape,) = {sum(start <= sample for start in starts) - 1 for sample in samples}
        taken[shape] += samples
        for epoch in [epoch for epoch in (1, 2, 3) if number + 1 == batches[epoch]]:
            for first, count, numbers in zip(starts, counts, taken, strict=True):
                times = [numbers.count(first + i) for i in range(count)]
                # Less than a batch of each shape is carried into the next epoch, and no sample occurs twice before another.
                assert 0 <= epoch * count - sum(times) < batch and max(times) - min(times) <= 1
