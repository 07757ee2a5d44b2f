"""Scanning of folders for images and captions, also with links, odd names, and files that are no images."""

import errno
import inspect
import os
import sys

import pytest
from dataset import denied, touch
from sentences import refused, sentence

from fastsd.config.schema import FolderTable
from fastsd.data.sources import folders
from fastsd.data.sources.folders import MAX_CAPTION_BYTES, DataSource, Rejected, captions_of, read_bytes, scan, shown


def scanned(*folders, **options):
    return list(scan([FolderTable(path=os.fspath(folder)) for folder in folders], **options))


def names(folder, *folders, **options):
    return [os.path.relpath(source.path, folder) for source in scanned(*(folders or [folder]), **options)]


def test_scan_is_recursive_sorted_and_skips_hidden_files(tmp_path):
    touch(tmp_path, "b.JPG", "a.png", "d/c.webp", "d/e/f.bmp", "c.jpeg", "c.txt", ".x.png", ".git/y.png", "notes.md", "jpg")
    assert names(tmp_path) == ["a.png", "b.JPG", "c.jpeg", "d/c.webp", "d/e/f.bmp"]
    assert [bool(source.caption_paths) for source in scanned(tmp_path)] == [False, False, True, False, False]
    assert not any(source.problem or source.root for source in scanned(tmp_path))


def test_scan_follows_links_once_and_lists_no_path_twice(tmp_path):
    touch(tmp_path, "a/x.png", "b/y.png")
    (tmp_path / "a/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a/self.png").symlink_to(tmp_path / "a/self.png")
    assert sorted(names(tmp_path)) == ["a/self.png", "a/x.png", "b/y.png"]
    sources = scanned(tmp_path / "b", tmp_path)
    assert [os.path.relpath(source.path, tmp_path) for source in sources] == ["b/y.png", "a/self.png", "a/x.png"]
    assert [source.root for source in sources] == [0, 1, 1]


def test_an_inner_folder_comes_first_or_not_at_all(tmp_path):
    touch(tmp_path, "a/x.png", "b/y.png", "ab/z.png")
    assert names(tmp_path, tmp_path / "a", tmp_path / "ab", tmp_path) == ["a/x.png", "ab/z.png", "b/y.png"]
    assert names(tmp_path, tmp_path / "a", tmp_path / "b", tmp_path / "ab", tmp_path) == ["a/x.png", "b/y.png", "ab/z.png"]
    nested = f"is inside {tmp_path}, which is listed before it; remove it or list it first"
    for inner, problem in [(tmp_path / "a", nested), (tmp_path, "is listed twice; remove one")]:
        with refused("folder-within-folder", path=inner, problem=problem):
            scanned(tmp_path, inner)


UNUSABLE = {"missing": "folder-missing", "file": "folder-is-file", "empty": "folder-empty", "{00..09}": "folder-missing"}


@pytest.mark.parametrize("kind, code", UNUSABLE.items())
def test_unusable_roots_are_refused(tmp_path, kind, code):
    folder = tmp_path / kind
    if kind == "file":
        folder.write_text("x")
    elif kind == "empty":
        touch(folder, "notes.txt")
    with refused(code, path=folder) as error:
        scanned(folder)
    assert "\n" not in str(error.value)


def test_patterns_expand_as_in_a_shell(tmp_path):
    touch(tmp_path, "008/a.png", "009/a.png", "010/a.png", "x-1/a.png", "y-2/a.png", "{odd}/a.png")
    assert names(tmp_path, tmp_path / "{008..010}") == ["008/a.png", "009/a.png", "010/a.png"]
    assert names(tmp_path, tmp_path / "{x,y}-{1..2}")[::3] == ["x-1/a.png", "y-2/a.png"]
    assert names(tmp_path, tmp_path / "{odd}") == ["{odd}/a.png"]
    missing = [source for source in scanned(tmp_path / "{008..012}") if source.problem]
    assert [source.name for source in missing] == [str(tmp_path / name) for name in ("011", "012")]
    assert all(source.problem == sentence("file-unreadable", cause=os.strerror(errno.ENOENT)) for source in missing)


def no_permission(path):
    """Return an `os.scandir` that refuses folders below `path`, because root is not affected by permissions."""
    real_scandir = os.scandir

    def scandir(folder):
        if os.fspath(folder).startswith(str(path)):
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return real_scandir(folder)

    return scandir


