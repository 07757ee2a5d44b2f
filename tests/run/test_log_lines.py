"""Console lines, log files and log rows of a run, with given numbers instead of a model."""

import errno
import io
import json
import math
import os
import re
import sys
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from runs import rows_of
from sentences import says

from fastsd.config.schema import LogTable, StageTable
from fastsd.config.stages import ENDLESS
from fastsd.data.loader import Batch
from fastsd.model.latent_space import LatentSpace
from fastsd.run import log as logs
from fastsd.run import report as reports
from fastsd.run.checkpoint import RunProgress
from fastsd.run.header import header
from fastsd.run.live_line import charts, duration, live_line
from fastsd.run.log import MAX_SKIPPED_ROWS, DeferredScalars, Log
from fastsd.run.position import Position
from fastsd.run.report import RowFile, TrainReport
from fastsd.run.rollback import StepsSkipped
from fastsd.run.smoothed_loss import DECAY, SmoothedLoss
from fastsd.terminal.console import Console
from fastsd.train.ranks import ALONE
from fastsd.train.step import StepResult
from fastsd_kernels import REFERENCE

VALUES = {
    "step": 7, "stage": "unet", "stage_step": 3, "epoch": 1.234, "loss": 0.12345, "loss_smooth": 0.2, "lr": 1e-4,
    "grad_norm": 1.5, "skipped": 0, "spikes": 0,
}  # fmt: skip
TIMING = {
    "stage_steps": 9,
    "images_per_second": 12.34,
    "memory_gb": 3.21,
    "data_wait": 0.25,
    "eta": 3700.0,
    "stage_eta": 3700.0,
    "seconds": 5.0,
}
LINE = (
    "unet 3/9 | loss 0.1235 ~0.2000 | ETA 1h01m | 12.3 img/s | lr 0.0001 | not saved yet | 3.0 GiB | grad 1.5 | wait 25% | "
    "epoch 1.23"
)


def make_report(folder, table=None, step=0, saved_at=None, terminal=False, logs=None):
    text = StringIO()
    console = Console(file=text, width=60, force_terminal=terminal)
    return TrainReport(folder, table or LogTable(tensorboard=False), step, saved_at, console, logs or {}), text


DURATIONS = {
    0: "0s", 59.9: "59s", 60: "1m00s", 425: "7m05s", 3599: "59m59s", 3600: "1h00m", 11520: "3h12m", 86399: "23h59m",
    86400: "1d00h", 446400: "5d04h", math.inf: "?", math.nan: "?",
}  # fmt: skip


@pytest.mark.parametrize("seconds", DURATIONS)
def test_durations(seconds):
    assert duration(seconds) == DURATIONS[seconds]


@pytest.mark.parametrize(
    "values, timing, saved_at, line",
    [
        ({}, {}, None, LINE),
        ({}, {}, 70.0, LINE.replace("not saved yet", "saved 30s ago")),
        ({}, {}, 170.0, LINE.replace("not saved yet", "saved 0s ago")),  # the clock was changed
        ({"skipped": 2}, {}, None, LINE.replace("3/9", "3/9 | skipped 2")),
        ({"skipped": 2, "spikes": 1}, {}, None, LINE.replace("3/9", "3/9 | spikes 1 | skipped 2")),
        ({}, {"canary_errors": 3.0}, None, LINE.replace("3/9", "3/9 | canary errors 3")),
        ({"d": 0.5}, {}, None, LINE.replace("lr 0.0001", "d*lr 5e-05") + " | d 0.5"),
        ({}, {"mfu": 0.4}, None, LINE + " | MFU 40%"),
        ({}, {"stage_steps": ENDLESS}, None, LINE.replace("3/9", "3")),
        ({}, {"eta": 8000.0}, None, LINE.replace("ETA 1h01m", "ETA 1h01m, all 2h13m")),
    ],
)
def test_console_line(values, timing, saved_at, line, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 100.0)
    report, text = make_report(tmp_path, saved_at=saved_at)
    report.row(VALUES | values, TIMING | timing)
    assert text.getvalue() == f"{line}\n"
    if saved_at is None:
        report.saved()
        report.row(VALUES | values, TIMING | timing)
        assert text.getvalue().splitlines()[1] == line.replace("not saved yet", "saved 0s ago")


