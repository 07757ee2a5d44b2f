"""`fastsd cache CONFIG --audit`: which images a VAE ruins, and what another VAE changes.

    DIR/audit/NAME.html         a page with the worst images, their reconstructions and differences
    DIR/audit/NAME.tsv          all images, worst first: the path, both errors, the worst tile, the errors of all tiles
    DIR/audit/NAME-worst.txt    the paths of the worst images, for data.exclude_files

DIR is the cache folder, and NAME the view of the config, with the start of the other VAE's hash if there is one, and `-fine` if
the fine error sorts the images. With two VAEs, images are sorted by gain: the error with the other VAE minus the error with the
config's. The list of the worst images goes by the error with the config's VAE. `fastsd/data/building/round_trip.py` defines the
errors.

Shapes: V VAEs, N images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from fastsd.commands.cache import print_reasons
from fastsd.commands.progress import progress
from fastsd.compare.audit_page import AuditPage
from fastsd.config.schema import Config
from fastsd.data.building.round_trip import GAIN, LOSS, MEASURES, TILE, WORST, Audit, Result, largest, open_audit
from fastsd.data.cache import view_name
from fastsd.errors import UserError
from fastsd.model.formats.load import load_vae
from fastsd.model.formats.model_source import locate, open_file, read_component
from fastsd.model.vae import Vae
from fastsd.run.settings import short_names
from fastsd.storage import make_folder, new_file, replace_file
from fastsd.terminal.console import STDOUT, Console, work
from fastsd.train.device import choose_device, choose_ops
from fastsd.train.precision import COMPUTE_DTYPE, precision_switches
from fastsd_kernels import Ops

SHOWN = 100  # images on the page and in the list, unless --worst says otherwise
MOST_SHOWN = 1000  # with more, a browser is slow
_ROWS = 10  # images in the table on the terminal


def check_options(others: Mapping[str, bool], against: str, worst: int | None, by: str | None, *, audit: bool) -> None:
    """Raise UserError unless the options of `fastsd cache` fit together. `others` are those of its other tasks."""
    if not audit:
        option = "--against" if against else "--by" if by else "--worst"
        raise UserError("audit-option-alone", f"{option} is an option of --audit; add --audit")
    if tasks := ", ".join(option for option, is_set in others.items() if is_set):
        raise UserError("audit-with-others", f"--audit is given with {tasks}; give one of them at a time")
    if worst is not None and not 1 <= worst <= MOST_SHOWN:
        raise UserError("audit-worst", f"--worst is {worst}; give the number of images to show, 1 to {MOST_SHOWN}")


def audit(config: Config, against: str = "", worst: int = SHOWN, by: str = MEASURES[0], console: Console = STDOUT) -> Path:
    """Measure the images of a config that have no result yet. Write the page and both lists, and print a summary.

    Args:
        against: another VAE: a folder, file or hub id; "" = none.
        worst: number of images on the page and in the list of paths.
        by: the measure that sorts the images, one of `MEASURES`.

    Returns:
        The path of the page.

    Raises:
        UserError: a VAE does not load, both are the same, or as `open_audit` and `reconstruct` do.
        Stopped: the user pressed Ctrl-C. The results so far remain.
    """
    device = choose_device(config.device, console)
    ops = choose_ops(config.kernels, device)
    vaes = [load_vae(config.model, ops=ops)] + ([_other_vae(against, config, ops)] if against else [])
    if against and _hashes(vaes[0]) == _hashes(vaes[1]):
        raise UserError("audit-same-vae", f"--against is {against!r}, which is the VAE of the config; give another one")
    for vae in vaes:
        vae.to(device, COMPUTE_DTYPE[config.cache.precision])
    labels = list(short_names([vae.name for vae in vaes]).values())
    name = view_name(config, vaes[0].hash) + (f"-{vaes[1].hash[:4]}{vaes[1].decoder_hash[:4]}" if against else "")
    name += f"-{by}" if by != MEASURES[0] else ""
    page = Path(config.cache.dir) / "audit" / f"{name}.html"

    start = time.perf_counter()
    with (
        ExitStack() as counting,
        precision_switches(config.cache.precision),
        open_audit(config, vaes, counting.enter_context(progress()), console.echo) as images,
    ):
        images.run()
        counting.close()  # what follows has a line of progress of its own
        errors = images.errors()
        count = errors.shape[2]
        _print_rejected(images, console)
        if not count:
            raise UserError("audit-no-image", "data.folders: all images were rejected; add usable images")
        make_folder(page.parent)
        write_table(page.with_suffix(".tsv"), images, count, by)
        listed = page.with_name(f"{name}-worst.txt")
        rows = [f"{result.image.name}\t{result.values[0]:.2f}\n" for result in images.results(WORST, by, worst)]
        replace_file(listed, f"# path\t{by}\n" + "".join(rows))
        replace_file(page, AuditPage(images, labels, errors, worst, by).html())
        seconds = time.perf_counter() - start
        past = f"{images.measured} measured now, {count - images.measured} already measured"
        console.echo(f"{count} images through {' and '.join(labels)} and back: {past} ({seconds:.1f} s)")
        _print_table(images, labels, by, console)
    _print_summary(errors, labels, by, console)
    console.echo(f"page: {page}; all images: {page.with_suffix('.tsv')}")
    console.echo(f'to train without the {len(rows)} worst images, look at them and set data.exclude_files = "{listed}"')
    return page


def _other_vae(against: str, config: Config, ops: Ops) -> Vae:
    """Load the VAE of --against. Its scaling factor does not matter, because latents are scaled and unscaled."""
    path = locate(against, "--against")
    component = open_file(path).read("vae", []) if path.is_file() else read_component(path, "vae")
    if component is None:
        raise UserError("audit-no-vae", f"--against is {against!r}, which contains no VAE; give an AutoencoderKL")
    factor = 1.0 if path.is_file() else None
    vae = load_vae(config.model.model_copy(update={"vae": str(path), "vae_scaling_factor": factor}), ops=ops)
    vae.name = against
    return vae


def _hashes(vae: Vae) -> tuple[str, str]:
    return vae.hash, vae.decoder_hash


def write_table(path: Path, images: Audit, count: int, by: str = MEASURES[0]) -> None:
    """Write all results line by line, and flush the file before it gets its name."""
    several = len(images.vaes) > 1
    columns = ["error", "fine", "tile_x", "tile_y", "tile_error", "tile_fine", "tiles", "tiles_fine"]
    head = ["# path", "width", "height", *columns]
    head += ["gain", *(f"against_{column}" for column in columns)] if several else []
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(head) + "\n")
        with work(f"writing {path.name}", count, "images") as writing:
            for result in images.results(GAIN if several else WORST, by):
                cells = [result.image.name, *map(str, result.size), *_numbers(result, 0)]
                if several:
                    cells += [f"{result.gain:.3f}", *_numbers(result, 1)]
                file.write("\t".join(cells) + "\n")
                writing.add()


def _numbers(result: Result, index: int) -> Iterator[str]:
    """Yield the columns of an image and the VAE with this index. The worst tile is that by the measure that sorts."""
    distortion = result.distortions[index]
    row, column = largest(result.tiles[index])
    yield from (f"{distortion.error:.3f}", f"{distortion.fine:.3f}", str(column * TILE), str(row * TILE))
    yield from (f"{value:.2f}" for value in distortion.tiles[:, row, column].tolist())
    for tiles in distortion.tiles.tolist():
        yield ";".join(",".join(f"{value:.2f}" for value in values) for values in tiles)


def _print_rejected(images: Audit, console: Console) -> None:
    if reasons := images.rejected():
        console.warn(f"{sum(reasons.values())} rejected:")
        print_reasons(console, reasons)


def _print_table(images: Audit, labels: Sequence[str], by: str, console: Console) -> None:
    """Print the worst images, or those with the largest gains and losses."""
    if len(labels) == 1:
        head = ["error", "fine", "worst tile", "at", "size", "image"]
        rows = [_row(result) for result in images.results(WORST, by, _ROWS)]
    else:
        head = ["gain", *(f"error, {label}" for label in labels), *(f"fine, {label}" for label in labels), "image"]
        gains = [result for result in images.results(GAIN, by, _ROWS // 2) if result.gain > 0]
        losses = [result for result in images.results(LOSS, by, _ROWS // 2) if result.gain <= 0]
        rows = [_comparison_row(result) for result in (*gains, *reversed(losses))]
    console.table([head, *rows], texts=["image"])


def _row(result: Result) -> list[str]:
    (distortion,) = result.distortions
    row, column = largest(result.tiles[0])
    sizes = [f"{column * TILE},{row * TILE}", "{}x{}".format(*result.size)]
    tile = f"{result.tiles[0, row, column]:.1f}"
    return [f"{distortion.error:.2f}", f"{distortion.fine:.2f}", tile, *sizes, result.image.name]


def _comparison_row(result: Result) -> list[str]:
    errors = [f"{distortion.error:.2f}" for distortion in result.distortions]
    fine = [f"{distortion.fine:.2f}" for distortion in result.distortions]
    return [f"{result.gain:+.2f}", *errors, *fine, result.image.name]


def _print_summary(errors_V2N: np.ndarray, labels: Sequence[str], by: str, console: Console) -> None:
    for label, (error_N, fine_N) in zip(labels, errors_V2N, strict=True):
        median, worst = np.median(error_N), error_N.max()
        fine = f"fine: median {np.median(fine_N):.2f}, worst {fine_N.max():.2f}"
        console.echo(f"{label}: error of 0-255: median {median:.2f}, worst {worst:.2f}; {fine}")
    if len(labels) == 2:
        first_N, second_N = errors_V2N[:, MEASURES.index(by)]
        gain = f"median gain {np.median(second_N - first_N):+.2f}"
        better = f"{(first_N < second_N).mean():.0%} of the images are better with {labels[0]}"
        console.echo(f"{better}, {(second_N < first_N).mean():.0%} with {labels[1]}; {gain}")