def test_folders_without_permission_are_rejected(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.png", "b/y.png")
    monkeypatch.setattr(os, "scandir", no_permission(tmp_path / "a"))
    locked, fine = scanned(tmp_path)
    problem = sentence("folder-not-listed", cause="Permission denied")
    assert locked == DataSource(str(tmp_path / "a"), problem=problem)
    assert fine.path == str(tmp_path / "b/y.png")
    with refused("folder-unreadable", path=tmp_path / "a", problem=problem):
        scanned(tmp_path / "a")


def test_folders_deeper_than_pythons_stack_are_scanned(tmp_path):
    deep = tmp_path / "/".join("a" * 200)
    touch(deep, "x.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        (source,) = scanned(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert source.path == str(deep / "x.png")


@pytest.mark.parametrize("name", [b"a\nb.png", "🐈.png".encode(), b"caf\xe9.png", b"a b'\".png", b"-rf.png"])
def test_files_with_odd_names_are_read(tmp_path, name):
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb") as file:
        file.write(b"x")
    with open(path[:-4] + b".txt", "w") as file:
        file.write("caption")
    (source,) = scanned(tmp_path)
    assert os.fsencode(source.path) == path and captions_of(source) == ("caption",) and read_bytes(source) == b"x"
    assert "\n" not in shown(source.name)


@pytest.mark.parametrize(
    "data, captions",
    [
        (b"a red circle\nmore\n", ("a red circle", "more")),
        (b"\xef\xbb\xbf\r\n  \r\n  a, b \r\n", ("a, b",)),
        ("naïve café 🐈".encode(), ("naïve café 🐈",)),
        (b"x" * MAX_CAPTION_BYTES, ("x" * MAX_CAPTION_BYTES,)),
        (b"", ()),
        (b" \n\t\n", ()),
    ],
)
def test_captions_are_the_lines_that_are_not_blank(tmp_path, data, captions):
    (tmp_path / "x.txt").write_bytes(data)
    assert captions_of(DataSource("x.png", caption_paths=(str(tmp_path / "x.txt"),))) == captions


@pytest.mark.parametrize(
    "data, reason",
    [(b"caf\xe9", "not-utf8"), (b"a\0b", "contains-nul"), (b"x" * (MAX_CAPTION_BYTES + 1), "too-large"), (None, "unreadable")],
)
def test_bad_captions_are_rejected(tmp_path, data, reason):
    if data is not None:
        (tmp_path / "x.txt").write_bytes(data)
    with refused(f"caption-{reason}", Rejected) as error:
        captions_of(DataSource("x.png", caption_paths=(str(tmp_path / "x.txt"),)))
    assert not error.value.lasting


def test_a_caption_comes_from_the_first_text_that_is_not_empty(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png", "c.txt/d.png", "e.png", "f.png")
    texts = {
        "a.txt": "text",
        "a.caption": "caption",
        "b.caption": "only\nthis",
        "e.txt": " \n",
        "e.caption": "fuller",
        "f.txt": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    captions = [("text",), ("only", "this"), (), (), ("fuller",), ()]
    assert [captions_of(source) for source in scanned(tmp_path)] == captions


def test_only_line_ends_separate_captions_and_they_can_be_joined(tmp_path):
    odd = "a\x85b\x0bc\x0cd\x1ce\u2028f\u2029g"
    (tmp_path / "a.txt").write_bytes(f"{odd}\rsecond\r\nthird\n\n fourth ".encode())
    source = DataSource("a.png", caption_paths=(str(tmp_path / "a.txt"),))
    assert captions_of(source) == (odd, "second", "third", "fourth")
    assert captions_of(source, "join") == (f"{odd} second third fourth",)
    (tmp_path / "a.txt").write_text("\n \n")
    assert captions_of(source, "join") == ()


@pytest.mark.parametrize("data, encoding", [("café".encode("cp1252"), "WINDOWS-1252"), ("café".encode("utf-16"), "UTF-16")])
def test_the_advice_for_a_caption_that_is_not_utf8_converts_it(tmp_path, data, encoding):
    (tmp_path / "x.txt").write_bytes(data)
    with refused("caption-not-utf8", Rejected, encoding=encoding):
        captions_of(DataSource("x.png", caption_paths=(str(tmp_path / "x.txt"),)))
    assert data.decode(encoding) == "café"


def test_read_bytes_reads_ranges_and_rejects_unreadable_files(tmp_path, monkeypatch):
    path = tmp_path / "x.tar"
    path.write_bytes(b"0123456789")
    assert read_bytes(DataSource(str(path))) == b"0123456789"
    assert read_bytes(DataSource(str(path), member="m", offset=3, length=4)) == b"3456"
    os.mkfifo(tmp_path / "pipe")
    for source, reason in [
        (DataSource(str(path), offset=8, length=4), "tar-member-truncated"),
        (DataSource(str(tmp_path / "no.png")), "file-unreadable"),
        (DataSource(str(tmp_path / "pipe")), "file-not-regular"),
        (DataSource(str(path), length=folders.MAX_IMAGE_BYTES + 1), "file-too-large"),
    ]:
        with refused(reason, Rejected) as error:
            read_bytes(source)
        assert not error.value.lasting

    monkeypatch.setattr("builtins.open", denied)
    with refused("file-unreadable", Rejected, cause="Permission denied"):
        read_bytes(DataSource(str(path)))
    with refused("caption-unreadable", Rejected, cause="Permission denied"):
        captions_of(DataSource("x.png", caption_paths=(str(path),)))


def test_latents_take_the_place_of_images(tmp_path):
    touch(tmp_path, "a.png", "a.img_sdxl", "a.img_sdvae", "a.txt", "d/b.img_sdxl", "d/b.caption", "c.png", "c.img_sdxl.webp")
    for kind in ("img_sdxl", "img_sdvae"):
        sources = scanned(tmp_path, latents=kind)
        assert sources[0] == DataSource(str(tmp_path / f"a.{kind}"), caption_paths=(str(tmp_path / "a.txt"),))
    assert names(tmp_path, latents="img_sdxl") == ["a.img_sdxl", "d/b.img_sdxl"]
    with refused("folder-empty", extensions=".npz"):
        scanned(tmp_path, latents="npz")


def test_masks_are_matched_by_name_and_are_not_images(tmp_path):
    touch(
        tmp_path, "a.png", "a-mask.png", "a.mask.png", "b.JPG", "b-MASK.png", "c.png", "d/a.png", "d/c-mask.png", "c-masks.png"
    )
    (tmp_path / "e.png").touch()
    (tmp_path / "e-mask.png").mkdir()
    sources = scanned(tmp_path, masks="-mask.png")
    masks = {os.path.relpath(source.path, tmp_path): source.mask and os.path.basename(source.mask.path) for source in sources}
    assert masks == {
        "a.mask.png": None, "a.png": "a-mask.png", "b.JPG": "b-MASK.png", "c-masks.png": None, "c.png": None, "d/a.png": None,
        "d/c-mask.png": None, "e.png": None,
    }  # fmt: skip
    assert [os.path.relpath(source.path, tmp_path) for source in sources if source.problem] == ["d/c-mask.png"]
    assert names(tmp_path).count("a-mask.png") == 1


def test_npz_files_are_matched_by_the_names_of_sd_scripts(tmp_path):
    latents = ("a.npz", "b_sd.npz", "c_0512x0768_sd.npz", "d_0512x0768_sdxl.npz", "e_sd.npz", "f_1x2.npz")
    touch(tmp_path, *latents, "a_te_outputs.npz", "e_sd.jpg")
    for stem in ("a", "b", "c", "d", "e_sd", "f"):
        (tmp_path / f"{stem}.txt").write_text(stem)
    assert [captions_of(source)[0] for source in scanned(tmp_path, latents="npz")] == ["a", "b", "c", "d", "e_sd", "f"]
    touch(tmp_path, "c_0512x0512_sd.npz", "d_0512x0768_sd.npz")
    problems = [os.path.basename(source.path) for source in scanned(tmp_path, latents="npz") if source.problem]
    assert problems == ["c_0512x0512_sd.npz", "c_0512x0768_sd.npz", "d_0512x0768_sd.npz", "d_0512x0768_sdxl.npz"]


def test_paths_are_shown_on_one_line():
    assert shown("a\nb.png") == r"a\nb.png"
    assert shown("🐈.png") == "🐈.png"
    assert shown(b"caf\xe9.png") == r"caf\xe9.png"


NFC, NFD = "caf\u00e9", "cafe\u0301"


def captions_by_name(folder, **options):
    return {os.path.relpath(source.path, folder): captions_of(source) for source in scanned(folder, **options)}


def test_texts_and_masks_are_matched_whatever_their_case_and_accents(tmp_path):
    touch(tmp_path, "A.JPG", "b.png", "B.png", f"{NFD}.png", f"d/{NFC}.jpg", "c.jpg", "C.JPG", "e.png")
    texts = ("A.TXT", "b.txt", f"{NFC}.txt", f"d/{NFD.upper()}.Caption", "C.txt", "E.txt", "e.TXT")
    for text in texts:
        (tmp_path / text).write_text(text)
    assert captions_by_name(tmp_path) == {
        "A.JPG": ("A.TXT",), "b.png": ("b.txt",), "B.png": (), f"{NFD}.png": (f"{NFC}.txt",),
        f"d/{NFC}.jpg": (f"d/{NFD.upper()}.Caption",), "c.jpg": (), "C.JPG": ("C.txt",), "e.png": ("e.TXT",),
    }  # fmt: skip
    touch(tmp_path, "a-MASK.png", f"{NFC}-mask.png", "B-mask.png")
    masks = {source.path: source.mask and os.path.basename(source.mask.path) for source in scanned(tmp_path, masks="-mask.png")}
    masks = {os.path.relpath(path, tmp_path): mask for path, mask in masks.items() if mask}
    assert masks == {"A.JPG": "a-MASK.png", f"{NFD}.png": f"{NFC}-mask.png", "B.png": "B-mask.png"}


def test_latents_are_matched_whatever_their_case(tmp_path):
    touch(tmp_path, "A_SD.NPZ", "a_sd.JPG", "B.IMG_SDXL")
    (tmp_path / "a_sd.TXT").write_text("a")
    assert captions_by_name(tmp_path, latents="npz") == {"A_SD.NPZ": ("a",)}
    assert captions_by_name(tmp_path, latents="img_sdxl") == {"B.IMG_SDXL": ()}


SYSTEM_FOLDERS = (
    "@eaDir", "#recycle", "__MACOSX", ".thumbnails", "$RECYCLE.BIN", "System Volume Information", "@Recycle", "lost+found",
)  # fmt: skip


def test_folders_of_systems_are_skipped_unless_they_are_a_root(tmp_path):
    touch(tmp_path, "a.png", *(f"{name}/x.png" for name in SYSTEM_FOLDERS), "b/@eadir/c.png/SYNOPHOTO_THUMB_XL.jpg", "b/c.png")
    assert names(tmp_path) == ["a.png", "b/c.png"]
    assert names(tmp_path / "@eaDir") == ["x.png"]


def test_a_root_with_two_names_is_refused(tmp_path):
    touch(tmp_path, "a/x.png", "a/in/y.png", "t.tar")
    (tmp_path / "link").symlink_to("a", target_is_directory=True)
    (tmp_path / "inner").symlink_to("a/in", target_is_directory=True)
    (tmp_path / "u.tar").hardlink_to(tmp_path / "t.tar")
    first, tar = tmp_path / "a", tmp_path / "t.tar"
    for roots, problem in {
        ("a", "link"): f"is the same as {first}, which is listed before it; remove one",
        ("a", "inner"): f"is inside {first}, which is listed before it; remove it or list it first",
        ("a", "a/"): "is listed twice; remove one",
        ("t.tar", "u.tar"): f"is the same as {tar}, which is listed before it; remove one",
    }.items():
        with refused("folder-within-folder", problem=problem):
            scanned(*(f"{tmp_path}/{root}" for root in roots))


def test_a_folder_that_another_root_reaches_by_a_link_belongs_to_its_own_root(tmp_path):
    touch(tmp_path, "a/x.png", "art/y.png", "only/z.txt")
    (tmp_path / "a/link").symlink_to(tmp_path / "art", target_is_directory=True)
    (tmp_path / "only/link").symlink_to(tmp_path / "art", target_is_directory=True)
    roots = (tmp_path / "a", tmp_path / "only", tmp_path / "art")
    assert [(os.path.relpath(source.path, tmp_path), source.root) for source in scanned(*roots)] == [
        ("a/x.png", 0),
        ("art/y.png", 2),
    ]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/loop").symlink_to(tmp_path / "empty", target_is_directory=True)
    with refused("folder-empty"):
        scanned(tmp_path / "empty")


def test_masks_may_have_an_ending_of_images_that_is_rare(tmp_path):
    touch(tmp_path, "a.jpg", "a.tif", "b.jpg")
    masks = [source.mask and os.path.basename(source.mask.path) for source in scanned(tmp_path, masks=".tif")]
    assert masks == ["a.tif", None]
