"""Every fault of the table, and the soak: hours, with `pytest -m hours tests/faults`. Read first: `test_faults.py`."""

import random

import pytest
from jobs import workshop
from rank_kills import RankKills, slurm
from soak import growth, soak
from table import rows

pytestmark = [pytest.mark.hours, pytest.mark.timeout(0)]


@pytest.mark.parametrize(
    "kind", [kind for kind, _ in rows(None, 1, random.Random(0))]
)  # the trials are made when they are read
def test_no_fault_loses_anything(kind):
    with workshop() as shop:
        reasons = list(dict(rows(shop, 1, random.Random(0)))[kind])
    assert reasons and [reason for reason in reasons if reason] == []


def test_no_killed_rank_loses_anything(tmp_path):
    trials = list(RankKills(tmp_path).trials(20, random.Random(0)))
    assert [trial for trial in trials if trial["problem"]] == []


def test_the_slurm_job_of_the_page_trains(tmp_path):
    assert "same samples" in slurm(tmp_path)


def test_nothing_grows():
    assert max(growth(soak(100_000, 5000)).values()) <= 0.01
