"""Fixtures of the tests of `fastsd plan`."""

import pytest

from fastsd.plan.plan import StagePlan, plan_stage


@pytest.fixture(scope="module")
def plans() -> dict[str, StagePlan]:
    return {}


@pytest.fixture(autouse=True)
def reuse_plans(monkeypatch, plans):
    """Rehearse the steps of a stage once for all commands of a module. The memory and the card do not change them."""

    def plan_or_reuse(shapes, stage, resolution, device_bytes, ops=None, *, card=None, **options):
        key = repr((shapes, stage, resolution, ops and ops.name, options))
        if key not in plans:
            plans[key] = plan_stage(shapes, stage, resolution, device_bytes, ops, **options)
        plans[key].device_bytes, plans[key].card = device_bytes, card
        return plans[key]

    monkeypatch.setattr("fastsd.plan.plan.plan_stage", plan_or_reuse)
