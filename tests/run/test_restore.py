"""Damaged files of checkpoints are restored from other copies with the same sha256, and checkpoints share only weights."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from runs import final, run, same
from sentences import refused, says
from tiny import job

from fastsd.config.schema import ModelTable
from fastsd.model.formats.load import load_model
from fastsd.run import checkpoint, restore
from fastsd.run.checkpoint import RunProgress, checkpoints, name_of, newest, verify

STAGE = """
[[stage]]
train = ["unet"]
until = 6
batch = 6
optimizer = "lion"
lr = 1e-4
checkpoint_every = 2
"""
UNET, VAE = (f"{component}/diffusion_pytorch_model.safetensors" for component in ("unet", "vae"))
TEXT, SCHEDULER, VOCABULARY = "text_encoder/model.safetensors", "scheduler/scheduler_config.json", "tokenizer/vocab.json"


def copy_tree(source: Path, target: Path) -> Path:
    """Copy a folder. Files that are hard links to each other are so in the copy, too."""
    copies: dict[int, Path] = {}
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True)
        elif (inode := path.stat().st_ino) in copies:
            os.link(copies[inode], copy)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copies[inode] = Path(shutil.copy2(path, copy))
    return target


def flip(path: Path) -> None:
    with open(path, "rb+") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "overwritten": lambda path: path.write_text("{}"),
    "deleted": Path.unlink,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, images) -> tuple[Path, Path]:
    """The config and the folder of a run with checkpoints of the steps 2, 4 and 6."""
    path = job(tmp_path_factory.mktemp("trained"), tiny_model, images, STAGE)
    return path, run(path)[0]


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of the run, which a test may damage."""
    return copy_tree(trained[1], tmp_path / "copy")


def files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def reopen(folder: Path, base: Path, step: int = 6) -> list[str]:
    """Return the lines about restored files. All checkpoints are whole afterwards."""
    path, progress, lines = newest(folder / "checkpoints", ModelTable(base=str(base)))
    assert path.name == name_of(step) and progress.step == step
    assert all(verify(other) is None for other in checkpoints(folder / "checkpoints"))
    assert not any(name.startswith(".tmp-") for name in os.listdir(folder / "checkpoints"))
    return lines


def test_only_weights_that_did_not_change_are_shared(trained):
    folder = trained[1]
    first, *_, last = checkpoints(folder / "checkpoints")
    assert files(first) == files(last) > {UNET, VAE, SCHEDULER, VOCABULARY, "copies.json", "manifest.json"}
    shared = {name for name in files(last) if os.path.samefile(first / name, last / name)}
    assert shared == {VAE, TEXT}
    exported = [folder / "model.safetensors", *(folder / "model").rglob("*"), *(folder / "samples").rglob("*")]
    assert {file.stat().st_nlink for file in exported if file.is_file()} == {1}
    assert all((folder / "model" / name).read_bytes() == (last / name).read_bytes() for name in (UNET, VAE, SCHEDULER))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("exported", [True, False])
