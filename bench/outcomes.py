"""A pytest plugin that writes each outcome, and the figures of each benchmark, as a line of JSON as soon as it ends.

    PYTHONPATH=bench pytest -p outcomes --outcomes FILE ...

If the machine disappears, only the current test is lost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

_MAX_MESSAGE = 2000  # characters from the end of a traceback


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("fastsd").addoption("--outcomes", type=Path, help="append each outcome to this file, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("outcomes")
    if path:
        config.pluginmanager.register(_Writer(path))


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, {})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report, {"seconds": round(report.duration, 3), **dict(report.user_properties)})

    def _write(self, report: Any, fields: dict[str, Any]) -> None:
        line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, **fields}
        if report.skipped:
            line["message"] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            line["message"] = str(report.longrepr)[-_MAX_MESSAGE:]
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
