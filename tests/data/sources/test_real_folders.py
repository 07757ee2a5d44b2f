"""Folders as people have them: nothing is ignored in silence, and nothing is read differently than its owner meant."""

import io
import json
import os
import sys
from collections import Counter
from contextlib import closing

import pytest
from dataset import DataSet, picture, png, saved, shot, tar_of, touch
from sentences import pattern, says

from fastsd import cli
from fastsd.config.schema import FolderTable
from fastsd.data.building import decode
from fastsd.data.cache import LatentCache
from fastsd.data.sources.folders import captions_of, scan
from fastsd.data.sources.image import shown
from fastsd.data.sources.unused import HIDDEN, METADATA, OTHER, STRAY


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch, capsys) -> DataSet:
    return DataSet(tmp_path, tiny_model, monkeypatch, capsys)


def test_several_captions_are_reported_and_can_be_joined(folder):
    folder.put("a.png", png(picture(1)), b"first paragraph\n\nsecond\n")
    folder.put("b.png", png(picture(2)), b"one")
    folder.put("c.png", png(picture(3)), b"1\n2\n3")
    assert folder.cached() == {"first paragraph", "second", "one", "1", "2", "3"}
    for out in (folder.out, folder.run("cache", "--stats")):
        assert says(out, "several-captions", count=2, images_have="images have", most=3)
    joined = "data.caption_lines=join"
    assert folder.cached(joined) == {"first paragraph second", "one", "1 2 3"}
    assert says(folder.out, "images-cached", cached=3, encoded=0)
    assert not says(folder.out, "several-captions")


def test_captions_that_are_cut_are_counted(folder):
    folder.put("a.png", png(picture(1)), b"red circle, " * 30)
    folder.put("b.png", png(picture(2)), b"one")
    folder.cached()
    for command in (["cache", "--stats"], ["check"]):
        assert says(folder.run(*command), "truncated-captions", captions=1, capacity=75)
        assert not says(folder.run(*command, "model.chunks=2"), "truncated-chunks")
        assert not says(folder.run(*command, "model.chunks=auto", "model.cut=commas"), "truncated-chunks")


def scanned(folder, **options):
    """Scan a folder. Return the captions of each image or its problem, and the unused files, by name."""
    unused = {}
    roots = [FolderTable(path=str(folder))]
    sources = list(scan(roots, unused=lambda path, reason: unused.update({path: reason}), **options))
    results = {source.name: source.problem or captions_of(source) for source in sources}
    return tuple({os.path.relpath(name, folder): value for name, value in names.items()} for names in (results, unused))


def test_unused_files_are_named_with_the_reason(tmp_path):
    touch(tmp_path, "a.png", "a.txt", "b.JFIF", "b.caption", "c.heic", "d.psd", "README", "a.png.txt", "d/e.txt", ".DS_Store")
    touch(tmp_path, "@eaDir/x.png", "d/f.tif", "a-mask.png")
    members = [("m.cls", b"1", {}), ("n.txt", b"stray", {}), ("__MACOSX/._m.png", b"", {})]
    (tmp_path / "x.tar").write_bytes(tar_of(*shot("m", 1), *members))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    images, unused = scanned(tmp_path, masks="-mask.png")
    assert images == {"a.png": ("a",), "b.JFIF": (), "c.heic": (), "d/f.tif": (), "x.tar/m.png": ("m",)}
    assert unused == {
        "d.psd": OTHER, "README": OTHER, "x.tar/m.cls": OTHER, "a.png.txt": STRAY, "d/e.txt": STRAY, "x.tar/n.txt": STRAY,
        ".DS_Store": HIDDEN, "@eaDir": HIDDEN, "x.tar/__MACOSX/._m.png": HIDDEN, "metadata.jsonl": METADATA,
    }  # fmt: skip


