"""The environment of ranks, the refusal of what several ranks cannot train, and sums of gradients: their bits and bytes."""

import os
import socket
import struct
from pathlib import Path

import pytest
import torch
from ranks import ended, start_ranks, store_of_ranks
from sentences import refused, says
from step_inputs import batches, stage_of
from tiny import ONE_LEVEL, make_tiny_model

from fastsd.data.loader import Batch
from fastsd.model.unet import UNetConfig
from fastsd.train import gradient_sums
from fastsd.train.ranks import ALONE, Ranks, check_stage, graph_note, joined_ranks, local_device, ranks_of
from fastsd.train.step import Step

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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    third = Ranks(10, 12, 2, 3)
    assert [local_device(name, third) for name in ("auto", "cuda", "cpu")] == ["cuda:2", "cuda:2", "cpu"]
    assert local_device("cuda:1", ALONE) == "cuda:1"
    with refused("ranks-device", device="'cuda:1'", ranks=12):
        local_device("cuda:1", third)
    with refused("ranks-too-many", ranks=4, gpus=3, gpus_3=3):
        local_device("auto", Ranks(0, 4, 0, 4))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert says(graph_note(third, gpu, graph=True)[0], "ranks-no-graph", ranks=12)
    assert not graph_note(third, gpu, graph=False) + graph_note(third, cpu, graph=True) + graph_note(ALONE, gpu, graph=True)


def test_a_stage_that_ranks_cannot_share_is_refused():
    check_stage(stage_of(batch=12), "one", Ranks(0, 4, 0, 4))
    check_stage(stage_of(fused_backward=True), "one", ALONE)
    with refused("ranks-batch", batch=10, ranks=4, sizes="8 or 12", counts="1, 2, 5, 10"):
        check_stage(stage_of(batch=10), "one", Ranks(0, 4, 0, 4))
    with refused("ranks-batch", batch=2, sizes="4", counts="1, 2"):
        check_stage(stage_of(batch=2), "one", Ranks(0, 4, 0, 4))
    with refused("ranks-fused", ranks=2):
        check_stage(stage_of(fused_backward=True), "one", Ranks(0, 2, 0, 2))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), UNetConfig(**ONE_LEVEL))


def test_out_of_memory_ends_a_rank(model, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    step = Step(model, stage_of(optimizer="lion", lr=1e-3), 2, seed=0, ranks=Ranks(1, 2, 1, 2))
    monkeypatch.setattr(model.unet, "forward", forward)
    with refused("out-of-memory", cause="on rank 1, with 2 images per forward"):
        step(batches(1, 2)[0], 0)
    step.release()


def sent_bytes() -> int:
    """Count the bytes that this process has sent through its connections, as the kernel does."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(number))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", information, 200)[0]  # tcpi_bytes_sent
        except OSError:
            continue
    return total


def train_steps(model: str, output: str, chunk: str, batch: str) -> None:
    """Train three steps as one rank, and store the weights, the state and the counts of each rank."""
    gradient_sums.CHUNK = int(chunk)
    with joined_ranks() as ranks:
        loaded = make_tiny_model(Path(f"{model}-{ranks.rank}"), UNetConfig(**ONE_LEVEL))
        stage = stage_of(batch=int(batch), micro_batch=SHARE, optimizer="dlion", d0=1e-4, grad_clip=0.5, ema=0.5)
        step = Step(loaded, stage, 3, seed=0, ranks=ranks)
        images, early, before = slice(ranks.rank * step.images, (ranks.rank + 1) * step.images), [], sent_bytes()
        results = []
        for number, whole in enumerate(batches(3, stage.batch)):
            # So small that a matmul adds up all rows of its result before it adds to the sums.
            latents_BCHW = whole.latents_BCHW[images, :, :8, :8].contiguous()
            shared = Batch(latents_BCHW, whole.token_ids_BL[images], whole.positions_B[images], whole.captions[images])
            results.append(step(shared, number).loss)
            early.append(step._sums.early if step._sums else 0)
        ranks.wait()  # until the others have received everything, which the kernel may still hold back
        sent, predicted = sent_bytes() - before, step._sums.sent_bytes if step._sums else 0
        chunks = len(step._sums._chunks) if step._sums else 0
        tensors = [*results, *(tensor for role in step.tensors_by_role().values() for tensor in role)]
        torch.save([tensors, early, chunks, sent, predicted], f"{output}-{ranks.rank}")


def train_on(world: int, folder: Path, *, batch: int, chunk: int = 40_000, machines: int = 1) -> list[list]:
    """Run `train_steps` on ranks, and return the results of each."""
    with store_of_ranks(world) as shared:
        shared["LOCAL_WORLD_SIZE"] = str(world // machines)
        arguments = [str(folder / "model"), str(folder / "rank"), str(chunk), str(batch)]
        ranks = start_ranks(shared, "call", __file__, "train_steps", arguments, [str(folder / "out"), str(folder / "err")])
        codes = ended(ranks)
    assert codes == [0] * world, (folder / "err").read_text()
    return [torch.load(f"{folder}/rank-{rank}") for rank in range(world)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_have_the_bits_of_micro_batches_and_send_what_is_predicted(tmp_path, world):
    """Three ranks do not divide the arena, so a few of its elements are summed apart."""
    ((alone, *_),) = train_on(1, tmp_path, batch=SHARE * world)
    for tensors, early, chunks, sent, predicted in train_on(world, tmp_path, batch=SHARE * world):
        assert same(tensors, alone)
        assert early == [0, chunks, chunks] and chunks > 4
        assert predicted <= sent / 3 < 1.05 * predicted


def test_ranks_on_several_machines_repeat_their_bits(tmp_path):
    first, again = (train_on(2, tmp_path, batch=2 * SHARE, machines=2) for _ in range(2))
    (alone,) = train_on(1, tmp_path, batch=2 * SHARE)
    for (tensors, early, chunks, sent, predicted), (repeated, *_) in zip(first, again, strict=True):
        assert same(tensors, repeated) and same(tensors, first[0][0])
        assert all(torch.allclose(tensor, expected, atol=1e-6) for tensor, expected in zip(tensors, alone[0], strict=True))
        assert early == [0, chunks, chunks]
        assert predicted <= sent / 3 < 1.05 * predicted
