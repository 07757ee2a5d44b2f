"""Options and fixtures of the benchmarks. How they are timed: `measure.py`; how to read them: `README.md`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from measure import Bench, Machine, measure_machine, smallest

from fastsd_kernels import workload
from fastsd_kernels.launch import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TABLES = (workload.ATTENTION, workload.GROUP_NORM, workload.LAYER_NORM, workload.GEGLU)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastsd")
    group.addoption("--batch", type=int, default=8, help="images a call, on a GPU (default: 8); a CPU takes 1")
    group.addoption("--quick", action="store_true", help="the smallest kinds, batch 1, few rounds; a CPU does no more")
    group.addoption("--shard", default="0/1", metavar="I/N", help="of N equal shares of the benchmarks the one numbered I")
    group.addoption("--compiled", action="store_true", help="torch.compile's norms and GEGLU, too: minutes of compilation")


def _quick(config: pytest.Config) -> bool:
    return config.getoption("quick") or DEVICE.type == "cpu"


def _batch(config: pytest.Config) -> int:
    return 1 if _quick(config) else config.getoption("batch")


def pytest_report_header(config: pytest.Config) -> str:
    if DEVICE.type == "cuda":
        return f"device: {torch.cuda.get_device_name()}, batch {_batch(config)}"
    return "device: CPU, so PyTorch alone, in small: these figures say nothing about the kernels"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for, and kernels where none run."""
    small = [kind for table in TABLES for kind in smallest(table)]
    keep: list[pytest.Item] = []
    drop: list[pytest.Item] = []
    for item in items:
        values: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
        kept = (
            not (_quick(config) and "kind" in values and values["kind"] not in small)
            and (values["implementation"] != "compiled" or config.getoption("compiled"))
            and (DEVICE.type == "cuda" or INTERPRETED or not values["implementation"].startswith("triton"))
        )
        (keep if kept else drop).append(item)
    share, shares = map(int, config.getoption("shard").split("/"))
    config.hook.pytest_deselected(items=[*drop, *(item for i, item in enumerate(keep) if i % shares != share)])
    items[:] = keep[share::shares]


@pytest.fixture(scope="session")
def machine() -> Machine:
    """Copy bandwidth and matmul rates, measured in this run."""
    return measure_machine(DEVICE)


@pytest.fixture
def bench(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Bench]:
    torch.manual_seed(0)
    machine = request.getfixturevalue("machine") if benchmark.enabled else None
    properties = request.node.user_properties

    def note(figures: dict[str, Any]) -> None:
        properties.append(("record", figures))

    yield Bench(benchmark, DEVICE, _batch(request.config), _quick(request.config), machine, note)
    if DEVICE.type == "cuda":  # what a benchmark made is gone before the next: the largest take half of a 24 GB card
        gc.collect()
        torch.cuda.empty_cache()