def test_captions_come_from_the_source_that_the_config_names(tmp_path):
    touch(tmp_path, "a red fox.png", "b.png")
    (tmp_path / "a red fox.txt").write_text("text")
    (tmp_path / "metadata.csv").write_text('file_name,text,weight\na red fox.png,"row, with a comma",0.5\n')
    (tmp_path / "x.tar").write_bytes(tar_of(("d/of a tar.png", b"", {}), ("d/of a tar.json", b'{"text": "json"}', {})))
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
        pass
    odd = os.fsdecode(b"caf\xe9.png")
    captions = {
        "file": (("row, with a comma",), (), ("json",), ()),
        "sidecar": (("text",), (), (), ()),
        "filename": (("a red fox",), ("b",), ("of a tar",), pattern("caption-name").pattern.replace("\\", "")),
    }
    for source, expected in captions.items():
        images, unused = scanned(tmp_path, captions=source)
        assert images == dict(zip(("a red fox.png", "b.png", "x.tar/d/of a tar.png", odd), expected, strict=True)), source
        assert unused == {"metadata.csv": METADATA if source == "file" else OTHER}
    weights = [source.weight for source in scan([FolderTable(path=str(tmp_path))], captions="sidecar", weight_key="weight")]
    assert sorted(weights, key=str) == [0.5, None, None, None]


def test_the_config_sets_the_source_and_encodes_nothing_again(folder):
    folder.put("a red fox.png", png(picture(1)), b"text")
    assert folder.cached() == {"text"}
    assert folder.cached("data.captions=filename") == {"a red fox"} and says(folder.out, "images-cached", encoded=0)


