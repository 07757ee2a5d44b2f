"""The communication of several GPUs: messages of real ranks, the closed form and a simulation, and `fastsd plan --gpus`."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import pytest
from commandline import fastsd
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_simulation import Ranks as SimulatedRanks
from rank_simulation import simulate
from ranks import ended, start_ranks, store_of_ranks
from sentences import refused, says
from step_inputs import batches, stage_of
from tiny import ONE_LEVEL, job, make_tiny_model

from fastsd.config.schema import LoraTable
from fastsd.data.loader import Batch
from fastsd.model.lora import add_lora
from fastsd.model.shapes import Shapes
from fastsd.model.unet import UNetConfig
from fastsd.plan import communication
from fastsd.plan.communication import BASE, Message, Segment, StepTimes, Wait, arrival, waited
from fastsd.plan.links import LINKS, Cluster, Link, cluster_of, find_link
from fastsd.plan.operations import Operation
from fastsd.plan.plan import plan_stage
from fastsd.plan.step_time import step_seconds
from fastsd.train import gradient_sums, shards
from fastsd.train.ranks import Ranks, joined_ranks
from fastsd.train.shards import BLOCK
from fastsd.train.step import Step
from fastsd_kernels import REFERENCE
from fastsd_kernels.cards import CARDS

CHUNK, SHARE = 40_000, 2  # bytes; images of each rank
BOTH = ["unet", "text_encoder"]
LION, ADAMW = {"optimizer": "lion", "lr": 1e-3}, {"optimizer": "adamw", "lr": 1e-3}
DLION = {"optimizer": "dlion", "d0": 1e-4}
# Settings of a stage, and the number of machines.
CASES = {
    "unet": (LION, 1),
    "micro-batches": ({**LION, "micro_batch": 1}, 1),
    "both": ({**ADAMW, "train": BOTH}, 1),
    "text": ({**ADAMW, "train": BOTH[1:], "precision": "bf16"}, 1),
    "machines": (DLION, 2),
    "sharded": ({**DLION, "shard_state": True, "precision": "bf16", "ema": {"sigma_rel": [0.1, 0.2]}}, 1),
    "sharded, both": ({**LION, "train": BOTH, "shard_state": True, "grad_clip": 0.5}, 1),
    "sharded LoRA": ({**ADAMW, "train": ["lora"], "shard_state": True, "micro_batch": 1}, 1),
    "sharded, machines": ({**DLION, "shard_state": True}, 2),
}
LOCAL, NETWORK = LINKS["pcie4"], LINKS["100gbe"]


class Recorded:
    """Records what is sent, and how many gradients had arrived before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: type[Ranks]) -> None:
        self.events: list[tuple[str, int, int]] = []
        self.arrived = 0
        start, combined, arrive = ranks._start, ranks._combined, gradient_sums.GradientSums._arrive

        def recorded_start(this, operation, *tensors):
            size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.events.append((operation, size, self.arrived))
            return start(this, operation, *tensors)

        def recorded_combined(this, values, operation):
            self.events.append(("all_reduce", values.numel() * values.element_size(), self.arrived))
            return combined(this, values, operation)

        def recorded_arrive(this, chunks, weight):
            self.arrived += 1
            arrive(this, chunks, weight)

        monkeypatch.setattr(ranks, "_start", recorded_start)
        if ranks is Ranks:  # the other class calls `_start` for these
            monkeypatch.setattr(ranks, "_combined", recorded_combined)
        monkeypatch.setattr(gradient_sums.GradientSums, "_arrive", recorded_arrive)
        monkeypatch.setattr(shards, "CHUNK", CHUNK)

    def restart(self) -> None:
        """Forget all, before a step."""
        self.events, self.arrived = [], 0


def make_model(folder, keys=MappingProxyType({})):
    """Write a small model, with an adapter if `keys` of a stage train one."""
    model = make_tiny_model(folder, UNetConfig(**ONE_LEVEL))
    if keys.get("train") == ["lora"]:
        add_lora(model, LoraTable(rank=2), seed=0)
    return model


def stage_with(keys, world):
    return stage_of(**{"batch": SHARE * world, "micro_batch": SHARE, **keys})


