"""Changes between two starts of a run, from configs and numbers alone, and the lock on its folder."""

import json
from types import SimpleNamespace

import pytest
from sentences import refused, says

from fastsd.config.schema import dump_config, parse_config
from fastsd.run import restart
from fastsd.run.checkpoint import RunProgress
from fastsd.run.position import Position
from fastsd.run.restart import compare_images, compare_with_end, compare_with_start, lock
from fastsd.train.schedule import check_length as stage_length

TABLES = {
    "run": "folder", "model": {"base": "model"}, "data": {"folders": ["images"]}, "cache": {"dir": "cache"},
    "stage": [{"train": ["unet"], "until": 9, "batch": 4} for _ in range(3)],
}  # fmt: skip
IN_STAGE_2 = RunProgress(stage=1, stage_step=3, step=12)


def config_with(changes):
    tables = json.loads(json.dumps(TABLES))
    for key, value in changes.items():
        *folders, last = key.split(".")
        table = tables
        for name in folders:
            table = table[int(name)] if isinstance(table, list) else table.setdefault(name, {})
        table[last] = value
    return parse_config(tables, "job.toml")


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a run with one config and restarts it with another."""

    def compare(progress, changes, before=()):
        path = tmp_path / "config.json"
        path.write_text(dump_config(config_with(dict(before))))
        return compare_with_start(path, config_with(changes), progress)

    return compare


FIXED = {
    "model.clip_skip": 1, "data.resolution": 256, "seed": 3, "validate.held_out": 4, "validate.seed": 4,
    "validate.by": "number",
}  # fmt: skip


@pytest.mark.parametrize("key", FIXED)
def test_some_settings_never_change(key, start):
    with refused("run-other-start", key=key, after=repr(FIXED[key])):
        start(RunProgress(), {key: FIXED[key]})


CHANGES = {
    "train": ["text_encoder"], "state": "carry", "reinit": ["unet.cross_attention"], "batch": 8, "optimizer": "adamw",
    "d0": 1e-5, "betas": [0.8, 0.9], "decoupled_weight_decay": True,
}  # fmt: skip
BASE = {"decoupled_weight_decay": {"optimizer": "lion", "lr": 1e-4}, "optimizer": {"optimizer": "lion", "lr": 1e-4}}


@pytest.mark.parametrize("key", CHANGES)
def test_some_settings_of_a_stage_change_only_before_it_begins(key, start):
    before = {f"stage.1.{name}": value for name, value in BASE.get(key, {}).items()}
    changes = before | {f"stage.1.{key}": CHANGES[key]}
    with refused("run-other-stage", key=f"stage.1.{key}"):
        start(IN_STAGE_2, changes, before)
    (warning,) = start(RunProgress(stage=1, step=9), changes, before)
    assert says(warning, "key-changed", key=f"stage.1.{key}", after=repr(CHANGES[key]))
    assert len(start(RunProgress(stage_step=3), changes, before)) == 1


def test_settings_of_earlier_stages_never_change_and_others_are_reported(start):
    with refused("run-other-stage", key="stage.0.until", before=9, after=5):
        start(RunProgress(stage=1), {"stage.0.until": 5})
    warnings = start(IN_STAGE_2, {"stage.1.until": 12, "stage.2.lr": 1e-5, "log.every": 3})
    assert says(warnings[0], "key-changed", key="stage.1.until", before=9, after=12)
    assert says(warnings[1], "key-changed", key="stage.2.lr", after="1e-05") and len(warnings) == 2
    assert start(IN_STAGE_2, {}) == []


def test_stages_may_be_added_and_later_ones_removed(start):
    stages = TABLES["stage"]
    assert start(IN_STAGE_2, {"stage": stages[:2]}) == [] == start(IN_STAGE_2, {"stage": [*stages, stages[0]]})
    with refused("run-fewer-stages", current_stage=2, count=1):
        start(IN_STAGE_2, {"stage": stages[:1]})


def test_a_stage_is_inserted_only_behind_the_current_one(start):
    first, second, new = ({**TABLES["stage"][0], "name": name} for name in ("one", "two", "new"))
    before = {"stage": [first, second]}
    assert start(IN_STAGE_2, {"stage": [first, second, new]}, before) == []
    for stages, name, (number, other) in (([first, new, second], "two", (2, 3)), ([new, first, second], "one", (1, 2))):
        with refused("run-stage-moved", name=repr(name), before=number, after=other):
            start(IN_STAGE_2, {"stage": stages}, before)
    assert len(start(RunProgress(stage_step=3), {"stage": [first, new, second]}, before)) == 1  # the second has not begun
    (warning,) = start(IN_STAGE_2, {"stage": [first, new]}, before)
    assert says(warning, "key-changed", key="stage.1.name", after="'new'")


def test_a_complete_stage_that_became_shorter_by_itself_is_complete(tmp_path):
    """An epoch has fewer images if images were removed."""
    config = config_with({"stage": TABLES["stage"][:2], "stage.1.until": "2e"})
    (tmp_path / "run.json").write_text(dump_config(config))

    def compare(until, done=True, seconds=0.0, newest=tmp_path):
        changed = config_with({"stage": TABLES["stage"][:2], "stage.1.until": until})
        progress = RunProgress(stage=1, stage_step=10, step=19, stage_done=done, seconds=seconds)
        steps = [9, stage_length(changed.stage[1], "stage", 16)]
        return compare_with_end(tmp_path, changed, Position(progress, changed.stage, steps, extendable=True), newest)

    compare("2e")
    compare("2 epochs")
    compare("9e")
    compare(10, done=False)
    compare(4, newest=None)  # of an older version, which has no record
    for until, done in (("1e", True), ("2e", False), (9, False)):
        with refused("stage-beyond-end", length="10 steps"):
            compare(until, done=done)
    (tmp_path / "run.json").write_text(dump_config(config_with({"stage": TABLES["stage"][:2], "stage.1.until": "2m"})))
    compare("120s", seconds=120.5)  # the last step may end later
    compare("3m", seconds=120.5)
    for until, done in (("1m", True), ("1m", False), ("119s", True)):
        with refused("stage-beyond-end", length="121 seconds", until=repr(until)):
            compare(until, done=done, seconds=120.5)


def test_a_new_run_is_compared_with_nothing(start, tmp_path):
    assert start(None, {"seed": 5}) == []


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"stage": 3}', b"[" * 9999])
def test_a_damaged_record_of_the_config_is_replaced_by_that_of_the_checkpoint(content, tmp_path):
    path, newest = tmp_path / "config.json", tmp_path / "step-00000001"
    newest.mkdir()
    if content is not None:
        path.write_bytes(content)
    (warning,) = compare_with_start(path, config_with({"seed": 5}), IN_STAGE_2, newest)
    assert says(warning, "record-damaged", path=path, result="changes of settings since the last start are not noticed")
    (newest / "run.json").write_text(dump_config(config_with({})))
    (warning,) = compare_with_start(path, config_with({}), IN_STAGE_2, newest)
    assert says(warning, "record-damaged", path=path, result="the checkpoint's copy is used")
    with refused("run-other-start"):
        compare_with_start(path, config_with({"seed": 5}), IN_STAGE_2, newest)


PLACES = {
    "model.base": "base", "model.vae": "vae.safetensors", "model.tokenizer": "tokenizer", "model.lora.file": "lora.safetensors",
}  # fmt: skip


@pytest.mark.parametrize("key", PLACES)
def test_a_run_is_not_tied_to_the_place_of_its_model(key, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, new, other = (tmp_path / folder / PLACES[key] for folder in ("old", "new", "other"))
    for path in (old, other):
        path.parent.mkdir()
        path.touch()
    lora = {"model.lora": {}} if key == "model.lora.file" else {}
    (tmp_path / "link").symlink_to("old")
    for spelling in (str(old), f"old/{PLACES[key]}", f"old//./{PLACES[key]}", f"link/{PLACES[key]}"):
        assert start(RunProgress(), lora | {key: spelling}, lora | {key: str(old)}) == []
    for changed in (other, tmp_path / "missing"):
        with refused("run-other-start", key=key, before=repr(str(old)), after=repr(str(changed))):
            start(RunProgress(), lora | {key: str(changed)}, lora | {key: str(old)})
    new.parent.mkdir()
    old.rename(new)
    (warning,) = start(RunProgress(), lora | {key: str(new)}, lora | {key: str(old)})
    assert says(warning, "model-moved", key=key, before=repr(str(old)), after=repr(str(new)))
    assert start(RunProgress(), lora | {key: str(old)}, lora | {key: str(old)}) == []


class Latents(SimpleNamespace):
    def __len__(self):
        return self.count

    def content_hashes(self):
        return {"captions": self.captions, "latents": self.latents}


@pytest.fixture
def cache_states(tmp_path, monkeypatch):
    """Return a function that records one state of a cache, compares another with it, and returns the warnings."""
    monkeypatch.setattr(restart, "mask_hash", lambda latents: latents.masks)
    path, config = tmp_path / "images.json", config_with({})
    state = {"count": 5, "sha256": "view", "captions": "c", "latents": "l", "weight_hash": "weights", "masks": "masks"}

    def compare(resumed=True, record=True, config=config, **changes):
        if record:
            (tmp_path / "config.json").write_text(dump_config(config_with({})))
            compare_images(path, Latents(**state), config, resumed=False)
        return compare_images(path, Latents(**state | changes), config, resumed=resumed)

    return compare


def test_changes_of_the_cache_have_names(cache_states, tmp_path):
    path = tmp_path / "images.json"
    assert cache_states() == []
    keys = {"samples": 5, "view": "view", "weights": "weights", "masks": "masks", "captions": "c", "latents": "l"}
    assert json.loads(path.read_text()) == keys
    (text,) = cache_states(count=6, sha256="other", captions="other")
    assert says(text, "cache-count-changed", before=5, after=6)
    for changes, contents in (
        ({"sha256": "other", "captions": "other"}, "captions"),
        ({"sha256": "other", "latents": "other", "masks": ""}, "latents and masks"),
        ({"weight_hash": ""}, "weights"),
        ({"masks": "other"}, "masks"),
        ({"sha256": "other", "captions": "", "latents": "", "weight_hash": ""}, "captions, latents and weights"),
    ):
        (text,) = cache_states(**changes)
        assert says(text, "cache-content-changed", contents=contents)
        assert cache_states(resumed=False, **changes) == []
    assert cache_states(sha256="cached from another folder") == []
    for content in (None, b"", b"[1]", b"null", b"\xff"):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        (text,) = cache_states(record=False)
        assert says(text, "record-damaged", path=path, result="changes of the cache since the last start are not noticed")
        assert cache_states(record=False) == []


def test_a_run_of_an_older_version_has_recorded_less(cache_states, tmp_path):
    path = tmp_path / "images.json"
    cache_states()
    path.write_text('{"samples": 5}')
    assert cache_states(record=False) == []
    old = {"samples": 5, "view": "view", "weights": "weights", "masks": "masks"}
    path.write_text(json.dumps(old))
    assert cache_states(record=False) == [] and "captions" in json.loads(path.read_text())
    path.write_text(json.dumps(old))
    (text,) = cache_states(record=False, sha256="other")
    assert says(text, "cache-content-changed", contents="captions or images")


def test_data_may_move_but_not_change_with_their_place(cache_states, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    config = config_with({"data.folders": ["elsewhere"]})
    assert cache_states(config=config, sha256="other") == []  # the samples are equal
    (text,) = cache_states(config=config, sha256="other", latents="of another GPU")
    assert says(text, "cache-content-changed", contents="latents")
    with refused("run-other-images", before="['images']", after="['elsewhere']"):
        cache_states(config=config, sha256="other", captions="other")
    assert json.loads((tmp_path / "images.json").read_text())["captions"] == "c"
    for spelling in ("./images", str(tmp_path / "images")):
        assert cache_states(config=config_with({"data.folders": [spelling]}), sha256="other", captions="other")


def test_one_trainer_per_folder(tmp_path):
    with lock(tmp_path), refused("run-locked", folder=repr(str(tmp_path))):
        lock(tmp_path)
    with lock(tmp_path):
        pass
