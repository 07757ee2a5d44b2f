"""Going back to an earlier step of a run. What the run recorded after it is set aside, never deleted.

RUN/set-aside-1/                      a folder like RUN, so `fastsd compare RUN RUN/set-aside-1` compares both continuations
    checkpoints/ samples/ profiles/ snapshots/   those of later steps, moved
    log.jsonl ...                     the rows of later steps
    config.json cost.json             copies
    model/ averages/ ...              exports with weights of later steps, moved: RUN/model would look like the run's result
RUN/went-back.json                    the step that `fastsd train --from` went back to last
RUN/setting-aside.json                exists while things are moved. After a kill or a full disk, the next start moves the rest.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from fastsd.config.schema import Config
from fastsd.errors import UserError
from fastsd.model.formats.model_summary import read_summary
from fastsd.run.checkpoint import STATE, checkpoints, name_of
from fastsd.run.folder import grid_files, read_table, step_of
from fastsd.run.restart import read_config, trains_alike
from fastsd.storage import TEMPORARY, flush_folder, new_file, replace_file, write_bytes
from fastsd.terminal.console import Console

JOURNAL, RECORD = "setting-aside.json", "went-back.json"
_LISTED = 20  # checkpoints that a message lists
EXPORTS = "model", "model-ema*", "model.safetensors", "lora.safetensors", "lora-ema*"  # patterns in RUN


def checkpoint_named(run: Path, name: str, config: Config, console: Console) -> Path | None:
    """Return the checkpoint that the user wants to go back to: "step-00000120" or "120".

    Return None, after a message, if the run has gone back to it before and trains with the same settings since then. To go back
    once more would only train the same steps again, so a command that is repeated after a crash loses nothing.

    Raises:
        UserError: there is no such checkpoint.
    """
    match = re.fullmatch(r"(?:step-)?(\d+)", name)
    path = run / "checkpoints" / name_of(int(match[1]) if match else -1)
    paths = checkpoints(run / "checkpoints")
    last = read_config(run / "config.json")
    if paths and match and (read_table(run / RECORD) or {}).get("step") == int(match[1]):
        stage = (read_table(paths[-1] / STATE) or {}).get("stage", len(config.stage))
        if last is None or all(map(trains_alike, last.stage[: stage + 1], config.stage[: stage + 1])):
            console.echo(
                f"--from {name}: the run went back there before, and has trained with these settings since; it continues from "
                f"{paths[-1].name} (to go back again, delete {run / RECORD})"
            )
            return None
    if path not in paths:
        names = ", ".join(other.name for other in paths[-_LISTED:])
        names += f" and {len(paths) - _LISTED} older ones" if len(paths) > _LISTED else ""
        advice = f"choose one of {names}" if paths else "leave --from out to start the run"
        raise UserError("unknown-checkpoint", f"--from is {name!r}, which is not a checkpoint in {path.parent}; {advice}")
    return path


def go_back(run: Path, checkpoint: Path, step: int, console: Console) -> None:
    """Set aside what follows a checkpoint, and record that the run went back to it. Raises UserError as `set_aside`."""
    folder = set_aside(run, step)
    try:
        replace_file(run / RECORD, json.dumps({"step": step}))
    except OSError as error:
        raise _failed(run, error) from None
    later = f"all that followed is in {folder}, which you can delete" if folder else "nothing followed"
    console.echo(f"went back to {checkpoint.name}; {later}")


def set_aside(run: Path, step: int) -> Path | None:
    """Set aside everything that a run recorded after a step. Return the new folder with it, or None if there is nothing.

    The caller holds the run's lock, and has written the rows that wait in memory.

    Raises:
        UserError: the disk is full or the folder is not writable. Nothing is lost, and the next start moves the rest.
    """
    if not _later_paths(run, step) and not any(_split_rows(path, step)[1] for path in _row_files(run)):
        return None
    names = [re.fullmatch(r"set-aside-(\d+)", path.name) for path in run.iterdir()]
    folder = run / f"set-aside-{max((int(name[1]) for name in names if name), default=0) + 1}"
    try:
        replace_file(run / JOURNAL, json.dumps({"step": step, "folder": folder.name}))
        _move(run, step, folder)
    except OSError as error:
        raise _failed(run, error) from None
    return folder


def finish_setting_aside(run: Path) -> Path | None:
    """Finish a `set_aside` that was interrupted. Return its folder, or None if there is no such call.

    Raises:
        UserError: as `set_aside`.
    """
    journal = read_table(run / JOURNAL) or {}
    try:
        match journal.get("step"), journal.get("folder"):
            case int(step), str(name):
                _move(run, step, run / name)
                return run / name
        (run / JOURNAL).unlink(missing_ok=True)  # damaged: all that it would move is still in its place, or was moved
    except OSError as error:
        raise _failed(run, error) from None
    return None


def _failed(run: Path, error: OSError) -> UserError:
    reason = f"what follows the step to go back to could not be set aside ({error.strerror or error})"
    return UserError("not-set-aside", f"{run}: {reason}; nothing is lost; fix that, and run the same command again")


def _move(run: Path, step: int, folder: Path) -> None:
    """Move what is after a step. At any moment, every file and row is in one of the two places, so a kill loses nothing."""
    folder.mkdir(exist_ok=True)
    flush_folder(run)
    for name in ("config.json", "cost.json"):
        if (run / name).is_file():
            _replace_bytes(folder / name, (run / name).read_bytes())
    for path in _row_files(run):
        earlier_rows, later_rows = _split_rows(path, step)
        if later_rows:
            _replace_bytes(folder / path.name, b"".join(later_rows))
            _replace_bytes(path, b"".join(earlier_rows))
    for path in _later_paths(run, step):
        target = folder / path.relative_to(run)
        target.parent.mkdir(exist_ok=True)
        flush_folder(folder)
        path.rename(target)
        flush_folder(target.parent)
        flush_folder(path.parent)
    (run / JOURNAL).unlink()
    flush_folder(run)


def _later_paths(run: Path, step: int) -> list[Path]:
    """List the files and folders of later steps. The checkpoints come last and the newest first, so that the run stays whole:
    until all of them are moved, it is at the newest one that remains."""
    paths = [path for path, _, grid_step in grid_files(run / "samples") if grid_step > step]
    files = [*(run / "profiles").glob("step-*.json"), *(run / "snapshots").glob("step-*.safetensors")]
    paths += [path for path in files if step_of(path) > step]
    exports = [path for pattern in EXPORTS for path in sorted(run.glob(pattern))]
    if exports:
        summary = read_summary(run / "model")
        # The files are written together. Without a summary nobody knows of which step they are.
        paths += exports if summary is None or summary.steps is None or summary.steps > step else []
    for folder in (run / "averages").glob("model-*/"):  # of `fastsd average`
        summary = read_summary(folder)
        if summary is None or summary.steps is None or summary.steps > step:
            lora = folder.with_name(f"{folder.name.replace('model', 'lora', 1)}.safetensors")
            paths += [path for path in (folder.with_name(f"{folder.name}.safetensors"), lora, folder) if path.exists()]
    return paths + [path for path in reversed(checkpoints(run / "checkpoints")) if step_of(path) > step]


def _row_files(run: Path) -> list[Path]:
    return [path for path in run.glob("*.jsonl") if not path.name.startswith(TEMPORARY)]


def _split_rows(path: Path, step: int) -> tuple[list[bytes], list[bytes]]:
    """Split the lines of a row file into those up to a step, with all that are no rows, and the rows after it."""
    earlier_rows, later_rows = list[bytes](), list[bytes]()
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            is_later = line.endswith(b"\n") and json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError, RecursionError):
            is_later = False
        (later_rows if is_later else earlier_rows).append(line)
    return earlier_rows, later_rows


def _replace_bytes(path: Path, data: bytes) -> None:
    with new_file(path) as temporary:
        write_bytes(temporary, data)