def test_a_damaged_file_is_restored(exported, damage, trained, tmp_path, tiny_model):
    names = files(trained[1] / "checkpoints" / name_of(6))
    assert len(names) > 12
    for i, name in enumerate(sorted(names)):
        folder = copy_tree(trained[1], tmp_path / str(i))
        file = folder / "checkpoints" / name_of(6) / name
        before = file.read_bytes()
        if not exported:
            shutil.rmtree(folder / "model")
        DAMAGE[damage](file)
        if name == checkpoint.TENSORS or (name == UNET and not exported):  # there is no other copy
            (line,) = newest(folder / "checkpoints", ModelTable(base=str(tiny_model)))[2]
            assert says(line, "checkpoint-damaged", checkpoint=name_of(6))
            continue
        lines = reopen(folder, tiny_model)
        if name == "copies.json" and damage == "deleted":  # as in a checkpoint of an older version
            assert not lines
            continue
        (line,) = lines
        assert name in line
        assert says(line, "manifest-restored" if name in ("manifest.json", "copies.json") else "checkpoint-restored")
        assert file.read_bytes() == before and reopen(folder, tiny_model) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, damage, source",
    [
        (f"checkpoints/{name_of(6)}/{VAE}", flip, "model"),
        (f"checkpoints/{name_of(6)}/{VAE}", flip, "base"),
        (f"model/{SCHEDULER}", DAMAGE["overwritten"], ""),
        (f"checkpoints/{name_of(6)}/{VOCABULARY}", DAMAGE["truncated"], "copies"),
    ],
)
def test_a_run_with_a_damaged_file_goes_on(name, damage, source, trained, folder, tmp_path, tiny_model):
    path, undisturbed = trained[0], copy_tree(folder, tmp_path / "undisturbed")
    damage(folder / name)
    if source == "base":
        shutil.rmtree(folder / "model")
    places = {
        "model": folder / "model" / VAE,
        "base": f"the base model {tiny_model}",
        "copies": folder / "checkpoints" / name_of(6) / "copies.json",
    }
    longer = "stage.0.until=8", "stage.0.keep_checkpoints=5"
    _, text = run(path, f"run={folder}", *longer)
    assert says(text, "run-resumed", step=6)
    assert says(text, "checkpoint-restored", checkpoint=name_of(6), source=places[source]) if source else "restored" not in text
    run(path, f"run={undisturbed}", *longer)
    assert same(final(folder), final(undisturbed))
    assert (folder / "model" / SCHEDULER).read_bytes() == (undisturbed / "model" / SCHEDULER).read_bytes()
    assert all(verify(other) is None for other in checkpoints(folder / "checkpoints"))


def test_a_file_that_several_checkpoints_share_is_restored_in_all(folder, tiny_model):
    earlier = folder / "set-aside-1" / "checkpoints" / name_of(2)
    earlier.parent.mkdir(parents=True)
    (folder / "checkpoints" / name_of(2)).rename(earlier)
    flip(folder / "checkpoints" / name_of(4) / VAE)
    (line,) = reopen(folder, tiny_model)
    assert says(line, "checkpoint-restored", file=VAE) and line.endswith(f", also in {name_of(4)}, {name_of(2)}")
    inodes = {(path / VAE).stat().st_ino for path in [*checkpoints(folder / "checkpoints"), earlier]}
    assert len(inodes) == 1 and (folder / "model" / VAE).stat().st_ino not in inodes


@pytest.mark.parametrize("name", [SCHEDULER, VOCABULARY, "model_index.json", "vae/config.json"])
@pytest.mark.parametrize("source", ["model", "base"])
def test_checkpoints_of_an_older_version_are_restored(source, name, folder, tiny_model):
    """They have no copies, and small files are hard links to each other, and to the exported model."""
    first, *others = checkpoints(folder / "checkpoints")
    for path in (first, *others):
        (path / "copies.json").unlink()
    for path in (*others, folder / "model"):
        (path / name).unlink()
        os.link(first / name, path / name)
    shutil.copytree(folder / "model", folder / "model-ema") if source == "model" else None
    before = (first / name).read_bytes()
    flip(folder / "model" / name)
    (line,) = reopen(folder, tiny_model)
    origin = folder / "model-ema" / name if source == "model" else f"the base model {tiny_model}"
    assert says(line, "checkpoint-restored", file=name, source=origin)
    assert [(path / name).read_bytes() for path in (first, *others)] == [before] * 3
    assert len({(path / name).stat().st_ino for path in (first, *others, folder / "model")}) == 4


def test_other_bytes_are_never_accepted(folder, tiny_model):
    """The weights of the earlier checkpoint, the exported model and the base are whole, but others."""
    for place in (folder / "checkpoints" / name_of(6), folder / "model"):
        flip(place / UNET)
        flip(place / VAE)
    flip(folder / "checkpoints" / name_of(6) / checkpoint.TENSORS)
    before = (folder / "checkpoints" / name_of(4) / UNET).read_bytes()
    lines = reopen(folder, tiny_model, step=4)
    assert says(lines[0], "checkpoint-damaged", checkpoint=name_of(6)) and says(lines[1], "checkpoint-restored", file=VAE)
    assert len(lines) == 2 and (folder / "checkpoints" / name_of(4) / UNET).read_bytes() == before


