"""`fastsd compare`: reading complete, killed and unusual runs, the numbers, pictures and page, and errors."""

import html
import json
import math
import re
from html.parser import HTMLParser
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from commandline import fastsd
from PIL import Image
from run_folders import STAGE, TEXT_STAGE, jsonl, plain_grid, plain_images, row, validation_row
from sentences import refused, says
from tiny import job

from fastsd.commands.cache import cache
from fastsd.compare import charts, draw, numbers, pictures
from fastsd.compare.compare import TABLES, compare
from fastsd.compare.runs import RunData, read_grids, read_runs
from fastsd.config.schema import load_config
from fastsd.run.folder import WHOLE_SHEET
from fastsd.run.loop import train
from fastsd.run.settings import ABSENT, choices, combinations, differences, short_names
from fastsd.sampling.grid import save_grid
from fastsd.sampling.prompts import images_of
from fastsd.terminal.console import Console


def read_run(folder: Path) -> RunData:
    return read_runs([folder])[0]


def cell_texts(table: numbers.Table) -> list[list[str]]:
    return [[cell.label if isinstance(cell, RunData) else cell for cell in row] for row in table.rows]


def test_values_are_toml_and_commas_in_brackets_do_not_split():
    values_by_text = {'["unet"]': ["unet"], '["unet", "text_encoder"]': ["unet", "text_encoder"]}
    assert choices('stage.train=["unet"],["unet", "text_encoder"]')[1] == values_by_text
    assert choices("a = 1e-5, x ,\"b, \\\" c\",'d,e',true,{u = 1, t = 2}")[1] == {
        "1e-5": 1e-5, "x": "x", '"b, \\" c"': 'b, " c', "'d,e'": "d,e", "true": True, "{u = 1, t = 2}": {"u": 1, "t": 2},
    }  # fmt: skip
    values = [{key: value for key, (_, value) in c.items()} for c in combinations(["a=1,2", "b=x", "c=3,4"])]
    assert values == [{"a": a, "b": "x", "c": c} for a in (1, 2) for c in (3, 4)]


def test_short_names_are_unique():
    assert list(short_names(["/a/b/run", "/a/c/run", "/other"]).values()) == ["b/run", "c/run", "other"]
    assert list(short_names(["stage.0.lr", "stage.1.lr", "seed"]).values()) == ["0.lr", "1.lr", "seed"]


def test_settings_that_differ(make_run):
    a = read_run(make_run("a", [row(1)])).config
    b = read_run(make_run("b", [row(1)], "model.clip_skip=1", "stage.0.lr=2e-3", "seed=3")).config
    c = read_run(make_run("c", [row(1)], stages=STAGE + TEXT_STAGE)).config
    assert differences([a, b]) == {"seed": ["0", "3"], "model.clip_skip": ["0", "1"], "stage.lr": ["0.001", "0.002"]}
    assert differences([a, a]) == {}
    (key, (before, after)), *others = differences([a, c]).items()
    assert (key, before) == ("stage.text", ABSENT) and 'train = ["text_encoder"]' in after and "lr = 0.001" in after
    assert not others
    with_lora = a.model_copy(update={"model": a.model.model_validate({"base": a.model.base, "lora": {"rank": 8}})})
    assert differences([a, with_lora])["model.lora.rank"] == [ABSENT, "8"] and "model.lora" not in differences([a, with_lora])


