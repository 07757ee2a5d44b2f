"""Options and fixtures of the benchmarks. `measure.py` explains how they are timed, `README.md` how to read the figures."""

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
    group.addoption("--batch", type=int, default=8, help="images per call on a GPU (default: 8); always 1 on a CPU")
    group.addoption("--quick", action="store_true", help="the smallest kinds, batch 1, few rounds; the default on a CPU")
    group.addoption("--shard", default="0/1", metavar="I/N", help="run shard I (from 0) of N equal shards of the benchmarks")
    group.addoption(
        "--compiled", action="store_true", help="include torch.compile's norms and GEGLU, which compile for minutes"
    )


def _quick(config: pytest.Config) -> bool:
    return config.getoption("quick") or DEVICE.type == "cpu"


def _batch(config: pytest.Config) -> int:
    return 1 if _quick(config) else config.getoption("batch")


def pytest_report_header(config: pytest.Config) -> str:
    if DEVICE.type == "cuda":
        return f"device: {torch.cuda.get_device_name()}, batch {_batch(config)}"
    return "device: CPU, small sizes, PyTorch only: these figures do not measure the kernels"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect benchmarks that the options exclude or this machine cannot run."""
    smallest_kinds = [kind for table in TABLES for kind in smallest(table)]
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        values: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
        selected = (
            not (_quick(config) and "kind" in values and values["kind"] not in smallest_kinds)
            and (values["implementation"] != "compiled" or config.getoption("compiled"))
            and (DEVICE.type == "cuda" or INTERPRETED or not values["implementation"].startswith("triton"))
        )
        (kept if selected else dropped).append(item)
    shard, shards = map(int, config.getoption("shard").split("/"))
    config.hook.pytest_deselected(items=[*dropped, *(item for i, item in enumerate(kept) if i % shards != shard)])
    items[:] = kept[shard::shards]


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    """Copy bandwidth and matmul rates, measured in this run."""
    return measure_machine(DEVICE, quick=_quick(request.config))


@pytest.fixture
def bench(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Bench]:
    torch.manual_seed(0)
    machine = request.getfixturevalue("machine") if benchmark.enabled else None
    properties = request.node.user_properties

    def record(figures: dict[str, Any]) -> None:
        properties.append(("record", figures))

    yield Bench(benchmark, DEVICE, _batch(request.config), _quick(request.config), machine, record)
    if DEVICE.type == "cuda":  # free the memory, because the largest benchmarks need half of a 24 GB card
        gc.collect()
        torch.cuda.empty_cache()