@pytest.mark.parametrize(
    "width, last", [(1, "u"), (8, "unet 3/9"), (29, "unet 3/9"), (30, "~0.2000"), (80, "lr 0.0001"), (120, "wait 25%")]
)
def test_a_line_drops_what_does_not_fit(width, last):
    line = live_line(VALUES, TIMING, None, width)
    assert line.endswith(last) and len(line) <= width and LINE.startswith(line)


def test_charts_are_grouped_and_leave_out_what_is_no_curve():
    names = set(charts(VALUES | {"images": 12}, TIMING))
    numbers = {"train/epoch", "train/loss", "train/loss_smooth", "train/lr", "train/grad_norm", "train/skipped", "train/spikes"}
    assert names == numbers | {"speed/images_per_second", "speed/memory_gb", "speed/data_wait"}


def test_a_terminal_has_one_live_line(tmp_path):
    report, text = make_report(tmp_path, terminal=True)
    report.header({"data": "[x] " + "word " * 20})
    assert "\x1b[?25l" in text.getvalue()  # the cursor is hidden while the line is live
    report.row(VALUES, TIMING)
    report.close()
    assert "\x1b[?25h" in text.getvalue() and "unet 3/9" in text.getvalue()


def test_header_on_a_terminal_ends_its_lines_between_words_and_keeps_its_column(tmp_path):
    report, text = make_report(tmp_path, terminal=True)
    words = [f"word-{i}" for i in range(40)]
    report.header({"stages": " ".join(words), "x": "y"})
    report.close()
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text.getvalue()).splitlines()
    continued = [line for line in lines if line.startswith(" ") and line.strip()]
    assert len(continued) > 3 and max(map(len, lines)) <= report.console.width
    assert all(line.startswith(" " * len("stages    ")) for line in continued)
    assert [word for line in lines for word in line.split() if word in words] == words


def test_header_is_not_wrapped_or_interpreted(tmp_path):
    report, text = make_report(tmp_path)
    report.header({"data": "[red]" + "x" * 80, "longer": "y\nz"})
    assert text.getvalue().splitlines() == ["data    [red]" + "x" * 80, "longer  y", "        z"]


def test_rows_go_to_two_files_at_once(tmp_path):
    report, _ = make_report(tmp_path)
    values = VALUES | {"grad_norm": math.inf, "loss": math.nan, "list": [math.inf, 1], "d": None}
    report.row(values, TIMING)
    assert rows_of(tmp_path) == [values | {"grad_norm": None, "loss": None, "list": [None, 1]}]
    assert rows_of(tmp_path, "timing.jsonl") == [{"step": 7, **TIMING}]
    assert report.rows("unet") == rows_of(tmp_path) and report.rows("other") == []


def test_rows_after_the_checkpoint_and_half_rows_are_removed(tmp_path):
    rows = [json.dumps({"step": step}) for step in range(4)]
    names = ("log.jsonl", "timing.jsonl", "validation.jsonl")
    for name in names:
        (tmp_path / name).write_text("\n".join([rows[1], "{}", "not json", rows[2], rows[3], rows[0]]))
    make_report(tmp_path, step=2)[0].close()
    for name in names:
        assert [row["step"] for row in rows_of(tmp_path, name)] == [1, 2]
    # The measurement before step 1 is repeated, so its rows go, too.
    (tmp_path / "validation.jsonl").write_text(rows[0] + "\n")
    make_report(tmp_path, step=0)[0].close()
    assert rows_of(tmp_path, "validation.jsonl") == []


class SmallDisk:
    """A disk that takes `room` bytes more, or any number if that is None."""

    def __init__(self, monkeypatch) -> None:
        self.room: int | None = None
        disk = self

        class File(io.FileIO):
            def write(self, data):
                count = len(data) if disk.room is None else min(len(data), disk.room)
                if data and not count:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if disk.room is not None:
                    disk.room -= count
                return super().write(data[:count])

        monkeypatch.setattr(reports, "open", lambda path, mode, **_: File(path, mode), raising=False)