def test_killed_run_is_read_up_to_the_truncated_row(make_run):
    folder = make_run("run", [row(1), row(2)])
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 3, "ima')
    (folder / "samples").mkdir()
    (folder / "samples" / "unet-00000002.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    run = read_run(folder)
    assert [r["step"] for r in run.log] == [1, 2] and not run.finished and not run.grids
    assert run.validation == [] and run.cost == {"stages": []}


def test_thinned_curve_keeps_all_peaks():
    x = np.arange(200_000.0)
    y = np.sin(x / 30_000)
    y[123_456], y[77_777] = 9.0, -9.0
    y[5] = np.nan
    thin_x, thin_y = charts.thin(x, y)
    assert len(thin_x) <= charts.POINTS + 2 and thin_y.max() == 9 and thin_y.min() == -9 and not np.isnan(thin_y).any()
    assert thin_x[0] == 0 and thin_x[-1] == 199_999 and (np.diff(thin_x) > 0).all()
    assert charts.thin(x[:9], y[:9])[0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8]


def test_smoothing_stops_at_stage_borders(make_run):
    rows = [row(i, loss=1.0) for i in range(1, 31)] + [row(i, "text", loss=3.0) for i in range(31, 61)]
    rows[3]["loss"] = None
    smooth = read_run(make_run("run", rows)).smoothed_loss()
    finite = np.isfinite(smooth)
    assert finite.sum() == 59 and np.allclose(smooth[:30][finite[:30]], 1) and np.allclose(smooth[30:], 3)


def test_lines_are_least_squares_fits():
    rng = np.random.default_rng(0)
    x = np.arange(40.0)
    y = 3 - 0.25 * x + rng.normal(0, 0.3, 40)
    line = numbers.fit(x, y)
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    assert math.isclose(line.slope, slope) and math.isclose(line.error, math.sqrt(covariance[0, 0]), rel_tol=1e-6)
    assert math.isclose(line.first, intercept) and math.isclose(line.last, intercept + 39 * slope)
    first_line, last_line = numbers.ends(x, np.where(x == 2, np.nan, y))
    assert math.isclose(first_line.slope, np.polyfit(np.delete(x, 2)[:7], np.delete(y, 2)[:7], 1)[0])
    assert math.isclose(last_line.slope, np.polyfit(x[-7:], y[-7:], 1)[0])
    assert numbers.fit(x[:1], y[:1]) is None and numbers.ends(x[:0], y[:0]) == (None, None)


def test_start_end_and_slope(make_run):
    rows = [row(i, loss=1 - 0.01 * i) for i in range(1, 51)]
    validation = jsonl([validation_row(i, 0.9 - 0.002 * i) for i in (0, 10, 20, 30, 40, 50)])
    folder = make_run("run", rows)
    (folder / "validation.jsonl").write_text(validation)
    training, held_out = cell_texts(numbers.trends([read_run(folder)]))
    assert training[1:] == ["training", "0.99000", "0.50000", "-0.49000", *training[5:]]
    assert [t.split(" ±")[0] for t in training[5:]] == ["-2.50", "-2.50"]  # 0.01 a step of 4 images, per 1,000
    assert held_out[1:5] == ["held-out", "0.90000", "0.80000", "-0.10000"] and held_out[5].startswith("-0.500")


def test_agreement_of_data_comes_from_the_hashes(make_run):
    a = make_run("a", [row(i) for i in range(1, 11)])
    b = make_run("b", [row(i, noise=f"n{i}" if i < 7 else "other") for i in range(2, 21, 1)])
    c = make_run("c", [row(i, order=None) for i in range(50, 60)])
    runs = read_runs([a, b, c])
    (b_label, *b_cells), (c_label, *c_cells) = cell_texts(numbers.agreement(runs, runs[0]))
    assert (b_label, c_label) == ("b", "c") and says(b_cells[2], "first-difference", step=7)
    assert all(says(cell, "equal-rows", count=9) for cell in b_cells[:2])
    assert len(c_cells) == 3 and all(says(cell, "no-common-steps") for cell in c_cells)
    unlogged = read_run(make_run("d", [row(2, order=None)]))
    assert says(cell_texts(numbers.agreement([runs[1], unlogged], runs[1]))[0][1], "not-logged")


def test_difference_from_the_baseline(make_run):
    shades = [0, 50, 100, 150]
    a = make_run("a", [row(i) for i in range(1, 9)], shades={2: [9, 9, 9, 9], 4: shades})
    b = make_run("b", [row(i, loss=0.2) for i in range(1, 9)], shades={4: [shade + 10 for shade in shades]})
    c = make_run("c", [row(1)], shades={4: shades})
    validation = [validation_row(0, 0.5), validation_row(8, 0.3), validation_row(8, 0.2, weights="ema")]
    (a / "validation.jsonl").write_text(jsonl(validation))
    (b / "validation.jsonl").write_text(jsonl([validation_row(8, 0.35)]))
    runs = read_runs([a, b, c])
    pixels, picture, factor = pictures.pixel_differences(runs, runs[0])
    assert math.isclose(pixels["b"].mean, 20 / 3) and math.isclose(pixels["b"].psnr, 10 * math.log10(255**2 / (200 / 3)))
    assert pixels["b"].count == 4 and pixels["c"].psnr == math.inf and factor == 16 and picture.width > 300
    b_row, c_row = cell_texts(numbers.baseline_differences(runs, runs[0], pixels))
    assert b_row[2:] == ["+0.05000 ± 0.014", ABSENT, "6.67 of 255", "29.9 dB", "4"]
    assert c_row[-3:] == ["0.00 of 255", "equal", "4"]
    assert pictures.pixel_differences(runs[:1], runs[0]) == ({}, None, 1)


def test_grid_stores_the_boxes_of_its_cells(tmp_path):
    images = plain_images([10, 90, 170, 250])
    save_grid(plain_grid([10, 90, 170, 250], ["a", "b" * 300], seed=3), tmp_path / "unet-2-00000010.png", "unet-2", 10)
    (stored,) = read_grids(tmp_path)
    assert (stored.stage, stored.step) == ("unet-2", 10)
    cells = stored.cut()
    assert list(cells) == [("a", 3), ("a", 4), ("b" * 300, 3), ("b" * 300, 4)]
    assert all(np.array_equal(cell, image) for cell, image in zip(cells.values(), images, strict=True))
    stored.whole().save(tmp_path / "text-00000002.png")  # as a tool that drops text chunks would save it
    plain, _ = read_grids(tmp_path)
    assert list(plain.cells) == [WHOLE_SHEET] and plain.cut()[WHOLE_SHEET].size == stored.whole().size
    assert [path.name for path in tmp_path.glob(".tmp-*")] == []


def test_many_checkpoints_keep_the_first_and_the_last(make_run):
    run = read_run(make_run("run", [row(1)], shades={step: [step, 0, 0, 0] for step in range(0, 200, 2)}))
    frames = pictures.frames(run.grids)
    assert len(frames) == pictures.FRAMES and frames[0][0].step == 0 and frames[-1][0].step == 198
    sheet = pictures.over_checkpoints(run)
    assert sheet.width <= pictures.WIDTH
    assert sheet.getpixel((pictures.MARGIN + 5, pictures.HEAD + 5)) == (0, 0, 255)
    assert sheet.getpixel((sheet.width - pictures.GAP - 5, pictures.HEAD + 5)) == (198, 0, 57)


class Page(HTMLParser):
    """The tags of a page that are still open, the addresses that it loads, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for key, value in attrs if key in ("src", "href") and value]
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_page_is_complete_and_self_contained(make_run, tmp_path):
    awkward_name = "<i>a&b'\"$x$"
    shades = {step: [step, 50, 100, 150] for step in (0, 2, 4)}
    stage = {"name": "unet", "trained": 1234, "steps": 4, "images": 16, "seconds": 75.0, "memory_gb": 1.5}
    cost = {"stages": [stage], "file_bytes": 3_200_000, "sample_seconds": 0.25}
    first = make_run(awkward_name, [row(i, d=1e-6 * i) for i in range(1, 5)], shades=shades, cost_json=json.dumps(cost))
    kinds = product((0, 2, 4), ("held_out", "stabilised"), ("raw", "ema"))
    rows = [validation_row(i, 0.5 - i / 50, image_set, weights) for i, image_set, weights in kinds]
    (first / "validation.jsonl").write_text(jsonl(rows))
    second = make_run(
        "x/run", [row(i, lr_text_encoder=1e-5) for i in range(1, 3)] + [row(3, "text")], stages=STAGE + TEXT_STAGE
    )
    third = make_run("y/run", [row(1, loss=None)], "seed=5", shades={2: [0, 0, 0, 0]})
    (third / "timing.jsonl").write_text(jsonl([{"step": 1, "images_per_second": 2.0, "memory_gb": 0.5}]))
    out = tmp_path / "reports" / "page.html"
    compare([first, second, third], out, "x/run", console=Console(file=StringIO()))
    text = out.read_text()
    page = Page(text)
    assert page.open == [] and "http" not in text
    assert all(address.startswith(("data:image/webp;base64,", "#")) for address in page.loaded)
    for fact in (awkward_name, "x/run", "y/run", "seed", "1,234", "1m15s", "3.1 MiB", "≈ 2s"):
        assert fact in page.text, fact
    assert says(page.text, "section-during-training") and says(page.text, "validation-loss", kind="stabilised EMA")
    sections = re.findall(r'<section id="([^"]*)"', text)
    assert sections[:2] == ["final-samples", "samples-during-training"] and "runs" in sections[2:]
    films = json.loads(html.unescape(text.split('data-films="')[1].split('"')[0]))
    assert [[frame[:2] for frame in film] for film in films] == [[[0, "unet 0"], [2, "unet 2"], [4, "unet 4"]]]
    folder = out.with_suffix("")
    names = {path.name for path in folder.iterdir()}
    assert {"loss.png", "validation.png", "bands.png", "rates.png", "samples.png", TABLES} <= names
    assert {"checkpoints-1-i-a-b-x.gif", "checkpoints-1-i-a-b-x.png"} <= names
    with Image.open(folder / "checkpoints-1-i-a-b-x.gif") as film:
        assert film.n_frames == 3
    assert json.loads((folder / TABLES).read_text())["Cost"]["rows"][0][1:4] == ["1,234", "1m15s", "1.4 GiB"]
    compare([third], out, console=Console(file=StringIO()))  # a report on one run replaces the older report
    assert Page(out.read_text()).open == [] and not says(out.read_text(), "section-settings")
    assert not [path for path in folder.iterdir() if path.suffix == ".gif"] and not list(out.parent.glob(".tmp-*"))


def test_failure_half_way_leaves_the_old_report(make_run, tmp_path, monkeypatch):
    folder, out = make_run("run", [row(1)]), tmp_path / "page.html"
    compare([folder], out, console=Console(file=StringIO()))
    before = out.read_text(), sorted(path.name for path in (tmp_path / "page").iterdir())
    monkeypatch.setattr(charts, "rate_chart", lambda runs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare([folder], out, console=Console(file=StringIO()))
    assert before == (out.read_text(), sorted(path.name for path in (tmp_path / "page").iterdir()))
    assert not list(tmp_path.glob(".tmp-*"))


BAD_ARGUMENTS = [
    ((), "compare-no-runs", {}),
    (("none",), "compare-no-run", {"folder": "none"}),
    (("empty",), "compare-no-rows", {"log": "empty/log.jsonl", "interval": "1 steps (log.every)"}),
    (("run", "run"), "compare-run-twice", {"folder": "run"}),
    (("broken",), "compare-config-unreadable", {"path": "broken/config.json"}),
    (("run", "other", "--baseline", "none"), "unknown-baseline-run", {"baseline": "'none'", "runs": "run, other"}),
    (("run", "--draw", "cfg=1,2"), "draw-unknown-key", {"key": "'cfg'"}),
    (("run", "--draw", "guidance="), "swept-value", {"key": "guidance", "word": "'guidance='"}),
    (("run", "--draw", "guidance=1,,2"), "swept-value", {"key": "guidance"}),
    (("run", "--draw", "guidance=1,1"), "swept-value-twice", {"key": "guidance", "item": 1}),
    (("run", "--draw", "guidance"), "swept-no-values", {"word": "'guidance'"}),
    (("run", "--draw", "steps=1", "--draw", "steps=2"), "swept-key-twice", {"key": "steps", "key_2": "steps"}),
    (("run", "--draw", "sampler=best"), "draw-value", {"problem": "sampler is 'best'"}),
    (("run", "--draw", "clip_skip=-1"), "draw-value", {"problem": "clip_skip is -1"}),
    (("run", "--draw", "clip_skip=1"), "draw-no-checkpoint", {"folder": "run"}),
    (("run", "--checkpoints"), "draw-no-checkpoint", {"folder": "run"}),
    (("silent", "--checkpoints"), "draw-no-prompts", {"folder": "silent"}),
    (("run", "--out", "page"), "page-ending", {"place": "--out is 'page'"}),
    (("run", "--out", "run.html"), "page-pictures-in-use", {"place": "--out is 'run.html'", "folder": "run"}),
    (
        ("run", "--out", "run/log.jsonl/x.html"),
        "page-folder",
        {"place": "--out is 'run/log.jsonl/x.html'", "reason": "File exists"},
    ),
    (("run", "--out", "folder.html"), "page-is-folder", {"place": "--out is 'folder.html'"}),
]


@pytest.mark.parametrize(
    "arguments, error, fields", BAD_ARGUMENTS, ids=[" ".join(arguments) for arguments, *_ in BAD_ARGUMENTS]
)
def test_bad_input_gets_one_sentence_and_writes_nothing(arguments, error, fields, make_run, tmp_path, monkeypatch, capsys):
    for name in ("run", "other"):
        make_run(name, [row(1)])
    make_run("empty", [])
    make_run("broken", [row(1)], config_json="{")
    make_run("silent", [row(1)], "sample.prompts=[]")
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    code, _, err = fastsd("compare", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and says(err, error, **fields) and len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, images) -> list[Path]:
    """Train two runs that differ in clip skip."""
    folders = []
    for skip in (0, 1):
        path = job(tmp_path_factory.mktemp("trained"), tiny_model, images, STAGE, resolution=32)
        config = load_config(path, [f"model.clip_skip={skip}", f"run={path.parent / f'skip-{skip}'}", "sample.images=2"])
        console = Console(file=StringIO())
        cache(config, console)
        train(config, console)
        folders.append(Path(config.run))
    return folders


@pytest.mark.slow
def test_redrawn_samples_equal_those_of_the_run(trained, tmp_path):
    """The finished model draws the run's last samples. The checkpoints draw the grids of their steps."""
    runs = read_runs(trained)
    settings = draw.read_settings(["clip_skip=0,1", "guidance=7,1"], runs[0])
    assert [setting.label for setting in settings] == [f"clip_skip {s}\nguidance {g}" for s in (0, 1) for g in (7, 1)]
    sheets = dict(draw.draw_settings(draw.finished_models(runs), settings))
    assert list(sheets) == ["red circle", "blue star"]
    side = (sheets["red circle"].width - pictures.MARGIN) // 4 - pictures.GAP
    for r, run in enumerate(runs):
        samples = {cell: np.asarray(image.resize((side, side), 1)) for cell, image in whole_cells(run).items()}
        for prompt, sheet in sheets.items():
            cells = [np.asarray(sheet.crop(box(side, r, c))) for c in range(4)]
            assert np.array_equal(cells[2 * r], samples[prompt, 0])
            assert not any(np.array_equal(cells[2 * r], cells[c]) for c in range(4) if c != 2 * r)
    drawn = draw.draw_checkpoints(runs[1], runs[1].config.sample, tmp_path / "drawn", Console(quiet=True))
    assert [(g.stage, g.step) for g in drawn] == [("unet", 2), ("unet", 4)]
    for redrawn, stored in zip(drawn, runs[1].grids[1:], strict=True):
        assert np.array_equal(redrawn.whole(), stored.whole())


def whole_cells(run: RunData) -> dict:
    """Return a run's last samples by prompt and seed, cut out as `grid` lays them out."""
    sheet = run.grids[-1].whole()
    boxes = plain_grid([0] * 4, run.config.sample.prompts).info["cells"]
    return {(cell["prompt"], cell["seed"]): sheet.crop(cell["box"]) for cell in boxes}


def box(side: int, r: int, c: int) -> tuple[int, int, int, int]:
    left, top = pictures.MARGIN + c * (side + pictures.GAP), pictures.HEAD + r * (side + pictures.GAP)
    return left, top, left + side, top + side


@pytest.mark.slow
def test_page_with_everything_drawn(trained, tmp_path):
    out = StringIO()
    console = Console(file=out, width=200)
    compare(trained, tmp_path / "r.html", "skip-1", ["clip_skip=0,1"], from_checkpoints=True, console=console)
    page = Page((tmp_path / "r.html").read_text())
    assert "skip-0: red circle" in page.text and says(page.text, "equal-rows", count=4)
    assert says(page.text, "section-sampling") and says(page.text, "section-during-training")
    names = {path.relative_to(tmp_path / "r").as_posix() for path in (tmp_path / "r").rglob("*.png")}
    assert {"draw-1-skip-0-1.png", "draw-2-skip-1-2.png", "1-skip-0/unet-00000002.png", "difference.png"} <= names
    assert says(out.getvalue(), "page-written", page=tmp_path / "r.html", runs="2 runs")


def test_settings_that_are_compared_replace_those_of_single_prompts(make_run):
    """Otherwise the columns of such a prompt would be equal."""
    prompts = 'sample.prompts=["a", {prompt="b", steps=9, width=48, seed=3, negative="c"}]'
    run = read_run(make_run("run", [row(1)], prompts, "sample.height=64"))

    def drawn(word):
        tables = [setting.table for setting in draw.read_settings([word], run)]
        images = [image for table in tables for image in images_of(table, 32)[:: table.images]]
        return [(image.steps, image.seed, image.width, image.height, image.negative) for image in images]

    assert drawn("guidance=2,3") == [(2, 0, 32, 64, ""), (9, 3, 48, 64, "c")] * 2
    assert drawn("steps=4,5") == [
        (n, seed, width, 64, text) for n in (4, 5) for seed, width, text in ((0, 32, ""), (3, 48, "c"))
    ]
    assert drawn("size=16,24") == [
        (n, seed, size, size, text) for size in (16, 24) for n, seed, text in ((2, 0, ""), (9, 3, "c"))
    ]
    assert drawn("width=16") == [(2, 0, 16, 64, ""), (9, 3, 16, 64, "c")]


@pytest.mark.slow
def test_clip_skip_beyond_the_layers_is_refused(trained, tmp_path):
    with refused("clip-skip", clip_skip=2, layers=2):
        compare(trained, tmp_path / "r.html", drawing=["clip_skip=0,2"], console=Console(file=StringIO()))
    assert not list(tmp_path.iterdir())


def test_validation_difference_has_a_paired_standard_error():
    """Losses are paired by image if both runs measured the same images. Otherwise both standard errors are combined."""
    from fastsd.compare.numbers import _validation_difference

    rng = np.random.default_rng(0)
    base = rng.normal(0.3, 0.1, 64)
    other = base + rng.normal(0.01, 0.002, 64)

    def measured(losses, items):
        return {"loss": losses.mean(), "se": losses.std(ddof=1) / 8, "items": items, "each": losses.tolist()}

    class Run:
        def __init__(self, *rows):
            self.validation_rows = lambda kind: list(rows)

    kind = ("held_out", "raw")
    paired = _validation_difference(Run(measured(other, "a")), Run(measured(base, "a")), kind)
    assert paired == f"{(other - base).mean():+.5f} ± {(other - base).std(ddof=1) / 8:.2g}"
    unpaired = _validation_difference(Run(measured(other, "b")), Run(measured(base, "a")), kind)
    assert float(unpaired.split("± ")[1]) > 20 * float(paired.split("± ")[1])
