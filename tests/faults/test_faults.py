"""A sample of each kind of fault. `python tests/faults/table.py --share 1` tries them all, see `tests/faults/lab.py`."""

import random
import sys

import kinds
import pytest
from jobs import EVERYTHING, workshop
from power_cuts import power_cuts
from power_loss import Disk
from rank_kills import RankKills

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")]


@pytest.fixture(scope="module")
def shop():
    with workshop() as shop:
        yield shop


def check(trials):
    results = list(trials)
    assert results and [reason for reason in results if reason] == []


def test_killed_runs_end_equal(shop):
    check(kinds.kills(shop, 10, random.Random(1)))


def test_killed_ranks_end_equal(tmp_path):
    trials = list(RankKills(tmp_path).trials(2, random.Random(1)))
    assert [trial["problem"] for trial in trials] == ["", ""]


@pytest.mark.parametrize("name", [EVERYTHING, "one checkpoint kept", "two stages, state carried"])
def test_power_cuts_lose_nothing(name, shop):
    check(power_cuts(shop, 41, random.Random(1), [name]))


# Kinds of files that the same function writes as one that is tried here: `pytest -m hours` tries them, too.
WRITTEN_ALIKE = {
    "weights of a checkpoint", "progress of a checkpoint", "config of a checkpoint", "other files of a checkpoint",
    "timing.jsonl", "images.json", "cost.json", "single file", "indexes of a cache",
}  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_disks_that_fail_cost_nothing(seed, shop):
    rng = random.Random(seed)
    assert kinds.FILES.keys() > WRITTEN_ALIKE
    for kind in [kind for kind in kinds.FILES if kind not in WRITTEN_ALIKE][seed::4]:
        check(kinds.disk_errors(shop, kind, 1, rng))


@pytest.mark.parametrize("name", kinds.COMMANDS)
def test_signals_end_commands_with_one_line(name, shop):
    rng = random.Random(name)
    for number in (rng.choice(kinds.STOPS), rng.choice([other for other in kinds.SIGNALS if other not in kinds.STOPS])):
        check(kinds.signals(shop, name, number, rng))


def test_damaged_files_are_rebuilt_or_named(shop):
    check(kinds.damages(shop, 31, random.Random(1)))


@pytest.mark.parametrize("broken", kinds.CONTROLS)
def test_a_restore_that_leaves_something_out_is_noticed(broken, shop):
    check(kinds.controls(shop, [broken]))


def test_recorded_calls_give_the_files_that_are_there(shop):
    """The model of the disk is complete: no write, link or rename escapes the shim."""
    disk, reference = Disk(None, shop.run.name), shop.reference(EVERYTHING)
    for call in reference.calls:
        disk.apply(call)
    files = {p.relative_to(reference.copy).as_posix(): p.read_bytes() for p in reference.copy.rglob("*") if p.is_file()}
    assert disk.after_power_cut("kept", random.Random()) == files
    assert set(disk.after_power_cut("lost", random.Random())) <= files.keys()