def test_a_full_disk_delays_rows(tmp_path, monkeypatch):
    """The disk takes 100 bytes more. All rows of both files are there when there is room again, also after 50 rows."""
    disk = SmallDisk(monkeypatch)
    report, text = make_report(tmp_path)
    report.row(VALUES, TIMING)
    disk.room = 100
    for step in range(8, 58):
        report.row(VALUES | {"step": step}, TIMING)
    assert says(text.getvalue(), "row-not-written", file="log.jsonl", step=8, strerror="No space left on device", lost="")
    assert text.getvalue().count("warning: ") == 2  # once for each file
    with pytest.raises(OSError, match="No space left"):
        report.flush()
    disk.room = None
    report.validation(validation_rows())
    report.flush()
    for name in ("log.jsonl", "timing.jsonl"):
        assert [row["step"] for row in rows_of(tmp_path, name)] == list(range(7, 58))


def test_rows_beyond_the_memory_for_them_are_lost_with_a_word(tmp_path, monkeypatch):
    disk = SmallDisk(monkeypatch)
    report, text = make_report(tmp_path)
    disk.room = 0
    monkeypatch.setattr(RowFile, "LIMIT", 1500)
    for step in range(7, 30):
        report.row(VALUES | {"step": step}, TIMING)
    disk.room = None
    report.row(VALUES | {"step": 30}, TIMING)
    steps = [row["step"] for row in rows_of(tmp_path)]
    lost = steps[-1] + 1 if 30 not in steps else next(step for step in range(7, 30) if step not in steps)
    assert 7 in steps and 29 not in steps and report.log.lost == lost
    assert says(text.getvalue(), "row-not-written", step=lost, lost=f", and from step {lost} on rows are lost")


def test_logs_are_on_the_disk_before_a_checkpoint(tmp_path, disk):
    report, _ = make_report(tmp_path)
    report.row(VALUES, TIMING)
    report.flush()
    assert disk() == ["log.jsonl", tmp_path.name, "timing.jsonl", tmp_path.name]  # a new file's name must be there as well


def validation_rows(**changes):
    row = {"step": 4, "set": "held_out", "weights": "raw", "loss": 0.5, "images": 3, "se": 0.1}
    return [
        row | {"bands": [[0, 500, 0.25, 0.01], [500, 1000, 0.75, 0.02]]} | changes for changes in (changes, {"weights": "ema"})
    ]


def test_validation_rows(tmp_path, disk):
    report, text = make_report(tmp_path)
    rows = validation_rows()
    report.validation(rows)
    report.flush()
    assert rows_of(tmp_path, "validation.jsonl") == rows and disk() == ["validation.jsonl", tmp_path.name]
    assert text.getvalue().startswith("validation at step 4: ")


def test_tensorboard_has_numbers_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report, _ = make_report(tmp_path, LogTable(tensorboard=True))
    report.row(VALUES | {"order": "a hash"}, TIMING)
    report.validation(validation_rows())
    report.images(tmp_path / "step-1.png", 7, Image.new("RGB", (6, 4), "red"))
    report.images(tmp_path / "ema-step-1.png", 7, Image.new("RGB", (6, 4), "red"))
    report.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    kinds = ("held_out", "held_out_ema")
    validation = {f"validation/{kind}" for kind in kinds}
    validation |= {f"validation/{kind}/t{band}" for kind in kinds for band in ("0000-0499", "0500-0999")}
    assert set(tags["scalars"]) == charts(VALUES, TIMING).keys() | validation
    assert [(event.step, event.value) for event in events.Scalars("train/skipped")] == [(7, 0.0)]
    assert [(event.step, event.value) for event in events.Scalars("validation/held_out/t0500-0999")] == [(4, 0.75)]
    assert set(tags["images"]) == {"samples/step", "samples/ema-step"}
    (image,) = events.Images("samples/step")
    assert (image.step, image.width, image.height) == (7, 6, 4)
    # A resumed run replaces what lies after its checkpoint.
    report, _ = make_report(tmp_path, LogTable(tensorboard=True), step=5)
    report.close()
    assert not EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/skipped")


