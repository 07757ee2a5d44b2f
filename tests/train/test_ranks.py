"""The environment of ranks, the refusal of what several ranks cannot train, and sums of gradients: their bits and bytes."""

import json
import os
import platform
import socket
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import ended, start_ranks, store_of_ranks
from sentences import refused
from step_inputs import OPTIMIZERS, batches, stage_of
from tiny import ONE_LEVEL, make_tiny_model

from fastsd.data.loader import Batch
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes, empty_model
from fastsd.model.unet import UNetConfig
from fastsd.train import shards
from fastsd.train.gradient_sums import GradientSums
from fastsd.train.ranks import ALONE, TIMEOUT, Ranks, check_stage, joined_ranks, local_device, ranks_of
from fastsd.train.step import Step
from fastsd.train.trainable import Layout
from fastsd_kernels import TRITON

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SHARE = 2  # images of each rank


def test_ranks_come_from_the_environment_of_torchrun():
    assert ranks_of({}) == ranks_of({"WORLD_SIZE": "1"}) == ALONE and ALONE.main
    assert ranks_of(TWO) == Ranks(1, 2, 1, 2) and not ranks_of(TWO).main
    for name in TWO.keys() - {"WORLD_SIZE"}:
        with refused("ranks-variable", ranks=2, name=name):
            ranks_of({key: value for key, value in TWO.items() if key != name})
    for name, value in (("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("RANK", "-1")):
        with refused("ranks-variable", name=name, value=repr(value)):
            ranks_of(TWO | {name: value})


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    third = Ranks(10, 12, 2, 3)
    assert [local_device(name, third) for name in ("auto", "cuda", "cpu")] == ["cuda:2", "cuda:2", "cpu"]
    assert local_device("cuda:1", ALONE) == "cuda:1"
    with refused("ranks-device", device="'cuda:1'", ranks=12):
        local_device("cuda:1", third)
    with refused("ranks-too-many", ranks=4, host=platform.node(), gpus="3 GPUs", gpus_3=3):
        local_device("auto", Ranks(0, 4, 0, 4))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert local_device("cpu", third) == "cpu" and local_device("cuda", ALONE) == "cuda"
    with refused("ranks-no-nccl", ranks=12):
        local_device("auto", third)


def test_nccl_waits_longer_than_the_sentence_about_a_rank_that_hangs(monkeypatch):
    waits = []
    backend = SimpleNamespace(_set_default_timeout=waits.append)
    group = SimpleNamespace(_get_backend=lambda device: backend)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_group", lambda: group)
    for ranks, device in ((ALONE, "cuda"), (Ranks(0, 2, 0, 2), "cpu"), (Ranks(0, 2, 0, 2), "cuda:1")):
        ranks.hear_hosts_first(torch.device(device))
    assert len(waits) == 1 and waits[0] > TIMEOUT


def test_a_stage_that_ranks_cannot_share_is_refused():
    check_stage(stage_of(batch=12), "one", Ranks(0, 4, 0, 4))
    check_stage(stage_of(fused_backward=True), "one", ALONE)
    with refused("ranks-batch", batch=10, ranks=4, sizes="8 or 12", counts="1, 2, 5, 10"):
        check_stage(stage_of(batch=10), "one", Ranks(0, 4, 0, 4))
    with refused("ranks-batch", batch=2, sizes="4", counts="1, 2"):
        check_stage(stage_of(batch=2), "one", Ranks(0, 4, 0, 4))
    with refused("ranks-fused", ranks=2):
        check_stage(stage_of(fused_backward=True), "one", Ranks(0, 2, 0, 2))


def test_sharded_state_takes_a_share_of_the_memory():
    """SD1.5's UNet in bf16 with D-Lion and an EMA, on one of eight ranks."""
    kept = []
    for shard_state in (False, True):
        empty = empty_model(Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE), TRITON)
        stage = stage_of(batch=8, precision="bf16", ema=0.9, shard_state=shard_state, train=["unet"])
        step = Step(empty, stage, 9, seed=0, ranks=Ranks(3, 8, 3, 8), cached_text=True)
        step.optimizers["unet"].allocate_state()
        roles = step.tensors_by_role().items()
        kept.append({role: sum(t.numel() * t.element_size() for t in tensors) for role, tensors in roles})
    count, piece = kept[0]["ema"] // 4, shards.sharded_size(kept[0]["ema"] // 4, 8)
    numbers = 8 + 8  # of D-Lion, in bytes
    assert kept[0] == {"weights": 4 * count, "gradients": 4 * count, "state": 8 * count + numbers, "ema": 4 * count}
    whole = 8 * piece  # the arena ends with whole blocks of all ranks
    weights = 2 * whole + 2 * piece
    assert kept[1] == {"weights": weights, "gradients": 4 * whole, "state": 8 * piece + numbers, "ema": 4 * piece}
    assert 0 <= whole - count < 8 * shards.BLOCK and 859_000_000 < count < 861_000_000


def sent_bytes() -> int:
    """Count the bytes that this process has sent through its connections, as the kernel does, each of them once."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(number))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, repeated = struct.unpack_from("QQ", information, 200)  # tcpi_bytes_sent, tcpi_bytes_retrans
                    total += sent - repeated
        except OSError:
            continue
    return total


def train_steps(model: str, output: str, batch: str, *cases: str) -> None:
    """Train three steps of each case as one rank, and store what they have made and sent."""
    with joined_ranks() as ranks:
        stored = [train_case(f"{model}-{ranks.rank}", int(batch), ranks, **json.loads(case)) for case in cases]
        torch.save(stored, f"{output}-{ranks.rank}")


def fail_once(weight: torch.Tensor) -> None:
    """Run out of memory when the backward reaches a weight."""

    def fail(_: torch.Tensor) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = weight.register_post_accumulate_grad_hook(fail)


def run_out_of_memory(model: str, output: str, size: str) -> None:
    """Train three steps with four images a rank, and store the weights and the state.

    Args:
        size: images per forward at the start. If it is 4, rank 1 runs out of memory in the first two steps: at the start of the
            backward, when nothing has been sent, and at its end, when most chunks have been.
    """
    shards.CHUNK = 40_000
    with joined_ranks() as ranks:
        loaded = make_tiny_model(Path(f"{model}-{ranks.rank}"), UNetConfig(**ONE_LEVEL))
        stage = stage_of(batch=8, micro_batch=4, optimizer="dlion", d0=1e-4)
        step = Step(loaded, stage, 4, seed=0, micro_batch_size=int(size), ranks=ranks, warn=print)
        weights = list(loaded.unet.parameters())
        images = slice(4 * ranks.rank, 4 * (ranks.rank + 1))
        for number, whole in enumerate(batches(4, 8)):
            parts = whole.latents_BCHW, whole.token_ids_BL, whole.positions_B, whole.captions
            batch = Batch(*(part[images] for part in parts))
            if ranks.rank == 1 and (number == 3 or (size == "4" and number < 2)):
                fail_once(weights[0 if number else -1])
            if number == 3:
                with refused("out-of-memory", cause="even with one image per forward", reason="rank 1: CUDA out of memory"):
                    step(batch, number)
                break
            if size != "4" and number == 1:
                step.micro_batch_size = 1
            step(batch, number)
            assert step.micro_batch_size == (1 if number else 2)
        torch.save(
            [tensor for role in ("weights", "state") for tensor in step.tensors_by_role()[role]], f"{output}-{ranks.rank}"
        )


class OneRank:
    """The connections of one rank with itself. They count what is sent."""

    rank, world, local_world = 0, 1, 1

    def __init__(self) -> None:
        self.sent = 0

    def gather(self, received: torch.Tensor, tensor: torch.Tensor) -> None:
        self.sent += 1
        received.copy_(tensor)

    exchange = gather

    def finish(self, works: list) -> None:
        pass


def test_sums_of_a_step_that_ends_with_an_error(monkeypatch):
    """They leave nothing behind, and memory that runs out at their end costs no exchange that other ranks wait for."""
    weight, ranks = torch.nn.Parameter(torch.ones(4)), OneRank()
    layout = Layout([weight])
    arena = SimpleNamespace(flat=torch.zeros(layout.size))
    sums = GradientSums(ranks, [SimpleNamespace(gradients=arena, shards=None, weights=[weight], layout=layout)])
    sums.begin()
    weight.sum().backward()
    assert sums.finish(torch.full((), 2.0)) == 2 and sums.early == 0
    sent_in_a_step = ranks.sent

    sums.begin()
    sums.discard()
    weight.sum().backward()  # of a micro-batch that is not the last
    assert ranks.sent == sent_in_a_step

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    sums.begin()
    weight.sum().backward()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "cat", full)
        sums.finish(torch.zeros(()))
    sums.abandon()
    assert ranks.sent == 2 * sent_in_a_step
    sums.begin()
    weight.sum().backward()
    assert sums.finish(torch.full((), 3.0)) == 3 and sums.early == 1


def test_all_ranks_take_a_smaller_micro_batch_when_one_runs_out_of_memory(tmp_path):
    """The bits are those of ranks that had it from the start of the step. Without a smaller one, all end."""
    results = []
    for size in ("2", "4"):
        with store_of_ranks(2) as shared:
            arguments = [str(tmp_path / "model"), str(tmp_path / size), size]
            files = [str(tmp_path / "out"), str(tmp_path / "err")]
            codes = ended(start_ranks(shared, "call", __file__, "run_out_of_memory", arguments, files))
        assert codes == [0, 0], (tmp_path / "err").read_text()
        results += [torch.load(f"{tmp_path / size}-{rank}") for rank in range(2)]
    assert all(same(tensors, results[0]) for tensors in results)


def train_case(folder: str, batch: int, ranks: Ranks, chunk: int, **keys) -> dict[str, Any]:
    shards.CHUNK = chunk
    loaded = make_tiny_model(Path(folder), UNetConfig(**ONE_LEVEL))
    stage = stage_of(batch=batch, micro_batch=SHARE, grad_clip=0.5, ema=0.5, **keys)
    step = Step(loaded, stage, 3, seed=0, ranks=ranks)
    images, early, before = slice(ranks.rank * step.images, (ranks.rank + 1) * step.images), [], sent_bytes()
    losses = []
    for number, whole in enumerate(batches(3, stage.batch)):
        # So small that a matmul adds up all rows of its result before it adds to the sums.
        latents_BCHW = whole.latents_BCHW[images, :, :8, :8].contiguous()
        shared = Batch(latents_BCHW, whole.token_ids_BL[images], whole.positions_B[images], whole.captions[images])
        result = step(shared, number)
        losses += [result.loss, result.grad_norm]
        early.append(step._sums.early if step._sums else 0)
    ranks.wait()  # until the others have received everything, which the kernel may still hold back
    counts = {"early": early, "sent": sent_bytes() - before, "chunks": len(step._sums._chunks) if step._sums else 0}
    counts["predicted"] = sum(part.sent_bytes for part in (step._sums, step._shards) if part)
    kept = {role: sum(t.numel() * t.element_size() for t in ts) for role, ts in step.tensors_by_role().items()}
    tensors = [*losses, *(tensor for role in step.tensors_by_role().values() for tensor in role)]
    state = {key: tensor.clone() for key, tensor in step.state_dict().items()}
    exact = {key: tensor.clone() for key, tensor in step.components["unet"].state().items()} if ranks.main else {}
    step.release()
    weights = {key: weight.clone() for key, weight in loaded.unet.state_dict().items()}
    return counts | {"losses": losses, "tensors": tensors, "kept": kept, "state": state, "exact": exact, "weights": weights}


def train_on(world: int, folder: Path, *cases: dict[str, Any], batch: int, machines: int = 1) -> list[list[dict[str, Any]]]:
    """Run `train_steps` on ranks, and return the results of each rank and case."""
    with store_of_ranks(world) as shared:
        shared["LOCAL_WORLD_SIZE"] = str(world // machines)
        arguments = [str(folder / "model"), str(folder / "rank"), str(batch), *map(json.dumps, cases)]
        ranks = start_ranks(shared, "call", __file__, "train_steps", arguments, [str(folder / "out"), str(folder / "err")])
        codes = ended(ranks)
    assert codes == [0] * world, (folder / "err").read_text()
    return [torch.load(f"{folder}/rank-{rank}") for rank in range(world)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


DLION = {"optimizer": "dlion", "d0": 1e-4}
PLAIN = {**DLION, "chunk": 40_000}
SHARDED = [
    {"chunk": 40_000, "precision": precision, "shard_state": True, **keys}
    for precision, keys in (("bf16", DLION), ("fp32", {"optimizer": "lion", "lr": 1e-3}), ("bf16", OPTIMIZERS["adamw"]))
]
WITHOUT_SHARDS = [{**case, "shard_state": False} for case in SHARDED]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_have_the_bits_of_micro_batches_and_send_what_is_predicted(tmp_path, world):
    """Three ranks do not divide the arena, so a few of its elements are summed apart."""
    ((alone, *unsharded),) = train_on(1, tmp_path, PLAIN, *WITHOUT_SHARDS, batch=SHARE * world)
    for rank, (plain, *sharded) in enumerate(train_on(world, tmp_path, PLAIN, *SHARDED, batch=SHARE * world)):
        assert same(plain["tensors"], alone["tensors"])
        for case in (plain, *sharded):
            assert case["early"] == [0, case["chunks"], case["chunks"]] and case["chunks"] > 1
            assert case["predicted"] <= case["sent"] / 3 < 1.05 * case["predicted"]
        for case, expected in zip(sharded, unsharded, strict=True):
            assert same(case["losses"], expected["losses"]) and same_state(case["weights"], expected["weights"])
            assert rank or (same_state(case["exact"], expected["exact"]) and same_state(case["state"], expected["state"]))
            whole, kept = expected["kept"]["ema"] // 4, case["kept"]
            piece = shards.sharded_size(whole, world)
            assert kept["ema"] == 4 * piece < expected["kept"]["ema"] and whole <= world * piece < whole + world * shards.BLOCK
            assert abs(kept["state"] / expected["kept"]["state"] - piece / whole) < 1e-4


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Compare bits, but those of D-Lion's two numbers, whose sums pieces round elsewhere, up to 12 digits."""
    assert first.keys() == second.keys()
    equal = [torch.equal(first[key], second[key]) for key in first if first[key].dtype != torch.float64]
    close = [torch.allclose(first[key], second[key], rtol=1e-12) for key in first if first[key].dtype == torch.float64]
    return all(equal + close)


def test_ranks_on_several_machines_repeat_their_bits(tmp_path):
    cases = PLAIN, SHARDED[0]
    first, again = (train_on(2, tmp_path, *cases, batch=2 * SHARE, machines=2) for _ in range(2))
    (alone,) = train_on(1, tmp_path, PLAIN, WITHOUT_SHARDS[0], batch=2 * SHARE)
    for rank, results in enumerate(first):
        for i, case in enumerate(results):
            repeated = again[rank][i]
            assert same(case["tensors"], repeated["tensors"]) and same_state(case["weights"], first[0][i]["weights"])
            assert rank or same_state(case["state"], repeated["state"])
            for key, weight in alone[i]["weights"].items():
                assert torch.allclose(case["weights"][key], weight, atol=1e-6)
            assert case["early"] == [0, case["chunks"], case["chunks"]] and case["predicted"] <= case["sent"] / 3
            assert i or case["sent"] / 3 < 1.05 * case["predicted"]  # gloo's reduce-scatter sends as much as an all-reduce
