"""Rollback: after too many skipped steps in a row, a run goes back to its last healthy checkpoint, once in a stage.

It goes on past the images that it has used since then: the updates before the first skipped step have led to it, so their
images are passed over too.  A file in the checkpoint records this, so that a kill at any moment changes nothing.

Source: Chowdhery et al. 2022, "PaLM", section 5.1, which skipped 200 to 500 batches around a spike.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from fastsd.errors import UserError
from fastsd.run import checkpoint
from fastsd.run.rewind import set_aside
from fastsd.run.run import Run


@dataclass
class StepsSkipped(Exception):
    """Raised when too many steps in a row were skipped.

    Attributes:
        first, last: the skipped steps of the run.
        end_image: position in the run's order of images after the last of them.
    """

    first: int
    last: int
    end_image: int


def roll_back(run: Run, failure: StepsSkipped) -> None:
    """Set aside what follows the last healthy checkpoint. Whoever opens the run next goes on from there.

    Raises:
        UserError: there is no such checkpoint, or this stage has gone back before; the disk is full or not writable.
    """
    run.saving.finish()
    stage = run.position.progress.stage
    path = checkpoint.last_healthy(run.folder / "checkpoints")
    if path is None or run.position.progress.rolled_back_stage >= stage:
        raise _no_finite_update(run, failure)
    saved = checkpoint.read_progress(path)
    # Whole batches of the checkpoint's stage, if that is an earlier one. After a kill between recording this and setting aside,
    # the run fails in the same step again, and there is nothing more to pass over.
    batch = run.config.stage[saved.stage].batch
    images = max(0, -(-(failure.end_image - saved.images) // batch) * batch)
    try:
        progress = checkpoint.pass_over(path, images, stage)
    except OSError as error:
        raise UserError(
            "rollback-not-written",
            f"{path}: the run must go back to this checkpoint, but {checkpoint.ROLLBACK} cannot be written to it "
            f"({error.strerror or error}); fix that, and run the same command again",
        ) from None
    with suppress(OSError):  # on a full disk, the next call reports it
        run.report.flush()
    folder = set_aside(run.folder, progress.step)
    run.console.warn(
        f"steps {failure.first} to {failure.last} were skipped, because gradients or updates were not finite; going back to "
        f"step {progress.step} and on with image {progress.images + 1}; the results of later steps are in {folder}"
    )


def _no_finite_update(run: Run, failure: StepsSkipped) -> UserError:
    progress = run.position.progress
    batch = run.config.stage[progress.stage].batch
    first_image = failure.end_image - (failure.last - failure.first + 1) * batch
    samples_B = run.data.loader(progress.stage, progress.stage_images).batch(first_image, batch).samples_B
    assert samples_B is not None
    numbers = ", ".join(map(str, samples_B[:8].tolist())) + (f" and {batch - 8} more" if batch > 8 else "")
    return UserError(
        "no-finite-gradient",
        f"{run.folder}: no finite gradient or update in steps {failure.first} to {failure.last}, the first of which had images "
        f'{numbers} of the cache; lower lr or set precision = "fp32", and run again to resume from the last checkpoint',
    )
