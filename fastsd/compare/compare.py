"""`fastsd compare RUN ... --out report.html`: write a page with pictures that compares runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from fastsd.compare import charts, draw, numbers, page, pictures
from fastsd.compare.numbers import Table
from fastsd.compare.page import Section
from fastsd.compare.runs import SMOOTHING_WINDOW, RunData, read_runs
from fastsd.errors import UserError
from fastsd.run.settings import safe_name
from fastsd.storage import new_file, new_folder, replace_file, write_text
from fastsd.terminal.console import STDOUT, Console, work
from fastsd.terminal.texts import size_text

TABLES = "tables.json"  # the page's tables for other programs; a folder with this file belongs to a report and may be replaced


def compare(
    folders: Sequence[Path],
    out: Path,
    baseline: str = "",
    drawing: Sequence[str] = (),
    *,
    from_checkpoints: bool = False,
    console: Console = STDOUT,
) -> None:
    """Write the page `out`. Its pictures and animations go into a folder beside it.

    Args:
        folders: folders of runs.
        out: path of the .html file; an existing file is replaced.
        baseline: folder or label of the run that the others are compared with; "" = the first run.
        drawing: `KEY=a,b,c` words. The baseline's prompts are drawn again with these sampling settings.
        from_checkpoints: draw the samples during training, and those of `drawing`, from all saved checkpoints.

    Raises:
        UserError: a folder is not a run, the baseline is not among the runs, a setting cannot be drawn, or the page cannot
            be written. Nothing is written in these cases.
    """
    runs = read_runs(folders)
    baseline_run = _baseline(runs, baseline)
    settings = draw.read_settings(drawing, baseline_run) if drawing or from_checkpoints else []
    picture_folder = _picture_folder(out)

    with new_folder(picture_folder) as folder, work("comparing runs"):
        report = ComparisonReport(runs, baseline_run, folder, console)
        if from_checkpoints:
            report.redraw()
        report.samples()
        report.over_training()
        report.overview()
        report.curves()
        if drawing:
            report.draw(settings, from_checkpoints=from_checkpoints)
        report.end()
        write_text(folder / TABLES, json.dumps(report.tables, indent=2, ensure_ascii=False))
        title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared"
        html = page.page(title, report.sections)

    replace_file(out, html)
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    console.echo(f"{out}: {count}, {size_text(len(html))}; images in {picture_folder}")


class ComparisonReport:
    """A page under construction. Sections are added in order. Pictures are written to `folder` as they are drawn."""

    def __init__(self, runs: Sequence[RunData], baseline: RunData, folder: Path, console: Console) -> None:
        self.runs, self.baseline, self.folder, self.console = runs, baseline, folder, console
        self.sections: list[Section] = []
        self.tables: dict[str, object] = {}
        self.several = len(runs) > 1
        self.pixels: dict[str, pictures.Pixels] = {}
        self.names = {run.label: f"{i}-{safe_name(run.label)}" for i, run in enumerate(runs, 1)}

    def redraw(self) -> None:
        """Replace the sample grids of training by grids drawn from the saved checkpoints."""
        for run in self.runs:
            folder = self.folder / self.names[run.label]
            run.grids = draw.draw_checkpoints(run, self.baseline.config.sample, folder, self.console)

    def overview(self) -> None:
        self._table(numbers.overview(self.runs, self.baseline))
        if self.several:
            self._table(numbers.settings(self.runs))
            self._table(numbers.baseline_differences(self.runs, self.baseline, self.pixels))

    def curves(self) -> None:
        note = f"Faint: as logged. Bold: moving average over {SMOOTHING_WINDOW:.0%} of the log rows, computed per stage."
        self._chart("Training loss", note, "loss", charts.loss_chart)
        note = "Every point uses the same images, noise and timesteps. Error bars show one standard error."
        self._chart("Validation loss", note, "validation", charts.validation_chart)
        note = "High timesteps are nearly pure noise and determine composition; low timesteps determine detail."
        self._chart("Validation loss by timestep", note, "bands", charts.band_chart)
        self._table(numbers.trends(self.runs))
        self._chart("Learning rate", "With D-Lion, the step size is d · lr.", "rates", charts.rate_chart)

    def samples(self) -> None:
        sheet = pictures.side_by_side(self.runs)
        self.pixels, difference_sheet, factor = pictures.pixel_differences(self.runs, self.baseline)
        if sheet:
            html = self._picture("samples", sheet, "final samples of each run")
            self.sections.append(Section("Final samples", "Each row shows one prompt and seed.", html))
        if difference_sheet:
            note = f"Absolute pixel difference from the baseline, multiplied by {factor}. Black means equal."
            html = self._picture("difference", difference_sheet, f"pixel differences of the final samples, times {factor}")
            self.sections.append(Section("Pixel differences", note, html))

    def over_training(self) -> None:
        films = []
        for run in self.runs:
            if len(run.grids) > 1:
                frames = pictures.frames(run.grids)
                pictures.write_gif(self.folder / f"checkpoints-{self.names[run.label]}.gif", run.label, frames)
                films.append((run, [(grid, page.data_uri(image)) for grid, image in frames]))
        if films:
            note = "Samples of each run at the selected step or the last one before it. The image folder has them as GIFs."
            self.sections.append(Section("Samples during training", note, page.film(films)))
            sheets = []
            for run, _ in films:
                name, alt = f"checkpoints-{self.names[run.label]}", f"samples of {run.label} during training"
                sheets.append(self._picture(name, pictures.over_checkpoints(run), alt, run))
            note = "Each row shows one prompt and seed, each column one stage and step."
            self.sections.append(Section("Prompts x checkpoints", note, "".join(sheets)))

    def draw(self, settings: Sequence[draw.Setting], *, from_checkpoints: bool) -> None:
        groups: list[tuple[RunData | None, list[draw.DrawSource]]] = [(None, draw.finished_models(self.runs))]
        if from_checkpoints:
            groups = [(run, draw.sources_of(run)) for run in self.runs]
        sheets = []
        for run, sources in groups:
            self.console.echo(f"drawing {len(sources)} models with {len(settings)} settings")
            for i, (prompt, sheet) in enumerate(draw.draw_settings(sources, settings), 1):
                name = f"draw-{self.names[run.label] if run else 'models'}-{i}"
                caption = f"{run.label}: {prompt}" if run else prompt
                sheets.append(self._picture(name, sheet, f"{caption}, models by sampling settings", caption))
        note = "Each row shows one model, each column one setting. Everything else is as in the baseline."
        self.sections.append(Section("Models x sampling settings", note, "".join(sheets)))

    def end(self) -> None:
        self._table(numbers.costs(self.runs))
        if self.several:
            self._table(numbers.agreement(self.runs, self.baseline))

    def _table(self, table: Table) -> None:
        self.sections.append(page.table_section(table))
        head, *rows = [[word.label if isinstance(word, RunData) else word for word in row] for row in (table.head, *table.rows)]
        self.tables[table.key or table.title] = {"head": head, "rows": rows}

    def _chart(self, title: str, note: str, name: str, draw_chart: charts.Chart) -> None:
        """Add a chart if there is anything to draw, and write it to the folder too."""
        figure = draw_chart(self.runs)
        if figure is None:
            return
        with new_file(self.folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png")
        self.sections.append(Section(title, note, page.chart(partial(draw_chart, self.runs), title)))

    def _picture(self, name: str, image: Image.Image, alt: str, caption: str | RunData = "") -> str:
        with new_file(self.folder / f"{name}.png") as temporary:
            image.save(temporary, "PNG")
        return page.picture(image, alt, caption)


def _baseline(runs: Sequence[RunData], name: str) -> RunData:
    if not name:
        return runs[0]
    for run in runs:
        if name == run.label or Path(name).resolve() == run.folder.resolve():
            return run
    names = ", ".join(run.label for run in runs)
    raise UserError("unknown-baseline-run", f"--baseline is {name!r}, which is not one of the runs; choose from {names}")


def _picture_folder(out: Path) -> Path:
    """Return the folder for a page's pictures. Raises UserError if the page or the folder would replace something else."""
    folder, option = out.with_suffix(""), f"--out is {str(out)!r}"
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError("page-ending", f"{option}; give a file name that ends in .html")
    if out.is_dir():
        raise UserError("page-is-folder", f"{option}, which is a folder; give a file name that ends in .html")
    if folder.exists() and not (folder / TABLES).is_file():
        raise UserError("page-pictures-in-use", f"{option}, but the folder {folder} is not from compare; choose another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("page-folder", f"{option}, but its folder cannot be made ({error.strerror}); choose another") from None
    return folder