def oddities(folder: DataSet) -> dict[str, str]:
    """Fill a folder with 300 files of every kind. Return the class of every file, by its path."""
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    classes = {}

    def put(kind: str, name: str, data: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        classes[name] = kind

    def put_pair(image: str, text: str, data: bytes, caption: bytes = b"a caption") -> None:
        put("image", image, data)
        put("used", text, caption)

    for i in range(80):
        put_pair(f"plain/{i:03}.png", f"plain/{i:03}.txt", png(picture(i)))
    formats = {
        "tif": "TIFF",
        "gif": "GIF",
        "avif": "AVIF",
        "jfif": "JPEG",
        "jpeg": "JPEG",
        "JPG": "JPEG",
        "webp": "WEBP",
        "bmp": "BMP",
    }
    for i, (ending, format) in enumerate(formats.items()):
        put_pair(f"formats/{i}.{ending}", f"formats/{i}.caption", saved(picture(100 + i), format))
        put("image", f"formats/row {i}.{ending}", saved(picture(110 + i), format))
    table = ["file_name;text", *(f'row {i}.{ending};"a row; {i}"' for i, ending in enumerate(formats))]
    put("metadata file", "formats/metadata.csv", "\ufeff{}\r\n".format("\r\n".join(table)).encode())
    for i in range(10):
        put_pair(f"case/A{i}.JPG", f"case/a{i}.TXT", saved(picture(120 + i), "JPEG"))
        put_pair(f"mac/{nfd} {i}.png", f"mac/{nfc} {i}.txt", png(picture(130 + i)))
        put("image", f"rows/{nfd} {i}.png", png(picture(140 + i)))
        put("no caption", f"bare/{i}.png", png(picture(150 + i)))
        put("no caption", f"blank/{i}.png", png(picture(160 + i)))
        put("used", f"blank/{i}.txt", b" \n")
        put(OTHER, f"other/{i}.{('psd', 'md', 'mp4', 'svg', 'ini')[i % 5]}", b"x")
        put(STRAY, f"other/photo{i}.png.txt", b"stray")
        put(HIDDEN, f"hidden/._{i}.png", b"x")
        put("rejected", f"broken/{i}.png", png(picture(170 + i))[:60])
        put("used", f"broken/{i}.txt", b"of a broken image")
        put("rejected", f"latin/{i}.png", png(picture(180 + i)))
        put("used", f"latin/{i}.txt", "caf\u00e9".encode("latin-1"))
    rows = [{"file_name": f"{nfc} {i}.png", "text": f"row {i}"} for i in range(10)]
    put("metadata file", "rows/metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())
    for name in ("@eaDir", "#recycle", "__MACOSX", ".thumbnails", "$RECYCLE.BIN"):
        for i in range(2):
            put(HIDDEN, f"systems/{name}/{i}.png", png(picture(190 + i)))
    put_pair("odd/several.png", "odd/several.txt", png(picture(200)), "one\n\ntwo\x85still two".encode())
    put_pair("odd/fuller.png", "odd/fuller.caption", png(picture(201)))
    put("used", "odd/fuller.txt", b"")
    put("rejected", "odd/photo.heic", b"\0\0\0\x18ftypheic" + bytes(99))
    put("used", "odd/photo.txt", b"of a photo")
    put("enlarged", "odd/thumbnail.png", png(picture(202, 4, 4)))
    put("used", "odd/thumbnail.txt", b"small")
    put("rejected", "odd/empty.png", b"")
    return classes


def test_every_file_of_an_odd_folder_is_counted_and_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decode._formats.cache_clear()
    classes = oddities(folder)
    assert len(classes) == sum(len(files) for _, _, files in os.walk(folder.path)) >= 300
    folder.cached()
    (notable_path,) = folder.cache.glob("lists/*[!s].tsv")
    (images_path,) = folder.cache.glob("lists/*-images.tsv")

    notable = [line.split("\t") for line in notable_path.read_text(encoding="utf-8").splitlines()]
    assert all(path.startswith(f"{folder.path}/") for _, path, _ in notable)
    named = {path.removeprefix(f"{folder.path}/"): kind for kind, path, _ in notable}
    assert len(named) == len(notable)
    for line in images_path.read_text(encoding="utf-8").splitlines():
        path, _, *companions = line.removeprefix(f"{folder.path}/").split("\t")
        named.setdefault(path, "image")
        named |= {f"{os.path.dirname(path)}/{name}": "used" for name in companions if name}
    for path in [path for path in named if (folder / path).is_dir()]:  # a skipped folder stands for its files
        named |= {f"{path}/{name}": named[path] for name in os.listdir(folder / path)}
        del named[path]
    assert named == classes

    counts = Counter(classes.values())
    with closing(LatentCache.open(folder.cache)) as latents:
        assert latents.meta.images == sum(counts[kind] for kind in ("image", "no caption", "enlarged", "rejected"))
        assert latents.meta.cached == sum(counts[kind] for kind in ("image", "no caption", "enlarged"))
    endings = "2 x .ini, 2 x .md, 2 x .mp4, 2 x .psd, 2 x .svg"
    for out in (folder.out, folder.run("cache", "--stats")):
        assert says(out, "unused-other", count=10, endings=endings)
        assert says(out, "unused-texts", count=10, names="photo0.png.txt, photo1.png.txt, photo2.png.txt, ...")
        assert says(out, "unused-hidden", count=15)
        assert says(out, "several-captions", count=1, images_have="image has", most=2)
        assert says(out, "images-enlarged", count=1, images_are="image is", times=2, most=8)
        assert says(out, "files-named", path=notable_path)
    out = folder.run("check")
    assert says(out, "unused-other", count=10, endings=endings) and says(out, "unused-texts", count=10)
    before = notable_path.stat().st_mtime_ns, images_path.stat().st_mtime_ns
    folder.cached()
    assert (notable_path.stat().st_mtime_ns, images_path.stat().st_mtime_ns) == before
    folder.run("cache", "--prune")
    assert notable_path.exists()
    for path in (folder.cache / "views").iterdir():
        path.unlink()
    folder.run("cache", "--prune")
    assert not list((folder.cache / "lists").iterdir())


def test_check_notices_changes_of_the_folders(folder):
    folder.put_good(*(f"{name}.png" for name in "abcdef"))
    folder.cached()
    assert not says(folder.run("check"), "folders-changed")
    (folder / "a.png").unlink()
    folder.put("new.png", png(picture(9)))
    (folder / "b.txt").write_text("another caption")
    (folder / "c.txt").unlink()
    stamp = (folder / "d.png").stat()
    folder.put("d.png", (folder / "d.png").read_bytes())
    os.utime(folder / "d.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    changes = {"changes": "1 new, 1 missing, 3 changed", "names": "new.png, a.png, b.png, ..."}
    assert says(folder.run("check"), "folders-changed", **changes)
    folder.cached()
    assert not says(folder.run("check"), "folders-changed")
    for path in (folder.cache / "lists").iterdir():  # as in a cache of an earlier version
        path.unlink()
    out = folder.run("check")
    assert says(out, "files-unknown", dir=folder.cache) and not says(out, "folders-changed")


def test_images_that_a_stage_never_reaches_are_counted(folder):
    for i in range(14):
        folder.put(f"{i}.png", png(picture(i)))
    for i in range(3):
        folder.put(f"wide{i}.png", png(picture(20 + i, 60, 20)))
    keys = "data.buckets={min=16, max=64, step=8}", "stage.batch=4"
    folder.cached(*keys)
    for command in ("check", "train"):
        assert says(folder.run(command, *keys), "rare-shapes", stage="'stage-1'", count=3, images_are="images are", batch=4)
    assert not says(folder.run("check", *keys, "stage.until=3e"), "rare-shapes")


@pytest.mark.parametrize("encoding", ["ascii", "cp932", "utf-8"])
def test_a_console_that_lacks_characters_ends_nothing(folder, monkeypatch, encoding):
    folder.put("good.png", png(picture(1)))
    folder.put("caf\u00e9 \U0001f408.png", b"broken")
    for words, text in ((["cache"], "caf\u00e9 \U0001f408.png: not a JPEG"), (["cache", "--stats"], " \u00b1 ")):
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
        monkeypatch.setattr(sys, "argv", ["fastsd", *words[:1], str(folder.config), *words[1:], "sample.prompts=[]"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        sys.stdout.flush()
        text = text.replace("\u00b1", "+-") if encoding == "ascii" else text
        assert end.value.code == 0 and text.encode(encoding, "backslashreplace") in buffer.getvalue()


def test_listed_images_are_excluded_and_lines_without_an_image_are_named(folder, monkeypatch):
    names = ["a.png", "b.png", "d\té.png", os.fsdecode(b"e\xff.png")]
    folder.put_good(*names)
    (folder / "t.tar").write_bytes(tar_of(*shot("m", 8), *shot("n", 9)))
    assert len(folder.cached()) == 6
    full_view = LatentCache.open(folder.cache).name
    monkeypatch.chdir(folder.path)
    listed = [str(folder / "a.png"), "b.png", f"{folder / 't.tar'}/m.png", *(shown(folder / name) for name in names[2:])]
    exclusion = folder.path.parent / "list.tsv"
    exclusion.write_text("\ufeff# path\terror\n\n" + "".join(f"{path}\t9.5\r\n" for path in [*listed, "gone.png"]))
    key = f"data.exclude_files={exclusion}"
    assert folder.cached(key) == {"n"}
    assert says(folder.out, "images-cached", cached=1, images=1, encoded=0)
    assert says(folder.out, "unused-excluded", count=5) and says(folder.out, "unused-lines", count=1, names="gone.png")
    assert LatentCache.open(folder.cache).name != full_view
    assert "error" not in folder.run("check", key) and len(folder.cached()) == 6

    exclusion.write_text("".join(f"{path}\n" for path in [*listed, f"{folder / 't.tar'}/n.png"]))
    assert says(folder.run("cache", key, code=2), "exclusion-leaves-none", path=exclusion, count=6)
    exclusion.write_bytes(b"a\xff")
    assert says(folder.run("cache", key, code=2), "exclusion-unreadable", reason="not UTF-8 at byte 1")
    assert says(folder.run("check", f"{key}x", code=2), "exclusion-unreadable", reason="No such file or directory")
