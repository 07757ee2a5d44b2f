"""`fastsd compare RUN ... --out report.html`: read runs, and write a page that compares them and its pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from fastsd.compare import charts, draw, numbers, page, pictures
from fastsd.compare.numbers import Table
from fastsd.compare.page import Section
from fastsd.compare.runs import SMOOTHING_WINDOW, RunData, read_runs
from fastsd.errors import UserError
from fastsd.run.settings import safe_name
from fastsd.storage import new_folder, replace_file, write_text

TABLES = "tables.json"  # the page's tables, for programs; it marks a folder as a report's, which may be replaced


def compare(
    folders: Sequence[Path], out: Path, baseline: str = "", drawing: Sequence[str] = (), *, from_checkpoints: bool = False,
    console: Console | None = None,
) -> None:  # fmt: skip
    """Write the page `out`, and its pictures and animations into a folder beside it.

    Args:
        folders: folders of runs.
        out: the page, .html; an existing one is replaced.
        baseline: the run that others are measured against, by folder or by label; "" = the first.
        drawing: `KEY=a,b,c` words: draw the baseline's prompts again with these sampling settings.
        from_checkpoints: draw from the runs' saved checkpoints: the grids over training, and the models of `drawing`.

    Raises:
        UserError: a folder is not a run, the baseline is not among the runs, a setting cannot be drawn, or the page cannot
            be written. Nothing has been written then.
    """
    console = console or Console()
    runs = read_runs(folders)
    base = _baseline(runs, baseline)
    settings = draw.read_settings(drawing, base) if drawing or from_checkpoints else []
    target = _beside(out)
    with new_folder(target) as new:
        report = ComparisonReport(runs, base, new, console)
        if from_checkpoints:
            report.redraw()
        report.curves()
        report.samples()
        report.over_training()
        if drawing:
            report.draw(settings, from_checkpoints)
        report.end()
        write_text(new / TABLES, json.dumps(report.tables, indent=2, ensure_ascii=False))
        title = f"{runs[0].label}" if len(runs) == 1 else f"{len(runs)} runs compared"
        text = page.page(title, report.sections)
    replace_file(out, text)
    message = f"{out}: {len(runs)} run{'s'[: len(runs) > 1]}, {len(text) / 1e6:.1f} MB; its pictures are in {target}"
    console.print(message, markup=False, highlight=False, soft_wrap=True)


class ComparisonReport:
    """A page under construction. Sections are added in order; pictures are written to `folder` at once."""

    def __init__(self, runs: Sequence[RunData], baseline: RunData, folder: Path, console: Console) -> None:
        self.runs, self.baseline, self.folder, self.console = runs, baseline, folder, console
        self.sections: list[Section] = []
        self.tables: dict[str, object] = {}
        self.several = len(runs) > 1
        self.names = {run.label: f"{i}-{safe_name(run.label)}" for i, run in enumerate(runs, 1)}

    def redraw(self) -> None:
        """Replace the grids drawn during training by grids drawn from the checkpoints."""
        for run in self.runs:
            folder = self.folder / self.names[run.label]
            run.grids = draw.draw_checkpoints(run, self.baseline.config.sample, folder, self.console.print)

    def curves(self) -> None:
        self._table(numbers.overview(self.runs, self.baseline))
        if self.several:
            self._table(numbers.settings(self.runs))
        note = f"Faint: as logged. Strong: a moving average over {SMOOTHING_WINDOW:.0%} of the rows, within a stage."
        self._chart("Training loss", note, "loss", charts.loss_chart(self.runs))
        validation, bands = charts.validation_chart(self.runs), charts.band_chart(self.runs)
        if validation:
            note = "The same images, noise and timesteps every time; bars are one standard error."
            self._chart("Validation loss", note, "validation", validation)
        if bands:
            note = "High timesteps are nearly pure noise and decide composition, low ones decide detail."
            self._chart("Validation loss by timestep", note, "bands", bands)
        self._table(numbers.trends(self.runs))
        self._chart("Learning rate", "With D-Lion, d · lr is the size of a step.", "rates", charts.rate_chart(self.runs))

    def samples(self) -> None:
        sheet = pictures.side_by_side(self.runs)
        pixels, difference_sheet, factor = pictures.against(self.runs, self.baseline)
        if self.several:
            self._table(numbers.against(self.runs, self.baseline, pixels))
        if sheet:
            html = self._picture("samples", sheet, "the last samples of each run")
            self.sections.append(Section("Samples at the end", "A row has one prompt and seed.", html))
        if difference_sheet:
            note = f"|difference| to the samples of {self.baseline.label}, times {factor}: black is equal."
            html = self._picture("difference", difference_sheet, f"differences of the last samples, times {factor}")
            self.sections.append(Section("Difference in pictures", note, html))

    def over_training(self) -> None:
        films = []
        for run in self.runs:
            if len(run.grids) > 1:
                frames = pictures.frames(run.grids)
                pictures.write_gif(self.folder / f"checkpoints-{self.names[run.label]}.gif", run.label, frames)
                films.append((run, frames))
        if films:
            note = "All runs at the step chosen, or at their last before it. The same as .gif in the folder beside this page."
            self.sections.append(Section("Through training", note, page.film(films)))
            sheets = [
                self._picture(f"checkpoints-{self.names[run.label]}", pictures.over_checkpoints(run),
                              f"samples of {run.label} over training", run)
                for run, _ in films
            ]  # fmt: skip
            note = "A row has one prompt and seed, a column one stage and step."
            self.sections.append(Section("Prompts x checkpoints", note, "".join(sheets)))

    def draw(self, settings: Sequence[draw.Setting], from_checkpoints: bool) -> None:
        groups: list[tuple[RunData | None, list[draw.DrawSource]]] = [(None, draw.finished_models(self.runs))]
        if from_checkpoints:
            groups = [(run, draw.sources_of(run)) for run in self.runs]
        shown = []
        for run, sources in groups:
            self.console.print(f"drawing {len(sources)} models with {len(settings)} settings", highlight=False)
            for p, (prompt, sheet) in enumerate(draw.draw_settings(sources, settings), 1):
                name = f"draw-{self.names[run.label] if run else 'models'}-{p}"
                caption = f"{run.label}: {prompt}" if run else prompt
                shown.append(self._picture(name, sheet, f"{caption}, models by sampling settings", caption))
        note = f"A row has one model, a column one way to sample; prompts and everything else as in {self.baseline.label}."
        self.sections.append(Section("Models x sampling settings", note, "".join(shown)))

    def end(self) -> None:
        self._table(numbers.costs(self.runs))
        if self.several:
            self._table(numbers.agreement(self.runs, self.baseline))

    def _table(self, table: Table) -> None:
        self.sections.append(page.table_section(table))
        words = [[word.label if isinstance(word, RunData) else word for word in row] for row in (table.head, *table.rows)]
        self.tables[table.title] = {"head": words[0], "rows": words[1:]}

    def _chart(self, title: str, note: str, name: str, figure: Figure) -> None:
        path = self.folder / f"{name}.png"
        figure.savefig(path)
        with Image.open(path) as image:
            self.sections.append(Section(title, note, page.picture(image, title, lossless=True)))

    def _picture(self, name: str, image: Image.Image, alt: str, caption: str | RunData = "") -> str:
        image.save(self.folder / f"{name}.png")
        return page.picture(image, alt, caption)


def _baseline(runs: Sequence[RunData], name: str) -> RunData:
    if not name:
        return runs[0]
    for run in runs:
        if name == run.label or Path(name).resolve() == run.folder.resolve():
            return run
    names = ", ".join(run.label for run in runs)
    raise UserError("unknown-baseline-run", f"--baseline is {name!r}, which is not among the runs ({names}); name one of them")


def _beside(out: Path) -> Path:
    """Return the folder for a page's pictures. Raises UserError if the page or the folder would replace something else."""
    folder = out.with_suffix("")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError("page-ending", f"--out is {str(out)!r}; give a file that ends in .html")
    if out.is_dir():
        raise UserError(
            "page-is-folder", f"--out is {str(out)!r}, which is a folder; give the name of a file that ends in .html"
        )
    if folder.exists() and not (folder / TABLES).is_file():
        raise UserError(
            "page-pictures-in-use",
            f"--out is {str(out)!r} and its pictures would go into {folder}, which is in use; choose another name",
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "page-folder", f"--out is {str(out)!r}: its folder cannot be made ({error.strerror}); choose another place"
        ) from None
    return folder