def train_cases(folder: str) -> None:
    """Train two steps of each case as one rank, and write what the second has sent."""
    results = {}
    with joined_ranks() as ranks, pytest.MonkeyPatch.context() as monkeypatch:
        recorded = Recorded(monkeypatch, Ranks)
        for name, (keys, machines) in CASES.items():
            these = replace(ranks, local_world=ranks.world // machines)
            stage = stage_with(keys, ranks.world)
            step = Step(make_model(Path(folder) / f"{name}-{ranks.rank}", keys), stage, 2, seed=0, ranks=these)
            images = slice(ranks.rank * SHARE, (ranks.rank + 1) * SHARE)
            for number, whole in enumerate(batches(2, stage.batch)):
                recorded.restart()
                tensors = whole.latents_BCHW[images], whole.token_ids_BL[images], whole.positions_B[images]
                step(Batch(*tensors, whole.captions[images]), number)
            sent = sum(part.sent_bytes for part in (step._sums, step._shards) if part)
            results[name] = {"events": list(recorded.events), "early": step._sums.early, "sent": sent}
            step.release()
            ranks.wait()
    Path(folder, f"sent-{ranks.rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module", params=[2, 4])
def sent(request, tmp_path_factory):
    """Return the number of ranks, and what each has sent by case."""
    world, folder = request.param, tmp_path_factory.mktemp("sent")
    with store_of_ranks(world) as shared:
        outputs = [str(folder / "out"), str(folder / "err")]
        codes = ended(start_ranks(shared, "call", __file__, "train_cases", [str(folder)], outputs))
    assert codes == [0] * world, (folder / "err").read_text()
    return world, [json.loads((folder / f"sent-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("name", CASES)
def test_real_ranks_send_the_messages_that_are_planned(sent, name, tmp_path, monkeypatch):
    """Each message, its bytes and its place in the backward are equal, and so are their sums."""
    world, results = sent
    keys, machines = CASES[name]
    recorded = Recorded(monkeypatch, communication.RehearsedRanks)
    cluster, stage = Cluster(world, machines, LOCAL, NETWORK if machines > 1 else None), stage_with(keys, world)
    # The ranks have the reference's kernels, whose partial sums are one for each piece.
    plan = plan_stage(Shapes.of(make_model(tmp_path, keys)), stage, 32, 0, REFERENCE, cluster=cluster)
    segments = plan.segments(stage.micro_batch_size)
    messages = [segment.event for segment in segments if isinstance(segment.event, Message)]
    agreement = messages.index(("all_reduce", 4, False))  # whether memory has run out on a rank, after the sums
    *sums, rest = messages[:agreement] + [Message("", 0, False)] * stage.shard_state
    weights = [message for message in messages[agreement:] if message.operation == "all_gather_single" and message.size > 1000]
    early = sum(message.operation != "all_gather_single" and message.hidden for message in messages)
    for result in results:
        real = [tuple(event) for event in result[name]["events"]]
        assert [(message.operation, message.size) for message in messages] == [event[:2] for event in real]
        # The gradients that had arrived, counted from the first one of the step.
        planned = recorded.events[-len(messages) :]
        offset = planned[-1][2] - real[-1][2]
        assert [event[2] - offset for event in planned] == [event[2] for event in real]
        assert early == result[name]["early"] > 0 and bool(weights) == stage.shard_state
        planned_bytes = sum(message.sent_bytes(world) for message in sums + weights)
        rests = 4 * (world - 1) * max(rest.size // (4 * world) - 1, 0)
        # The rests of all chunks are gathered, not summed piece by piece: they count half of `sent_bytes` for each other rank.
        assert planned_bytes <= result[name]["sent"] <= planned_bytes + rests


def test_a_rank_has_the_same_memory_without_its_messages(tmp_path):
    """As the start of a stage plans it: its share of the batch, and of what is sharded."""
    shapes, stage = Shapes.of(make_model(tmp_path)), stage_with({**LION, "shard_state": True, "ema": 0.5}, 4)
    planned = plan_stage(shapes, stage, 32, 0, cluster=Cluster(4, 1, LOCAL))
    rank = plan_stage(shapes, stage, 32, 0, ranks=Ranks(3, 4, 1, 2))
    same_machine, alone = plan_stage(shapes, stage, 32, 0, ranks=Ranks(0, 4, 0, 4)), plan_stage(shapes, stage, 32, 0)
    assert rank.micro_batches == planned.micro_batches == [1, 2] and max(alone.micro_batches) == 8
    for size in (1, 2):
        assert replace(same_machine.need(size), operations=None, segments=()) == replace(
            planned.need(size), operations=None, segments=()
        )
    shared, whole = rank.need(2).owners, alone.need(2).owners
    for owner in ("optimizer state", "EMA"):
        assert whole[owner] / 4 <= shared[owner] < whole[owner] / 4 + 4 * BLOCK
    assert rank.need(2).activations < alone.need(8).activations / 3


def seconds_of(message: Message, cluster: Cluster) -> float:
    return message.seconds(cluster, fast=True)


def test_a_message_takes_the_time_of_its_bytes_and_hops():
    size, eight = 64 << 20, Cluster(8, 1, LOCAL)
    gather, exchange, reduce = (Message(name, size, True) for name in ("all_gather_single", "all_to_all_single", "all_reduce"))
    transfer = size * 7 / 8 / 24e9
    assert seconds_of(gather, eight) == pytest.approx(transfer + BASE + 7 * LOCAL.hop)
    assert seconds_of(exchange, eight) == pytest.approx(transfer + BASE + LOCAL.hop)
    assert seconds_of(reduce, eight) == pytest.approx(2 * transfer + BASE + 14 * LOCAL.hop)
    assert exchange.seconds(eight, fast=False) > 2 * seconds_of(exchange, eight)
    assert [message.sent_bytes(8) for message in (gather, exchange, reduce)] == [size // 8 * 7, size // 8 * 7, size // 4 * 7]
    # A ring enters each machine once, so its network carries what one GPU sends. In an all-to-all, all GPUs send through it.
    machines = Cluster(16, 2, LINKS["nvlink4"], NETWORK)
    assert seconds_of(reduce, machines) == pytest.approx(2 * size * 15 / 16 / 12e9, rel=0.03)
    assert seconds_of(exchange, machines) == pytest.approx(8 * size * 8 / 16 / 12e9, rel=0.03)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 3)), min_size=1, max_size=9))
def test_the_last_arrival_is_that_of_the_closed_form(pairs):
    times = [sum(gap for gap, _ in pairs[: i + 1]) for i in range(len(pairs))]
    messages = [(ready, seconds) for ready, (_, seconds) in zip(times, pairs, strict=True)]
    latest = max(ready + sum(seconds for _, seconds in messages[i:]) for i, (ready, _) in enumerate(messages))
    assert arrival(messages) == pytest.approx(latest)


ADD_RATE = 500e9  # bytes/s


def events_of(pieces: list[tuple[float, int]], after: float, cluster: Cluster) -> tuple[list[float], list[Message | Wait]]:
    """Return what `GradientSums` does with chunks, as the closed form takes it."""
    pairs: list[tuple[float, Message | Wait]] = []
    for number, (before, size) in enumerate(pieces):
        if cluster.machines > 1:
            pairs.append((before, Message("all_reduce", size, True)))
            continue
        if number:
            last = pieces[number - 1][1]
            pairs += [(before, Wait(hidden=True)), (last / ADD_RATE, Message("all_gather_single", last, True))]
        pairs.append((0.0 if number else before, Message("all_to_all_single", size, True)))
    if cluster.machines == 1:
        last = pieces[-1][1]
        pairs += [(after, Wait()), (last / ADD_RATE, Message("all_gather_single", last, False))]
    pairs += [(0.0 if cluster.machines == 1 else after, Message("all_gather_single", 4 * cluster.gpus, False)), (0.0, Wait())]
    seconds, events = zip(*pairs, strict=True)
    return list(seconds), list(events)


CLUSTERS = [Cluster(n, 1, LINKS[link]) for n in (2, 3, 8) for link in ("pcie4", "nvlink4")]
INFINIBAND = Link("8 x 400 Gb/s InfiniBand", 330, 384, 14e-6, network=True)
CLUSTERS += [Cluster(n, n, NETWORK, NETWORK) for n in (2, 8)] + [Cluster(8, 2, LINKS["nvlink4"], NETWORK)]
CLUSTERS += [Cluster(16, 2, LINKS["nvlink4"], INFINIBAND)]  # a tree: a ring of so many hops takes longer


@pytest.mark.parametrize("cluster", CLUSTERS, ids=[cluster.text for cluster in CLUSTERS])
def test_the_closed_form_agrees_with_a_simulation_of_ports_and_hops(cluster):
    """Within 1 % of the step, whether the backward, the connection or both in turn are the limit, and within 6 % for a tree."""
    size, tolerance = 64 << 20, 0.06 if cluster.network == INFINIBAND else 0.01
    transfer = Message("all_reduce", size, True).seconds(cluster, fast=True)
    for share in (0.2, 0.9, 1.1, 5.0):  # of a chunk's transfer, in which the next chunk is computed
        even = [(share * transfer, size)] * 10
        uneven = [(share * transfer * (0.2 if i % 4 else 3.4), size // (1 + i % 3)) for i in range(12)]
        for schedule in (even, uneven):
            seconds, events = events_of(schedule, transfer / 3, cluster)
            predicted = waited(sum(seconds), seconds, events, cluster, fast=True)
            simulated = simulate(schedule, transfer / 3, cluster, fast=True, add_rate=ADD_RATE)
            assert predicted.seconds == pytest.approx(simulated.seconds, rel=tolerance)
            assert predicted.exposed == pytest.approx(simulated.exposed, abs=tolerance * simulated.seconds)


def test_the_simulation_takes_trees_where_hops_take_longer_than_bytes():
    """On a slow network, the bytes decide, and a ring is taken."""
    size = 64 << 20
    for network, tree in ((INFINIBAND, True), (NETWORK, False)):
        cluster = Cluster(16, 2, LINKS["nvlink4"], network)
        seconds = []
        for operation in ("all_reduce", "ring", "tree"):
            ranks = SimulatedRanks(cluster, fast=True)
            getattr(ranks, operation)(size, [0.0] * 16, *([2] if operation == "ring" else []))
            seconds.append(max(ranks.free_at))
        taken, ring, halved = seconds
        assert taken == (halved if tree else ring) and (taken < 0.9 * ring if tree else taken <= ring)
        # A rank sends 7/8 of the tensor within its machine, twice, and half of its eighth through its network card, twice.
        assert halved > max(2 * size * 7 / 8 / 370e9, size / (1e9 * network.high))


def test_a_late_rank_delays_all():
    schedule, cluster = [(0.01, 64 << 20)] * 10, CLUSTERS[0]
    even, late = (simulate(schedule, 0, cluster, fast=True, delays=delays) for delays in ((0.0, 0.0), (0.0, 0.5)))
    assert late.seconds == pytest.approx(1.5 * even.seconds, rel=0.1)


def test_steps_wait_for_what_is_sent_after_the_update():
    cluster, card = Cluster(2, 1, LOCAL), CARDS["4090"]
    work = Counter({Operation("pass", "GEGLU", 0, 10**9, 1, narrow=True): 10})
    sum_, weights = Message("all_to_all_single", 1 << 20, True), Message("all_gather_single", 1 << 30, False)
    compute = step_seconds(work, card, "bf16")
    segments = [Segment(work, sum_), Segment(Counter(), Wait()), Segment(Counter(), weights), Segment(Counter(), Wait())]
    times = StepTimes.of(compute, segments, card, "bf16", cluster)
    expected = weights.seconds(cluster, fast=True) + sum_.seconds(cluster, fast=True)
    assert times.fastest.exposed == pytest.approx(expected)
    assert times.fastest.seconds == pytest.approx(compute[0] + expected)
    assert 0 < times.efficiency[0] < times.efficiency[1] < 1


def test_a_step_waits_longer_for_a_slower_connection():
    """The least and the most of the waits, also where computation hides messages and its fewest seconds hide less."""
    cluster, card = Cluster(2, 1, LOCAL), CARDS["4090"]
    work = Counter({Operation("pass", "GEGLU", 0, 10**9, 1, narrow=True): 10})
    compute = step_seconds(work, card, "bf16")
    size = int(2 * compute[0] * 1e9 * LOCAL.high)  # sent in a time between those of the backward
    segments = [Segment(Counter(), Message("all_to_all_single", size, True)), Segment(work, Wait())]
    times = StepTimes.of(compute, segments, card, "bf16", cluster)
    message = segments[0].event
    expected = [message.seconds(cluster, fast=fast) - compute[fast] for fast in (True, False)]
    assert times.waits == pytest.approx([max(0.0, seconds) for seconds in expected]) and times.waits[0] < times.waits[1]


def test_links_are_found_by_names_and_rates():
    for text in ("pcie4", "PCIe 4.0", "pcie-4", "pcie"):
        assert find_link(text, "--interconnect") == LINKS["pcie4"]
    assert find_link("100 GbE", "--network") == LINKS["100gbe"] and find_link("nvlink", "") == LINKS["nvlink4"]
    assert find_link("12.5", "--network")[1:3] == (12.5, 12.5)
    assert cluster_of(None, None, "", "") is None
    assert cluster_of(8, None, "nvlink", "") == Cluster(8, 1, LINKS["nvlink4"])
    assert cluster_of(64, None, "nvlink", "") == Cluster(64, 8, LINKS["nvlink4"], NETWORK)
    assert cluster_of(10, None, "", "")[:2] == (10, 2) and cluster_of(11, None, "", "")[:2] == (11, 11)
    assert cluster_of(8, None, "100gbe", "") == Cluster(8, 8, NETWORK, NETWORK)
    assert cluster_of(8, 2, "100gbe", "25gbe") == Cluster(8, 2, NETWORK, LINKS["25gbe"])
    assert "8 GPUs in 2 machines (25 GbE" in cluster_of(8, 2, "", "25gbe").text


@pytest.mark.parametrize(
    "arguments, code, fields",
    [
        ((0, None, "", ""), "gpus-invalid", {"gpus": 0}),
        ((-2, None, "", ""), "gpus-invalid", {"gpus": -2}),
        ((None, None, "pcie4", ""), "gpus-missing", {"option": "--interconnect", "value": "pcie4"}),
        ((None, 3, "", ""), "gpus-missing", {"option": "--machines", "value": 3, "gpus": 24}),
        ((None, None, "", "100gbe"), "gpus-missing", {"option": "--network"}),
        ((8, None, "-5", ""), "link-rate", {"option": "--interconnect", "rate": -5, "sender": "GPU"}),
        ((8, None, "0", ""), "link-rate", {"rate": 0}),
        ((8, None, "nan", ""), "link-rate", {"rate": "nan"}),
        ((8, 2, "", "inf"), "link-rate", {"option": "--network", "rate": "inf", "sender": "machine"}),
        ((8, None, "pcie9", ""), "link-unknown", {"link": "'pcie9'", "hint": "did you mean pcie5?"}),
        ((8, None, "string", ""), "link-unknown", {"hint": "or a rate in GB/s"}),
        ((8, 2, "", "token ring"), "link-unknown", {"option": "--network"}),
        ((8, 3, "", ""), "machines-invalid", {"machines": 3, "gpus": 8, "counts": "1, 2, 4, 8"}),
        ((8, 0, "", ""), "machines-invalid", {"machines": 0}),
        ((8, 1, "", "100gbe"), "network-of-one-machine", {"gpus": 8}),
    ],
)
def test_bad_options_are_refused(arguments, code, fields):
    with refused(code, **fields):
        cluster_of(*arguments)


def test_advice_on_options_is_accepted():
    assert cluster_of(24, 3, "", "") and find_link("pcie5", "--interconnect")
    assert all(cluster_of(8, machines, "", "") for machines in (1, 2, 4, 8)) and cluster_of(8, 2, "", "100gbe")


STAGE = '[[stage]]\nname = "one"\ntrain = ["unet"]\nuntil = 10\nbatch = 4\noptimizer = "lion"\nlr = 1e-4\n'


@pytest.mark.slow
def test_plan_tells_what_several_gpus_change(tmp_path, tiny_model, images, monkeypatch, capsys):
    plan = partial(fastsd, "plan", monkeypatch=monkeypatch, capsys=capsys)
    config, file = job(tmp_path, tiny_model, images, STAGE), tmp_path / "plan.json"
    code, out, _ = plan(config, "--gpus", "2", "--interconnect", "10", "--card", "4090", "--json", file)
    assert code == 0 and says(out, "plan-ranks", cluster="2 GPUs in one machine (10 GB/s)")
    report = json.loads(file.read_text())
    (entry,) = report["stages"]
    ranks = entry["ranks"]
    assert entry["micro_batch"] == 2 and ranks["images"] == 2 and "batch 4 = 2 GPUs x 1 x 2" in out
    assert says(out, "plan-sent", messages=ranks["messages"]) and 0 < ranks["sent_early"] < ranks["sent"]
    assert says(out, "plan-sharded") == ("sharded" in ranks) and ranks.get("sharded", 0) < ranks.get("unsharded", 1)
    # The gradients once for each direction, and a few elements that wait for the end.
    assert ranks["sent"] == pytest.approx(entry["memory"]["gradients"], rel=0.01)
    least, highest = ranks["efficiency"]["RTX 4090"]
    shortest, longest = ranks["waits"]["RTX 4090"]
    assert 0 < least <= highest < 1 and 0 < shortest <= longest
    assert says(out, "plan-data") and max(map(len, out.splitlines())) <= 120
    data = report["data"]
    assert data["cache"]["12000000"] == 12_000_000 * data["bytes_an_image"]
    row = data["cards"]["RTX 4090"]
    assert row["read"] == 2 * row["read_a_gpu"] == entry["images_per_second"]["RTX 4090"][1] * report["disk"]["cache_an_image"]
    assert row["seconds"]["12000000"][0] == pytest.approx(6_000_000 / row["encoded_a_gpu"][1])
    code, out, _ = plan(config, "--gpus", "1", "--card", "4090")
    assert code == 0 and says(out, "plan-data") and not says(out, "plan-sent")
    code, _, err = plan(config, "--gpus", "3")
    assert code == 2 and says(err, "ranks-batch", batch=4, ranks=3, sizes="3 or 6", counts="1, 2, 4")