def test_a_checkpoint_that_was_set_aside_still_has_whole_files(folder, tmp_path):
    shutil.rmtree(folder / "model")
    flip(folder / "checkpoints" / name_of(6) / UNET)
    shutil.copy(folder / "checkpoints" / name_of(6) / VAE, tmp_path / "vae")
    (folder / "checkpoints" / name_of(6) / VAE).unlink()
    shutil.move(tmp_path / "vae", folder / "checkpoints" / name_of(6) / VAE)
    assert len(reopen(folder, tmp_path / "no-base", step=4)) == 1
    flip(folder / "checkpoints" / name_of(4) / VAE)
    (line,) = reopen(folder, tmp_path / "no-base", step=4)
    assert says(line, "checkpoint-restored", source=folder / "checkpoints" / f"damaged-{name_of(6)}" / VAE)


def test_without_any_copy_all_checkpoints_are_damaged(folder, tmp_path):
    shutil.rmtree(folder / "model")
    flip(folder / "checkpoints" / name_of(6) / VAE)
    with refused("checkpoints-damaged", count=3):
        newest(folder / "checkpoints", ModelTable(base=str(tmp_path / "no-base")))


@pytest.mark.parametrize("damaged", ["manifest.json", "copies.json"])
@pytest.mark.parametrize("field", ["name", "sha256"])
def test_of_two_manifests_the_one_that_the_files_match_is_right(field, damaged, folder, tiny_model):
    path = folder / "checkpoints" / name_of(6)
    text, manifest = (path / damaged).read_text(), json.loads((path / "manifest.json").read_text())
    changed = text.replace("vae/diff", "vaf/diff") if field == "name" else text.replace(manifest[VAE], "0" * 64)
    assert changed != text
    (path / damaged).write_text(changed)
    (path / checkpoint.CONFIG).unlink()
    lines = reopen(folder, tiny_model)
    assert says(lines[0], "checkpoint-restored", file="run.json") and says(lines[1], "manifest-restored") and len(lines) == 2
    assert (path / damaged).read_text() == text


def test_a_damaged_copy_is_not_used(folder, tiny_model):
    path = folder / "checkpoints" / name_of(6)
    before, copies = (path / SCHEDULER).read_bytes(), json.loads((path / "copies.json").read_text())
    (path / "copies.json").write_text(json.dumps(copies | {SCHEDULER: "{}"}))
    (path / SCHEDULER).unlink()
    restored, written = reopen(folder, tiny_model)
    source = folder / "checkpoints" / name_of(4) / "copies.json"
    assert says(restored, "checkpoint-restored", file=SCHEDULER, source=source) and says(written, "manifest-restored")
    assert (path / SCHEDULER).read_bytes() == before and json.loads((path / "copies.json").read_text()) == copies


def test_a_file_that_cannot_be_read_is_restored(folder, tiny_model, monkeypatch):
    sha256_of, unreadable = restore.sha256_of, (folder / "checkpoints" / name_of(6) / VAE).stat().st_ino

    def failing(path):
        if path.stat().st_ino == unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256_of(path)

    monkeypatch.setattr(restore, "sha256_of", failing)
    (line,) = reopen(folder, tiny_model)
    assert says(line, "checkpoint-unreadable", file=VAE, reason=os.strerror(errno.EIO))