def test_wandb_gets_the_same_rows(tmp_path, monkeypatch):
    calls = []
    wandb = SimpleNamespace(
        init=lambda **options: calls.append(options) or wandb,
        log=lambda scalars, step: calls.append((scalars, step)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    report, _ = make_report(tmp_path, LogTable(tensorboard=False, wandb="project"))
    report.row(VALUES, TIMING)
    report.close()
    name = tmp_path.name
    assert calls == [
        {"project": "project", "name": name, "dir": str(tmp_path), "id": name, "resume": "allow"},
        (charts(VALUES, TIMING), 7),
        "finish",
    ]


def position(progress, *steps, **stages):
    table = [StageTable(train=["unet"], until=until, batch=4) for until in stages.get("until", steps)]
    return Position(progress, table, steps, extendable=stages.get("extendable", True))


def test_time_left(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 50.0)
    progress = RunProgress(stage=1, stage_step=3, seconds=20.0)
    assert position(progress, 10, 13, 40).seconds_left(2.0) == 10 / 2 + 40 / 2
    assert position(progress, 10, 13, 40).seconds_left(2.0, stages=1) == 10 / 2
    assert position(progress, 10, ENDLESS, 40, until=(10, "1m", 40)).seconds_left(2.0) == 40 + 40 / 2
    assert position(progress, 10, 13, ENDLESS, until=(10, 13, "1m")).seconds_left(2.0) == 10 / 2 + 60
    assert position(progress, 10, ENDLESS, until=(10, "10s")).seconds_left(2.0) == 0


def test_a_stage_ends_by_steps_or_by_time(monkeypatch):
    now = 50.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = RunProgress(stage_step=3, seconds=20.0)
    assert not position(progress, 4).at_end(0) and position(progress, 3).at_end(0) and position(progress, 2).at_end(0)
    timed = position(progress, ENDLESS, until=("30s",))
    step = SimpleNamespace(stage=timed.stages[0], micro_batch_size=2)
    assert not timed.at_end(0) and timed.elapsed() == 20
    now = 59.5
    timed.advance(step)
    assert not timed.at_end(0)
    now = 60.0
    assert not timed.at_end(0) and timed.elapsed() == 30  # the latest step ended in time
    timed.advance(step)
    assert timed.at_end(0)


def test_a_finished_last_stage_can_be_extended_if_its_state_exists():
    done = RunProgress(stage=1, stage_step=3, stage_done=True)
    assert position(done, 3, 3).finished(0) and position(done, 3, 3).finished(1)
    assert not position(done, 3, 4).finished(1)
    assert position(done, 3, 4, extendable=False).finished(1) and position(done, 3, 4, 9).finished(1)
    assert not position(RunProgress(stage=1, stage_step=3), 3, 3).finished(1) and not position(done, 3, 3, 3).finished(2)


def test_a_stage_begins_or_is_resumed(monkeypatch):
    now = 50.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = RunProgress(stage=1, stage_step=3, step=8, images=32, seconds=20.0, stage_images=20, carried=2)
    resumed = position(progress, 5, 5, 5)
    now = 90.0
    assert resumed.begin(1) and resumed.progress == progress and resumed.elapsed() == 20  # the time of loading is not counted
    reset, carried = position(progress, 5, 5, 5), position(progress, 5, 5, 5)
    carried.stages[2] = StageTable(train=["unet"], until=5, batch=4, state="carry")
    for entered, count in ((reset, 0), (carried, 5)):
        assert not entered.begin(2)
        assert entered.progress == RunProgress(stage=2, step=8, images=32, stage_images=32, carried=count)
    assert not position(RunProgress(), 5).begin(0)
    step = SimpleNamespace(stage=resumed.stages[1], micro_batch_size=2)
    now = 93.0
    resumed.advance(step)
    resumed.mark(done=True, validation=True, samples=False)
    assert resumed.progress == RunProgress(
        stage=1,
        stage_step=4,
        step=9,
        images=36,
        seconds=23.0,
        stage_images=20,
        carried=2,
        validation_due=True,
        micro_batch_size=2,
        micro_batch_setting=step.stage.micro_batch,
        stage_done=True,
    )
    assert resumed.elapsed() == 23


class Recorder:
    """A report that collects rows."""

    def __init__(self):
        self.pairs = []

    def row(self, values, timing):
        self.pairs.append((values, timing))

    def rows(self, stage):
        return []


class Steps:
    """A step of two components, and its run, whose clock the test sets."""

    def __init__(self, monkeypatch, folder, every=1):
        self.now, self.report, self.warnings = 100.0, Recorder(), []
        self.console = SimpleNamespace(warn=self.warnings.append)
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(logs, "memory_gb", lambda device: 1.25)
        rates = {"unet": 1.0, "text_encoder": 0.5}
        self.stage = StageTable(train=list(rates), until=100, batch=4, optimizer="dlion", d0=1e-6, lr=rates)
        self.position = SimpleNamespace(
            progress=RunProgress(stage=1),
            elapsed=lambda: 11.0,
            seconds_left=lambda rate, stages=None: (30 if stages else 60) / rate,
        )
        self.smoothed, self.in_row = SimpleNamespace(value=lambda: torch.tensor(0.75)), 0
        self.health = SimpleNamespace(
            scalars=lambda: {"spikes": torch.tensor(2.0), "skipped_in_row": torch.tensor(self.in_row)}
        )
        self.config = SimpleNamespace(log=SimpleNamespace(every=every), stage_name=lambda index: f"stage {index}")
        self.data, self.device, self.folder = SimpleNamespace(epochs=[1, 20]), torch.device("cpu"), folder
        self.total, self.optimizers, self.skipped = 100, {"unet": None, "text_encoder": None}, torch.tensor(0.0)
        self.batches = SimpleNamespace(waited=0.0)
        self.log = Log(self, self, 1)

    def d(self):
        return {"unet": torch.tensor(2.0), "text_encoder": torch.tensor(3.0)}

    def batch_fingerprints(self, batch):
        return {"order": f"hash of {len(batch.captions)}"}

    def run(self, steps, seconds, waited=0.0, skipped=0.0):
        """Do some steps, then report a row."""
        self.now += seconds
        self.batches.waited += waited
        old = self.position.progress
        self.position.progress = RunProgress(
            stage=1, stage_step=old.stage_step + steps, step=old.step + steps, images=old.images + 4 * steps
        )
        result = StepResult(torch.tensor(0.5), torch.tensor(1.5), torch.tensor(skipped))
        self.log.row(result, Batch(torch.zeros(2), torch.zeros(2), torch.zeros(2), ["", ""]), self.batches)


def test_log_rows_are_written_one_interval_late(monkeypatch, tmp_path):
    steps = Steps(monkeypatch, tmp_path)
    steps.run(5, seconds=2.0, waited=0.5)
    assert steps.report.pairs == []
    steps.run(10, seconds=1.0)
    with steps.log.paused():
        steps.now += 1000
    assert len(steps.report.pairs) == 1
    steps.run(5, seconds=2.5, waited=0.25)
    steps.log.flush()
    steps.log.flush()
    first, second, third = steps.report.pairs
    values = {
        "step": 5, "stage": "stage 1", "stage_step": 5, "images": 20, "epoch": 1.0, "order": "hash of 2",
        "lr": 1.0, "lr_text_encoder": 0.5, "loss": 0.5, "loss_smooth": 0.75, "grad_norm": 1.5, "skipped": 0,
        "spikes": 2, "d": 2.0, "d_text_encoder": 3.0,
    }  # fmt: skip
    timing = {
        "stage_steps": 100,
        "seconds": 11.0,
        "images_per_second": 10.0,
        "data_wait": 0.25,
        "memory_gb": 1.25,
        "eta": 24.0,
        "stage_eta": 12.0,
    }
    assert first == (values, timing)
    assert second[0]["step"] == 15 and second[1]["images_per_second"] == 40 and second[1]["data_wait"] == 0
    assert third[0]["step"] == 20 and third[1]["images_per_second"] == 8 and third[1]["data_wait"] == 0.1
    assert list(first[0]) == list(values) and steps.warnings == []


def test_skipped_steps_are_reported_and_many_in_a_row_end_the_attempt(monkeypatch, tmp_path):
    steps = Steps(monkeypatch, tmp_path, every=10)
    for total in (0, 3, 3, 13, 23, 23, 33, 43):
        steps.run(10, seconds=1.0, skipped=float(total))
    counts = [(2, 3), (4, 10), (5, 10), (7, 10)]
    assert len(steps.warnings) == len(counts)  # the last row is not written yet
    for text, (row, count) in zip(steps.warnings, counts, strict=True):
        assert says(text, "steps-skipped", count=count, step=10 * row)
    for steps.in_row in (29, 30):
        steps.log.flush()
        steps.run(10, seconds=1.0, skipped=53.0)
    assert MAX_SKIPPED_ROWS == 3
    with pytest.raises(StepsSkipped) as error:
        steps.log.flush()
    assert error.value == StepsSkipped(first=71, last=100, end_image=400)
    steps.log.flush()  # the row was written
    assert steps.report.pairs[-1][0]["step"] == 100


def test_skipped_steps_of_an_earlier_start_are_not_reported_again(monkeypatch, tmp_path):
    steps = Steps(monkeypatch, tmp_path)
    steps.skipped = torch.tensor(4.0)
    steps.log = Log(steps, steps, 1)
    steps.run(1, seconds=1.0, skipped=4.0)
    steps.log.flush()
    assert steps.warnings == []


def test_deferred_scalars_keep_their_values():
    value = torch.tensor(1.5)
    deferred = DeferredScalars({"a": value, "b": torch.tensor(3)})
    value.fill_(9)
    assert deferred.read() == {"a": 1.5, "b": 3.0}


def test_smoothed_loss_is_the_corrected_average_of_finite_losses():
    losses = [4.0, 1.0, math.nan, 2.0, math.inf]
    smoothed = SmoothedLoss(torch.device("cpu"))
    smoothed.load_state_dict({})
    assert math.isnan(smoothed.value())
    expected = []
    for loss in losses:
        smoothed.update(torch.tensor(loss))
        expected += [loss] if math.isfinite(loss) else []
        weights = [DECAY ** (len(expected) - 1 - i) for i in range(len(expected))]
        average = sum(weight * value for weight, value in zip(weights, expected, strict=True)) / sum(weights)
        assert float(smoothed.value()) == pytest.approx(average, rel=1e-12) and smoothed.value().dtype == torch.float64
    # A resumed run continues with the same numbers, in memory of its own.
    saved = {name: tensor.clone() for name, tensor in smoothed.state_dict().items()}
    resumed = SmoothedLoss(torch.device("cpu"))
    resumed.load_state_dict(saved)
    for follower in (smoothed, resumed):
        follower.update(torch.tensor(3.0))
    assert torch.equal(smoothed.value(), resumed.value()) and not torch.equal(saved["loss"], resumed.state_dict()["loss"])


def header_of(images=21, epochs=(21,), step=0, cached=21, shapes=1, measured=False, **facts):
    """Return the header of a run of two stages, of which the second ends by time."""
    rates = {"unet": 1e-4, "text_encoder": 1e-5}
    tables = (
        StageTable(train=list(rates), until=9, batch=6, micro_batch=3, lr=rates, optimizer="lion"),
        StageTable(train=["unet"], until="2h", batch=4, precision="bf16"),
    )

    class Latents:
        meta = SimpleNamespace(
            rejected=facts.get("rejected", 0), empty_captions=facts.get("empty", 0), cached=cached, images=images + 2
        )
        groups = [SimpleNamespace(shape=(4, 8, 8 + i)) for i in range(shapes)]

        def __len__(self):
            return images

    run = SimpleNamespace(
        folder="folder", ops=REFERENCE, device=torch.device("cpu"), parameter_counts=[1000, 2000000], ranks=ALONE
    )
    run.config = SimpleNamespace(stage=tables, stage_name=lambda i: f"s{i}", data=SimpleNamespace(resolution=512))
    run.config.model = SimpleNamespace(base="base", vae=facts.get("vae", ""), clip_skip=facts.get("clip_skip", 0))
    run.config.cache, run.config.validate_ = SimpleNamespace(dir="cache"), SimpleNamespace(every=5)
    run.data = SimpleNamespace(latents=Latents(), epochs=list(epochs), text_embeddings=facts.get("embeddings"))
    run.data.sets = SimpleNamespace(measured=measured)
    run.model = SimpleNamespace(vae=SimpleNamespace(channels=4, latent_space=LatentSpace(0.13025)))
    run.position = SimpleNamespace(steps=[9, ENDLESS], progress=SimpleNamespace(step=step))
    run.evaluation = SimpleNamespace(validation="4 images")
    return header(run)


def test_header_of_a_new_run():
    lines = header_of()
    assert list(lines) == ["run", "kernels", "base", "vae", "images", "cache", "stages", "line"]
    assert re.fullmatch(r"reference.* on cpu \(1 threads\), \d+\.\d [MG]iB in use", lines.pop("kernels"))
    assert lines == {
        "run": "folder (9 steps, 2h)",
        "base": "base",
        "vae": "base, 4 channels, scaling factor 0.13025",
        "images": "21 at 512 px",
        "cache": "21 of 23 images cached (cache)",
        "stages": "s0: unet+text_encoder lion lr 0.0001/1e-05 fp32, batch 6 (micro-batch 3), 1,000 parameters, 9 steps\n"
        "s1: unet dlion lr 1 bf16, batch 4, 2,000,000 parameters, 2h",
        "line": "~ = smoothed loss, ETA = time left in the stage, all = in all stages, d*lr = step size of D-Lion, which finds "
        "d, wait = share of the time spent waiting for data",
    }


def test_header_names_only_facts_that_apply():
    lines = header_of(
        epochs=(30, 30, 17),
        step=12,
        shapes=3,
        measured=True,
        rejected=2,
        empty=5,
        embeddings=object(),
        vae="other",
        clip_skip=2,
    )
    assert lines["run"] == "folder (9 steps, 2h, resumed at step 12)" and lines["vae"].startswith("other, ")
    assert lines["images"] == "21 at 512 px in 3 sizes, 30 or 17 per epoch, 5 empty captions"
    assert lines["cache"] == "21 of 23 images cached, 2 rejected, with text embeddings (cache)"
    assert lines["validation"] == "4 images, every 5"
    assert says(lines["text"], "clip-skip-counts", clip_skip=2, place="3rd", others=3)


ROW = b'{"step": %d, "stage": "unet"}\n'
DAMAGED_LOGS = {
    "only a kill": (b"".join(ROW % step for step in range(1, 9)) + b'{"st', None, None),
    "a row": (ROW % 1 + b"\xff{\n" + b"".join(ROW % step for step in range(3, 9)), 1, None),
    "the end": (b"".join(ROW % step for step in range(1, 5)), None, 4),
    "all": (bytes(200), 1, 0),
    "no file": (None, None, 0),
    "larger intervals before": (ROW % 3 + ROW % 6, None, None),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED_LOGS)
def test_a_restart_names_rows_that_are_lost(damage, tmp_path):
    """A checkpoint of step 8 has the rows up to there, so a kill costs only half of a later one."""
    data, damaged, last = DAMAGED_LOGS[damage]
    (tmp_path / "timing.jsonl").write_bytes(b"".join(ROW % step for step in range(1, 9)))
    if data is not None:
        (tmp_path / "log.jsonl").write_bytes(data)
    _, text = make_report(tmp_path, LogTable(tensorboard=False, every=1), step=8)
    lines = text.getvalue()
    assert says(lines, "rows-damaged", file="log.jsonl", count=damaged) if damaged else not says(lines, "rows-damaged")
    missing = says(lines, "rows-missing", file="log.jsonl", last=last, step=8)
    assert missing if last is not None else not says(lines, "rows-missing")


LATER = b'{"step": 8, "set": "held_out"}\n'  # measured after the checkpoint of step 8
CHANGES = {
    "nothing": lambda data: data,
    "later rows": lambda data: data + LATER,
    "half a later row": lambda data: data + LATER[:9],
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "a row less": lambda data: data[data.index(b"\n") + 1 :],
    "a row twice": lambda data: data[: data.index(b"\n") + 1] + data,
    "another digit": lambda data: data.replace(b"0.25", b"0.75"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["log.jsonl", "validation.jsonl"])
def test_a_restart_notices_every_change_of_the_rows_that_a_checkpoint_recorded(name, change, tmp_path):
    table = LogTable(tensorboard=False, every=1)
    report, _ = make_report(tmp_path, table)
    file = {"log.jsonl": report.log, "validation.jsonl": report.validations}[name]
    for step in (2, 4, 6):
        file.append(f'{{"step": {step}, "loss": 0.25}}\n')
    digests = report.digests()
    assert {key: digest["rows"] for key, digest in digests.items()} == {"log.jsonl": 0, "validation.jsonl": 0} | {name: 3}
    path = tmp_path / name
    data = CHANGES[change](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    report, text = make_report(tmp_path, table, step=8, logs=digests)
    text, is_whole = text.getvalue(), change in ("nothing", "later rows", "half a later row")
    named = says(text, "rows-changed", file=name, step=8) or says(text, "rows-missing", file=name, step=8)
    assert named or says(text, "rows-damaged", file=name) if not is_whole else not says(text, "rows-changed")
    assert not is_whole or report.digests()[name]["rows"] == 3 + (change == "later rows")
