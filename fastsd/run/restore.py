"""Damaged files of a checkpoint: how they are noticed, and how they are restored from other copies of the same bytes.

    manifest.json    sha256 of every file, written last
    copies.json      a second copy of every file that is not .safetensors, and of the manifest, as Latin-1 text

A damaged file is restored from copies.json, another checkpoint, an exported model, or the base model, from which it is written
again. Bytes with another sha256 are never accepted. Checkpoints of older versions have no copies.json.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from fastsd.errors import UserError
from fastsd.storage import TEMPORARY, copy_file, flush_folder, link_or_copy, replace_file, sha256_of, write_bytes

MANIFEST, COPIES = "manifest.json", "copies.json"
WEIGHTS = ".safetensors"  # ending of the files that are too large to be copied into every checkpoint


def write_manifest(path: Path, manifest: Mapping[str, str]) -> None:
    """Write the last two files of a checkpoint. `manifest` maps the names of the other files to their sha256."""
    text = json.dumps(manifest, indent=2, sort_keys=True)
    copies = {name: (path / name).read_bytes().decode("latin-1") for name in manifest if not name.endswith(WEIGHTS)}
    replace_file(path / COPIES, json.dumps({MANIFEST: text, **copies}, indent=2, sort_keys=True))
    replace_file(path / MANIFEST, text)


def read_manifest(path: Path) -> dict[str, str] | None:
    """Return the manifest of a checkpoint or its copy, or None if neither is readable or they differ."""
    manifests = _manifests(path)
    return manifests[0] if manifests and manifests[0] == manifests[-1] else None


def read_small(path: Path, name: str, digest: str) -> bytes:
    """Read a file of a checkpoint that is not .safetensors, or its copy. Raise OSError if neither has this sha256."""
    for data in (_read(path / name), _copies(path).get(name)):
        if data is not None and sha256(data).hexdigest() == digest:
            return data
    raise OSError(errno.EIO, f"{path / name} is damaged")


def verify(path: Path) -> str | None:
    """Return None if every file of a checkpoint matches its manifest, otherwise a short description of the problem."""
    return _problem_of_records(path) or next(iter(_problems(path, read_manifest(path) or {}).values()), None)


def restore(path: Path, places: Sequence[Path], rebuild: Callable[[Path, Collection[str]], str]) -> list[str] | None:
    """Restore the damaged files of a checkpoint. Return a line for each, or None if one of them has no other copy.

    Args:
        places: folders in which a file of the same name may have the same bytes: other checkpoints and exported models. The
            checkpoints that share a damaged file with this one get the restored file, too.
        rebuild: writes those of the given files that the base model has into a folder, and returns the model's name.

    Raises:
        UserError: all damaged files have other copies, but the disk is full or the folder is not writable.
    """
    problem_of_records, sources = _problem_of_records(path), dict[str, str]()
    candidates = [(manifest, _problems(path, manifest)) for manifest in _manifests(path)]
    # If the two manifests differ, the right one is the one that the files match.
    manifest, problems = min(candidates, key=lambda candidate: len(candidate[1]), default=({}, {}))
    if not manifest:
        return None
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=TEMPORARY, ignore_cleanup_errors=True) as folder:
            new, base = Path(folder, "new"), Path(folder, "base")
            for name in problems:
                sources[name] = _copy(name, manifest[name], path, places, new / name)
            missing = [name for name in problems if not sources[name]]
            model = rebuild(base, missing) if missing else ""
            for name in missing:
                sources[name] = model if _copy(name, manifest[name], path, [base], new / name) else ""
            if not all(sources.values()):
                return None

            for name in problems:
                others = _replace(path, name, places, new / name)
                sources[name] += f", also in {', '.join(others)}" if others else ""
        if problem_of_records:
            write_manifest(path, manifest)
    except OSError as error:
        raise UserError(
            "checkpoint-not-restored",
            f"{path}: {next(iter(problems.values()), problem_of_records)}, and the copy that exists cannot be written "
            f"({error.strerror}); fix that and run again",
        ) from None
    lines = [f"checkpoint {path.name}: {problem}; restored from {sources[name]}" for name, problem in problems.items()]
    return lines + ([f"checkpoint {path.name}: {problem_of_records}; written again"] if problem_of_records else [])


def _copy(name: str, digest: str, damaged: Path, places: Sequence[Path], new: Path) -> str:
    """Copy a file with this sha256 to `new` from the first place that has it. Return that place, or ""."""
    new.parent.mkdir(parents=True, exist_ok=True)
    seen = {_inode(damaged / name)}
    for place in (damaged, *places):
        data = _copies(place).get(name)
        if data is not None and sha256(data).hexdigest() == digest:
            write_bytes(new, data)
            return str(place / COPIES)
        inode = _inode(place / name)
        if inode in seen or inode is None:
            continue
        seen.add(inode)
        if not _problems(place, {name: digest}):
            copy_file(place / name, new)
            if sha256_of(new) == digest:
                return str(place / name)
    return ""


def _replace(path: Path, name: str, places: Sequence[Path], new: Path) -> list[str]:
    """Move a restored file to its place, also in other checkpoints that share the damaged one. Return their names."""
    damaged = _inode(path / name)
    others = [place for place in places if place != path and (place / MANIFEST).exists()]
    sharing = [place for place in others if damaged and _inode(place / name) == damaged]
    link = new.with_name("link")
    for place in sharing:  # the checkpoint itself is the last, so a kill leaves none of them out
        (link_or_copy if name.endswith(WEIGHTS) else copy_file)(new, link)
        os.replace(link, place / name)
        flush_folder((place / name).parent)
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    os.replace(new, path / name)
    flush_folder((path / name).parent)
    return [place.name for place in sharing]


def _problems(path: Path, manifest: Mapping[str, str]) -> dict[str, str]:
    """Describe the problem of each file that does not match a manifest."""
    problems = dict[str, str]()
    for name, digest in manifest.items():
        try:
            if sha256_of(path / name) != digest:
                problems[name] = f"{name} does not match its sha256 in {MANIFEST}"
        except FileNotFoundError:
            problems[name] = f"{name} is missing"
        except OSError as error:
            problems[name] = f"{name} cannot be read: {error.strerror}"
    return problems


def _problem_of_records(path: Path) -> str | None:
    """Describe the problem of a checkpoint's manifest or of its copies."""
    manifest = _table(_read(path / MANIFEST))
    if not manifest:
        return f"{MANIFEST} is missing or unreadable"
    if not (path / COPIES).exists():  # a checkpoint of an older version
        return None
    copies = _copies(path)
    hashes = {name: sha256(data).hexdigest() for name, data in copies.items() if name != MANIFEST}
    matches = hashes == {name: digest for name, digest in manifest.items() if not name.endswith(WEIGHTS)}
    return None if matches and _table(copies.get(MANIFEST)) == manifest else f"{COPIES} does not match {MANIFEST}"


def _manifests(path: Path) -> list[dict[str, str]]:
    """Return those of a checkpoint's manifest and its copy that are readable."""
    tables = (_table(_read(path / MANIFEST)), _table(_copies(path).get(MANIFEST)))
    return [table for table in tables if table]


def _copies(path: Path) -> dict[str, bytes]:
    """Return the contents of the small files of a checkpoint, as far as they are readable."""
    table = _table(_read(path / COPIES)) or {}
    return {name: text.encode("latin-1", "replace") for name, text in table.items()}


def _table(data: bytes | None) -> dict[str, str] | None:
    """Parse a JSON object whose values are text."""
    try:
        table = json.loads(data or b"")
    except (ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) and all(isinstance(value, str) for value in table.values()) else None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None
