"""Machines that fill one cache without shared locks: each image once, and the content of one machine, even after kills."""

import fcntl
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from caching import StubVae, config, draw, draw_many, with_data
from commandline import STAGE, function_process
from kinds import DAMAGE
from masked import ENDING
from PIL import Image
from sentences import refused, says
from tiny import job

from fastsd.config.schema import load_config
from fastsd.data.building import beats, results
from fastsd.data.building.beats import Beats
from fastsd.data.building.build import build_cache
from fastsd.data.building.machines import joined, machine_name, settle
from fastsd.data.building.store import Store
from fastsd.data.building.upkeep import prune, stats, verify
from fastsd.data.cache import LatentCache, view_name
from fastsd.errors import Stopped

IMAGES = 60


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(beats, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(beats, "LOST_SECONDS", 1.0)


def refuse_foreign_locks(root, name):
    """Make all locks and databases in the cache fail, except those in the folder of the machine `name`."""
    shared, inside = os.path.join(root, "cache", ""), os.path.join(root, "cache/machines", name)

    def is_elsewhere(path):
        path = os.path.abspath(os.fsdecode(path)) if path not in ("", ":memory:") else ""
        return path.startswith(shared) and not path.startswith((f"{inside}/", f"{inside}.lock", f"{inside}.join"))

    def only_here(function):
        def checked(first, *arguments, **options):
            if is_elsewhere(getattr(first, "name", first)):
                raise OSError(37, "No locks available")
            return function(first, *arguments, **options)

        return checked

    fcntl.flock, fcntl.lockf, sqlite3.connect = only_here(fcntl.flock), only_here(fcntl.lockf), only_here(sqlite3.connect)


def build(settings, name, vae, finish=True, notify=lambda line: None):
    with joined(Path(settings.cache.dir), name, view_name(settings, vae.hash), notify) as division:
        counts = build_cache(settings, vae, notify=notify, division=division)
        if finish:
            division.finish()
    return counts


def work(root, name, delay):
    """Build the cache as one machine, in a process of its own, and print the counts."""
    torch.set_num_threads(1)
    beats.BEAT_SECONDS, beats.LOST_SECONDS = 0.1, 2.0
    refuse_foreign_locks(root, name)
    vae = StubVae(delay=float(delay))
    counts = build(config(Path(root)), name, vae)
    print(json.dumps([vae.encoded, counts.cached]))


def start(root, name, delay=0.05):
    return function_process(__file__, "work", root, name, delay)


def result_of(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out)


def content(root, view=None):
    """Return all that training reads of a view, in its order."""
    latents = LatentCache.open(root / "cache", view)
    everything = range(len(latents))
    return latents.get(everything)["latents"].tolist(), latents.variants(everything), latents.content_hashes()


def alone(root):
    """Return the content of a cache that one machine makes."""
    view = build_cache(config(root), StubVae()).view
    expected = content(root, view)
    shutil.rmtree(root / "cache")
    return expected


def check_is_ordinary(root, expected, images=IMAGES):
    """Check that nothing is lost, double or left over, and that one machine finds nothing to do."""
    assert content(root) == expected
    assert verify(root / "cache") == []
    contents = stats(root / "cache")
    assert (contents.latents, contents.planned) == (images, 0)
    assert prune(root / "cache").shards == 0
    vae = StubVae()
    assert build_cache(config(root), vae).cached == images and vae.encoded == 0
    assert not list((root / "cache").glob("machines/*")) and not list((root / "cache").glob("exchange/*"))


def test_two_machines_without_shared_locks_make_the_cache_of_one(tmp_path):
    draw_many(tmp_path, IMAGES)
    draw(tmp_path / "images/copy.png", 3, "the same pixels as 003.png")
    expected = alone(tmp_path)
    results = [result_of(process) for process in [start(tmp_path, name) for name in ("a", "b")]]
    assert sum(encoded for encoded, _ in results) == IMAGES and all(cached == IMAGES + 1 for _, cached in results)
    assert content(tmp_path) == expected
    with Store.open(tmp_path / "cache") as store:
        assert store.db.execute("SELECT COUNT(*), COUNT(DISTINCT content) FROM latent").fetchone() == (IMAGES, IMAGES)


def test_the_others_take_over_from_a_killed_machine(tmp_path):
    draw_many(tmp_path, IMAGES)
    expected = alone(tmp_path)
    killed, other = start(tmp_path, "a", 0.2), start(tmp_path, "b", 0.1)
    while not list((tmp_path / "cache").glob("shards/*.safetensors")):
        assert killed.poll() is None and time.sleep(0.02) is None
    time.sleep(random.uniform(0, 0.5))
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert result_of(other)[1] == IMAGES
    prune(tmp_path / "cache")  # a shard that the killed machine had begun
    check_is_ordinary(tmp_path, expected)


@contextmanager
def stopped_build(root, name="a", images=20):
    """Stop a machine after some images, and yield the VAE that counts them."""

    class Stopping(StubVae):
        def encode(self, x):
            if self.encoded >= images:
                raise KeyboardInterrupt
            return super().encode(x)

    vae = Stopping()
    with pytest.raises(Stopped):
        build(config(root), name, vae)
    yield vae


def test_a_stopped_machine_goes_on_and_another_one_uses_its_parts(tmp_path):
    draw_many(tmp_path, IMAGES)
    expected = alone(tmp_path)
    with stopped_build(tmp_path):
        vae = StubVae()
        build(config(tmp_path), "a", vae)
        assert vae.encoded <= IMAGES - 16  # at most the blocks in progress are lost
    check_is_ordinary(tmp_path, expected)
    shutil.rmtree(tmp_path / "cache")
    with stopped_build(tmp_path, images=40):
        vae = StubVae()
        build(config(tmp_path), "b", vae)
        assert vae.encoded <= IMAGES - 16
    prune(tmp_path / "cache")
    check_is_ordinary(tmp_path, expected)


def test_one_machine_goes_on_alone_with_what_several_have_made(tmp_path):
    draw_many(tmp_path, IMAGES)
    expected = alone(tmp_path)
    with stopped_build(tmp_path, images=40):
        settle(tmp_path / "cache")
        prune(tmp_path / "cache")
        assert 16 <= stats(tmp_path / "cache").latents <= 40
        vae = StubVae()
        build_cache(config(tmp_path), vae)
        assert vae.encoded <= IMAGES - 16
    check_is_ordinary(tmp_path, expected)


def test_machines_add_to_a_cache_that_one_machine_made(tmp_path):
    draw_many(tmp_path, 5)
    build_cache(config(tmp_path), StubVae())
    draw(tmp_path / "images/broken.png", 99)
    (tmp_path / "images/broken.png").write_bytes((tmp_path / "images/broken.png").read_bytes()[:-99])
    draw_many(tmp_path, 12)
    vae = StubVae()
    counts = build(config(tmp_path), "a", vae)
    assert (vae.encoded, counts.cached, counts.rejected) == (7, 12, 1)
    again = build(config(tmp_path), "b", vae)
    assert (vae.encoded, again.cached, again.examples) == (7, 12, counts.examples)
    assert stats(tmp_path / "cache").rejected == counts.reasons


def test_masks_and_rejections_come_from_other_machines(tmp_path, monkeypatch):
    draw_many(tmp_path, 8)
    for i in range(8):
        Image.new("L", (36, 40), 30 * i).save(tmp_path / f"images/{i:03}{ENDING}")
    settings = with_data(tmp_path, masks=ENDING)
    build(settings, "a", StubVae(), finish=False)
    monkeypatch.setattr("fastsd.data.building.mask_cells.decode_mask", None)  # nobody decodes a mask twice
    monkeypatch.setattr("fastsd.data.building.collect.probe", None)
    vae = StubVae()
    assert build(settings, "b", vae).cached == 8 and vae.encoded == 0
    assert next(iter(stats(tmp_path / "cache").views.values())).masked == 8


def test_a_damaged_part_and_a_lost_shard_are_made_again(tmp_path):
    draw_many(tmp_path, IMAGES)
    expected = alone(tmp_path)
    build(config(tmp_path), "a", StubVae(), finish=False)
    (unfinished,) = results.builds(tmp_path / "cache/exchange")
    first, second, *_ = sorted((unfinished.folder / "results/rows").iterdir())
    first.write_bytes(b"no database")
    next((tmp_path / "cache/shards").glob(f"{second.name.removeprefix('rows-')}*")).unlink()
    (unfinished.folder / "results/facts" / os.listdir(unfinished.folder / "results/facts")[0]).write_bytes(b"")
    vae = StubVae()
    build(config(tmp_path), "b", vae)
    assert 17 <= vae.encoded <= 32
    prune(tmp_path / "cache")
    check_is_ordinary(tmp_path, expected)


def test_a_build_whose_folders_were_not_all_made_is_completed(tmp_path):
    """A kill or a full disk may end a machine between two of them."""
    path = results.current(tmp_path, "view")
    shutil.rmtree(path / "results")
    (path / "leases" / "rows-0.0").touch()
    assert results.current(tmp_path, "view") == path
    results.Results(path, "node-1").publish("rows-0", {})
    assert results.Results(path).has("rows-0") and (path / "leases" / "rows-0.0").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_of_machines_lose_nothing(tmp_path, damage, monkeypatch):
    """Each file that a stopped machine has left for the others is damaged. Another one goes on, then the same one."""
    monkeypatch.setattr(beats, "LOST_SECONDS", 0.3)
    draw_many(tmp_path, IMAGES)
    expected = alone(tmp_path)
    for name in ("b", "a"):
        with stopped_build(tmp_path, images=40):
            files = [*(tmp_path / "cache/exchange").glob("*/*/**/*"), *(tmp_path / "cache/machines").glob("*.beat")]
            files += (tmp_path / "cache/machines").glob("*/build")
            files = [path for path in files if path.is_file()]
            assert len(files) >= 8 and {path.suffix for path in files} >= {".beat", ".0"}
            for path in files:
                DAMAGE[damage](path)
        vae = StubVae()
        build(config(tmp_path), name, vae)
        prune(tmp_path / "cache")
        settle(tmp_path / "cache")  # leases of machines that never were
        check_is_ordinary(tmp_path, expected)
        shutil.rmtree(tmp_path / "cache")


def test_a_damaged_result_is_made_again_by_the_machine_that_reads_it(tmp_path):
    """Its maker is at work and would not make it again, because it has done so."""
    makers = []

    def made_by(machine):
        tables = {"facts": [(b"key", "a caption")]}
        ((name, result),) = machine.divide(["facts-1"], str, lambda item: makers.append(machine.name) or tables)
        assert name == "facts-1" and result.items() >= tables.items()

    with joined(tmp_path / "cache", "a", "view", print) as a, joined(tmp_path / "cache", "b", "view", print) as b:
        made_by(a)
        (path,) = (tmp_path / "cache/exchange").glob("*/results/facts/facts-1")
        content = path.read_bytes()
        made_by(b)
        for machine, bit in ((b, content.index(b"caption")), (a, -1), (b, 5)):
            path.write_bytes(content[:bit] + bytes([content[bit] ^ 1]) + content[bit:][1:])
            made_by(machine)
            assert path.read_bytes() == content
    assert makers == ["a", "b", "a", "b"]


def test_the_damaged_database_of_a_machine_can_be_deleted(tmp_path):
    draw_many(tmp_path, IMAGES)
    expected = alone(tmp_path)
    with stopped_build(tmp_path, images=40):
        home = tmp_path / "cache/machines/a"
        (home / "cache.sqlite").write_bytes(b"no database" * 99)
        with refused("machine-database-damaged", folder=tmp_path / "cache", path=home / "cache.sqlite", home=home):
            build(config(tmp_path), "a", StubVae())
        shutil.rmtree(home)
        vae = StubVae()
        build(config(tmp_path), "a", vae)
        assert vae.encoded <= IMAGES - 16
    prune(tmp_path / "cache")
    check_is_ordinary(tmp_path, expected)


def test_a_cache_that_machines_fill_is_refused_to_others(tmp_path):
    draw_many(tmp_path, 4)
    folder = tmp_path / "cache/machines"
    folder.mkdir(parents=True)
    lines = []
    with Beats(folder).beating("a"):
        for use in (verify, prune, lambda folder: build_cache(config(tmp_path), StubVae())):
            with refused("cache-machines-at-work", folder=tmp_path / "cache", name="a"):
                use(tmp_path / "cache")
        with refused("cache-machines-at-work", name="a"), joined(tmp_path / "cache", "", "view", lines.append):
            pass
    assert says(lines[-1], "machines-may-work", folder=tmp_path / "cache", names="a")


@pytest.mark.parametrize("name", ["", "a"])
def test_a_machine_that_works_alone_is_left_alone(tmp_path, monkeypatch, name):
    lines = []
    (tmp_path / "cache").mkdir()
    with Beats(tmp_path / "cache").beating("alone"):
        if not name:  # processes of the same machine share the cache
            with joined(tmp_path / "cache", "", "view", lines.append) as division:
                assert division.home == tmp_path / "cache" and not lines
        Beats(tmp_path / "cache").path("alone").write_text("another machine")
        with refused("cache-machine-alone", folder=tmp_path / "cache"), joined(tmp_path / "cache", name, "view", lines.append):
            pass
    assert says(lines[-1], "machine-may-work", folder=tmp_path / "cache")


def test_a_machine_waits_for_what_another_makes(tmp_path):
    """Each step is done once, and the machine that waits says for what."""
    lines, done, begun, may_end = [], [], threading.Event(), threading.Event()

    def do():
        begun.set()
        may_end.wait(60)
        done.append("first")

    folder = tmp_path / "cache"
    with joined(folder, "first", "view", print) as first, joined(folder, "second", "view", lines.append) as second:
        threads = [
            threading.Thread(target=first.once, args=("view", do)),
            threading.Thread(target=second.once, args=("view", lambda: done.append("second"))),
        ]
        for thread in threads:
            thread.start()
            begun.wait(60)
        while threads[1].is_alive() and not lines:
            time.sleep(0.02)
        may_end.set()
        for thread in threads:
            thread.join()
    assert says("\n".join(lines), "another-machine", step="view") and done == ["first"]


def test_a_result_is_taken_over_again_and_again(tmp_path):
    """A machine that lost a lease makes the result again, if the machine that took it has stopped too."""
    for name in "aba":
        with joined(tmp_path / "cache", name, "view", print) as machine:
            assert machine._lease("facts-1")
            with joined(tmp_path / "cache", "other", "view", print) as other:
                assert not other._lease("facts-1") and machine._lease("facts-1")


def test_no_beat_follows_the_end(tmp_path, monkeypatch):
    """The last beat must not overwrite the end, or others wait for a machine that has stopped."""
    beating = []

    def end(this, name, original=Beats.end):
        beating.extend(thread for thread in threading.enumerate() if thread.name == "fastsd-beat")
        original(this, name)

    monkeypatch.setattr(Beats, "end", end)
    for name in ("a", ""):
        with joined(tmp_path / "cache", name, "view", print):
            pass
    assert not beating and Beats(tmp_path / "cache/machines").has_ended("a") and Beats(tmp_path / "cache").has_ended("alone")


def test_two_machines_have_two_names(tmp_path, monkeypatch):
    draw_many(tmp_path, 4)
    lines = []
    with monkeypatch.context() as other:
        other.setattr(beats, "machine_id", lambda: "another machine")
        beating = Beats(tmp_path / "cache/machines").beating("a")
        (tmp_path / "cache/machines").mkdir(parents=True)
        beating.__enter__()
    with refused("machine-name-taken", folder=tmp_path / "cache", name="a"):
        build(config(tmp_path), "a", StubVae(), notify=lines.append)
    assert says(lines[-1], "machine-not-stopped", name="a")
    beating.__exit__(None, None, None)
    assert build(config(tmp_path), "a", StubVae()).cached == 4  # it was lost


@pytest.mark.parametrize(
    "option, environment, expected",
    [
        ("", {}, ""),
        ("x-1", {}, "x-1"),
        ("", {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, ""),
        ("", {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, os.uname().nodename),
        ("", {"SLURM_JOB_NUM_NODES": "1"}, ""),
        ("", {"SLURM_JOB_NUM_NODES": "4"}, os.uname().nodename),
        ("", {"SLURM_ARRAY_TASK_COUNT": "4"}, os.uname().nodename),
        ("x", {"SLURM_ARRAY_TASK_COUNT": "4"}, "x"),
    ],
)
def test_a_machine_is_called_as_its_host_where_several_work(option, environment, expected):
    assert machine_name(option, environment) == expected


@pytest.mark.parametrize("name", ["a/b", "..", "-a", "a" * 64])
def test_names_of_machines_name_folders(name):
    with refused("machine-name", value=repr(name)):
        machine_name(name, {})


@pytest.mark.slow
def test_torchrun_fills_a_cache_and_one_rank_tells_of_it(tmp_path, tiny_model):
    draw_many(tmp_path, 12)
    path = job(tmp_path, tiny_model, tmp_path / "images", STAGE)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastsd", "cache", str(path)]
    process = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("images cached in") == 1 and says(process.stdout, "images-cached-together", cached=12)
    assert stats(load_config(path).cache.dir).latents == 12
