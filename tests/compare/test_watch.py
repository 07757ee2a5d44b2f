"""`fastsd watch`: what the page shows of runs that train, its refresh, and that it is read-only and local."""

import html
import json
import re
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from io import StringIO

import pytest
from run_folders import jsonl, row, validation_row
from sentences import refused, says

from fastsd.compare import charts
from fastsd.compare import watch as module
from fastsd.compare.runs import COLOURS
from fastsd.compare.watch import HOST, WatchPages, watch
from fastsd.terminal.console import Console

TIMING = {"stage_steps": 10, "images_per_second": 3.25, "memory_gb": 1.5, "data_wait": 0.5, "stage_eta": 100.0, "eta": 7300.0}


def sections_of(pages):
    return {section.anchor: section.html for section in pages.sections()}


@pytest.fixture
def training(make_run):
    """A run in the middle of a stage."""
    rows = [row(step, stage_step=step, loss_smooth=0.25, skipped=2 * (step == 3)) for step in (1, 2, 3)]
    timing = jsonl([{"step": step, **TIMING} for step in (1, 2, 3)])
    validation = jsonl([validation_row(step, 0.4) for step in (0, 2)])
    warning = jsonl([{"time": 0.0, "step": 2, "text": "skipped <2> steps"}])
    files = {"timing.jsonl": timing, "validation.jsonl": validation, "warnings.jsonl": warning}
    return make_run("a", rows, shades={2: [1, 2, 3, 4]}, **files)


def test_the_page_shows_a_run(training):
    sections = sections_of(WatchPages([training]))
    names = "progress samples training-loss validation-loss validation-loss-by-timestep learning-rate warnings cost"
    assert list(sections) == names.split()
    facts = ("unet", "3 of 10", "1m", "2h01m", "0.2500", "3.2", "1.4 GiB", "50%", "last log row", "skipped")
    assert all(fact in sections["progress"] for fact in facts)
    assert "grid/0/unet-00000002.png" in sections["samples"]
    assert "skipped &lt;2&gt; steps" in sections["warnings"]
    assert sections["training-loss"].count('<svg role="img" aria-label="Training loss"') == 2
    assert "t 0000-0249" in sections["validation-loss-by-timestep"]


def test_a_finished_run_has_no_eta_and_one_without_rows_says_so(training, make_run):
    (training / "model").mkdir()
    other = make_run("b", [])
    progress = sections_of(WatchPages([training, other]))["progress"]
    assert "finished" in progress and "ETA" not in progress and "no log row yet" in progress
    assert list(sections_of(WatchPages([other]))) == ["progress"]


def test_sections_are_built_again_if_a_file_has_changed(training, monkeypatch):
    pages, builds = WatchPages([training]), []
    build = pages._build
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(pages, "_build", lambda: builds.append(1) or build())
    before = sections_of(pages)
    sections_of(pages)
    assert len(builds) == 1
    with open(training / "log.jsonl", "a") as file:
        file.write(jsonl([row(4, stage_step=4, loss_smooth=0.125)]) + '{"step": 5, "sta')  # half a row
    after = sections_of(pages)
    assert len(builds) == 2 and after["training-loss"] != before["training-loss"] and "0.1250" in after["progress"]
    (training / "samples" / "unet-00000004.png").write_bytes((training / "samples" / "unet-00000002.png").read_bytes())
    assert "unet-00000004.png" in sections_of(pages)["samples"]


def test_a_build_of_a_long_log_takes_a_tenth_of_the_time(training, monkeypatch):
    clock, builds = [100.0], []
    pages = WatchPages([training])
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pages, "_build", lambda: builds.append(clock.__setitem__(0, clock[0] + 4)) or [])
    for seconds, count in ((0, 1), (30, 1), (7, 2)):  # the first build ends at 104 and takes 4 s, so the next is at 140
        clock[0] += seconds
        with open(training / "log.jsonl", "a") as file:
            file.write(jsonl([row(4 + len(builds), stage_step=4)]))
        pages.sections()
        assert len(builds) == count