def test_a_copy_that_cannot_be_written_is_one_sentence_and_nothing_is_lost(folder, tiny_model, monkeypatch):
    path = folder / "checkpoints" / name_of(6)
    flip(path / VAE)
    with monkeypatch.context() as full:
        full.setattr(restore, "copy_file", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with refused("checkpoint-not-restored", path=path, file=VAE, strerror=os.strerror(errno.ENOSPC)):
            newest(folder / "checkpoints", ModelTable(base=str(tiny_model)))
    assert len(reopen(folder, tiny_model)) == 1


def test_a_kill_at_any_moment_of_a_restoration_loses_nothing(trained, tmp_path, tiny_model, monkeypatch):
    kills = 0
    while True:
        folder = copy_tree(trained[1], tmp_path / str(kills))
        path = folder / "checkpoints" / name_of(6)
        for name in (VAE, SCHEDULER, "manifest.json"):
            flip(path / name)
        calls, replace = iter(range(kills)), os.replace

        def killed(source, target, calls=calls, replace=replace):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            try:
                newest(folder / "checkpoints", ModelTable(base=str(tiny_model)))
            except KeyboardInterrupt:
                kills += 1
            else:
                break
        reopen(folder, tiny_model)
    assert kills == 6  # VAE in three checkpoints, scheduler, copies and manifest


def save(folder: Path, step: int, model) -> Path:
    weights = {"unet": dict, "text_encoder": dict}
    return checkpoint.save(folder, RunProgress(step=step), model, weights, set(), {})


@pytest.mark.parametrize("name", [SCHEDULER, VOCABULARY, "text_encoder/config.json", VAE, TEXT, "manifest.json", "copies.json"])
@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_damage_during_a_run_does_not_reach_the_next_checkpoint(damage, name, tmp_path, tiny_model):
    model = load_model(ModelTable(base=str(tiny_model)))
    first = save(tmp_path, 1, model)
    whole = {file: (first / file).read_bytes() for file in files(first)}
    earlier = shutil.copytree(first, tmp_path / "earlier")
    DAMAGE[damage](first / name)
    if damage == "truncated" and name in (VAE, TEXT):
        second = save(tmp_path, 2, model)  # nobody has read the damaged file: it is restored at the next start
        assert verify(second) is not None and newest(tmp_path, ModelTable(base=str(tiny_model)))[0] == second
    else:
        second = save(tmp_path, 2, model)
    assert verify(second) is None
    state = {"state.json", "copies.json", "manifest.json"}
    assert {file: (second / file).read_bytes() for file in files(second) - state} == {f: whole[f] for f in whole.keys() - state}
    assert all((earlier / file).read_bytes() == whole[file] for file in whole)


@pytest.mark.parametrize("damaged", ["manifest.json", "copies.json"])
def test_a_wrong_sha256_does_not_reach_the_next_checkpoint(damaged, tmp_path, tiny_model):
    model = load_model(ModelTable(base=str(tiny_model)))
    first = save(tmp_path, 1, model)
    digest = json.loads((first / "manifest.json").read_text())[VAE]
    (first / damaged).write_text((first / damaged).read_text().replace(digest, "0" * 64))
    assert verify(save(tmp_path, 2, model)) is None


def test_weights_that_are_written_anew_are_not_written_into_the_earlier_checkpoint(tmp_path, tiny_model):
    model = load_model(ModelTable(base=str(tiny_model)))
    first = save(tmp_path, 1, model)
    before = (first / TEXT).read_bytes(), (first / TEXT).stat().st_mtime_ns
    for name in ("text_encoder/config.json", "copies.json"):
        (first / name).unlink()
    second = save(tmp_path, 2, model)
    assert verify(second) is None and not os.path.samefile(first / TEXT, second / TEXT)
    assert ((first / TEXT).read_bytes(), (first / TEXT).stat().st_mtime_ns) == before


@pytest.mark.parametrize("name", [VAE, SCHEDULER, "manifest.json"])
def test_damage_does_not_reach_the_exported_model(name, trained, folder, tiny_model):
    """It happens after the run's start, which would restore the file. The next start does."""
    model, path = load_model(ModelTable(base=str(tiny_model))), folder / "checkpoints" / name_of(6)
    if name == "manifest.json":
        (path / name).write_text((path / name).read_text().replace("vae/diff", "vaf/diff"))
    else:
        flip(path / name)
    before = {file: (folder / "model" / file).read_bytes() for file in files(folder / "model")}
    with pytest.raises(OSError, match=f"{name} is damaged"):
        checkpoint.export(path, folder / "model", model, {}, lambda new: None)
    assert {file: (folder / "model" / file).read_bytes() for file in files(folder / "model")} == before
    _, text = run(trained[0], f"run={folder}")
    assert name in text and {file: (folder / "model" / file).read_bytes() for file in {UNET, VAE, SCHEDULER}} == {
        file: before[file] for file in (UNET, VAE, SCHEDULER)
    }