def test_a_run_that_disappears_or_breaks_leaves_the_others(training, make_run, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    other = make_run("x/a", [row(1)])
    pages = WatchPages([training, other])
    colour = [run.colour for run in pages._runs or (pages.sections() and pages._runs)][1]
    (training / "config.json").write_text("{")
    progress = sections_of(pages)["progress"]
    assert says(html.unescape(progress), "compare-config-unreadable", path=training / "config.json")
    shutil.rmtree(training)
    sections = sections_of(pages)
    assert says(sections["progress"], "compare-no-run", folder=training) and "x/a" in sections["progress"]
    assert colour in sections["training-loss"]  # not that of the run that is gone


def contrast(first, second):
    """Source: WCAG 2.2, contrast ratio and relative luminance."""
    luminances = []
    for colour in (first, second):
        colour = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_texts_and_curves_have_enough_contrast_and_size(training):
    """WCAG AA: 4.5 for texts, 3 for curves. Texts have 11 px at the smallest width at which a page shows a chart."""
    text = WatchPages([training]).page()
    papers = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)]
    assert len(papers) == 2
    for paper in papers:
        assert all(contrast(paper[name], paper["paper"]) >= 4.5 for name in ("ink", "soft", "link", "mark"))
        assert all(contrast(colour, paper["paper"]) >= 3 for colour in COLOURS)
    charts_of_page = "".join(re.findall(r"<svg .*?</svg>", text, re.DOTALL))
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", charts_of_page)]
    breakpoint = int(re.search(r"max-width: (\d+)px\) \{  /\*", text)[1])
    for width, inches in ((breakpoint - 48, charts.WIDE), (376, charts.NARROW)):
        assert min(sizes) * width / (72 * inches) >= 11


@contextmanager
def served(*folders):
    server = ThreadingHTTPServer((HOST, 0), partial(module._Handler, WatchPages(folders)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield partial(request, server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def request(port, path, method="GET", host=HOST):
    connection = HTTPConnection(HOST, port, timeout=30)
    connection.request(method, path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def test_the_server_is_read_only_and_serves_nothing_but_the_page(training):
    before = {path: path.read_bytes() for path in training.rglob("*") if path.is_file()}
    with served(training) as get:
        status, headers, content = get("/")
        assert status == 200 and b"<html" in content and b"sections" in content and b"http:" not in content
        assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
        status, _, content = get("/sections")
        assert status == 200 and json.loads(content)[0][0] == "progress"
        status, headers, content = get("/grid/0/unet-00000002.png")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        assert content == (training / "samples" / "unet-00000002.png").read_bytes()
        for path in (
            "/grid/1/unet-00000002.png",
            "/grid/0/..%2fconfig.json",
            "/grid/0/../config.json",
            "/config.json",
            "/grid/x/a",
        ):
            assert get(path)[0] == 404
        assert get("/", host="example.org")[0] == 403
        assert get("/", method="POST")[0] == 501
    assert {path: path.read_bytes() for path in training.rglob("*") if path.is_file()} == before


def test_the_command_says_its_address(training, monkeypatch):
    console = Console(file=StringIO(), width=200)
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda server: None)
    watch([training], 0, console)
    assert f"http://{HOST}:" in console.file.getvalue() and "ssh -L" in console.file.getvalue()


def test_wrong_arguments_are_refused(training, tmp_path):
    with refused("watch-no-runs"):
        watch([], 0)
    with refused("watch-no-run", run=tmp_path):
        watch([tmp_path], 0)
    with refused("watch-run-twice", run=training):
        watch([training, training], 0)
    with served(training) as get, refused("watch-port", port=get.args[0]):
        watch([training], get.args[0])


def test_a_long_legend_and_close_stages_do_not_overlap(make_run):
    stages = {1: "first", 2: "a-long-name", 1000: "a-long-name", 1001: "second", 1002: "third", 2000: "third"}
    rows = [row(step, stage) for step, stage in stages.items()]
    folders = [make_run(f"run-with-a-rather-long-name-{i}", rows) for i in range(4)]
    section = sections_of(WatchPages(folders))["training-loss"]
    wide, narrow = section.split("<figure")[1:]
    for figure in (wide, narrow):
        assert all(f"run-with-a-rather-long-name-{i}" in figure for i in range(4))
    assert ">first<" in narrow and ">a-long-name<" not in narrow and ">second<" in narrow and ">third<" not in narrow
