"""WebDataset tars: samples, captions, every kind of member that must not be used, damage, and false headers."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
from dataset import denied
from sentences import pattern, refused, says, sentence
from tar_bytes import END, raw

from fastsd.config.schema import FolderTable
from fastsd.data.sources.folders import captions_of, read_bytes, scan
from fastsd.data.sources.image import IMAGE_EXTENSIONS
from fastsd.data.sources.tars import samples

NO_END, NO_CAPTION = pattern("tar-no-end"), pattern("tar-part-missing", part="caption")
NOT_AN_OBJECT = sentence("tar-json", reason=sentence("json-not-object"))


def member(name, data=b"x", kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if kind == tarfile.REGTYPE else 0, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar(path, *members, format=tarfile.GNU_FORMAT):
    """Write a tar of `members`, each (name, data) or a result of `member`."""
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else member(name, data)[0]
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key, caption="caption", extension="jpg"):
    return (f"{key}.{extension}", f"bytes of {key}".encode()), (f"{key}.txt", caption.encode())


def read(path, caption_key="", **options):
    """Read the samples of a tar. Return the bytes and captions of each image, and each problem, by name."""
    usable, problems = {}, {}
    for source in samples(str(path), 0, IMAGE_EXTENSIONS, caption_key, **options):
        assert source.name not in problems and source.member not in usable
        if source.problem:
            assert "\n" not in source.problem
            problems[os.path.relpath(source.name, path)] = source.problem
        else:
            usable[source.member] = (read_bytes(source), captions_of(source))
    return usable, problems


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_read_as_by_tarfile(tmp_path, format):
    long_name = "/".join(["folder" * 5] * 6) + "/" + "n" * 60
    keys = ["a", "./b", "d/c", long_name, "é🐈", "e" * 96] + ([] if format == tarfile.USTAR_FORMAT else ["x" * 300])
    members = [entry for key in keys for entry in sample(key, key)]
    path = tar(tmp_path / "x.tar", member("d", kind=tarfile.DIRTYPE), *members, format=format)
    usable, problems = read(path)
    with tarfile.open(path) as file:
        assert {name: data for name, (data, _) in usable.items()} == {
            info.name: file.extractfile(info).read() for info in file if info.name.endswith(".jpg")
        }
    assert [captions for _, captions in usable.values()] == [(key,) for key in keys] and not problems


def test_members_with_names_that_are_not_text_are_read(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as file:
        for name in ("caf\xe9.jpg", "a\nb.jpg"):
            info, data = member(name)
            file.addfile(info, io.BytesIO(data))
    usable, problems = read(tmp_path / "x.tar")
    assert [os.fsencode(name) for name in usable] == [b"caf\xe9.jpg", b"a\nb.jpg"] and not problems


def test_members_are_grouped_as_in_webdataset(tmp_path):
    members = [
        ("k.txt", b"before its image\nsecond"), ("k.cls", b"7"), ("k.JPG", b"1"), ("k.seg.png", b"mask"),
        ("d/k.png", b"2"), ("d/k.caption", b"other folder"), ("README", b"no sample"), ("d/k.jpg", b"3"),
        ("._k.jpg", b"hidden"), ("only.txt", b"no image"), ("w.webp", b"4"), ("w.caption", b"no"), ("w.txt", b"yes"),
        ("none.bmp", b"5"), ("dot.ted/x.jpg", b"6"),
    ]  # fmt: skip
    usable, problems = read(tar(tmp_path / "x.tar", *members))
    assert usable == {
        "k.JPG": (b"1", ("before its image", "second")), "d/k.png": (b"2", ("other folder",)),
        "d/k.jpg": (b"3", ("other folder",)), "w.webp": (b"4", ("yes",)), "none.bmp": (b"5", ()), "dot.ted/x.jpg": (b"6", ()),
    }  # fmt: skip
    assert not problems


def test_captions_are_read_from_json(tmp_path):
    def with_json(key, content, text=None):
        members = [
            (f"{key}.jpg", b"x"),
            (f"{key}.json", content if isinstance(content, bytes) else json.dumps(content).encode()),
        ]
        return members + ([(f"{key}.txt", text)] if text is not None else [])

    path = tar(
        tmp_path / "x.tar",
        *with_json("a", {"caption": "json\ncaption", "long": ["l1", "l2"]}, b"text"),
        *with_json("b", {"caption": "json\ncaption", "width": 3}),
        *with_json("c", {"url": "http://x"}),
        *with_json("d", b"{", b"text"),
        *with_json("e", b"[1]"),
        *with_json("f", {"caption": 3, "long": 3}),
        *with_json("g", b'{"caption": "' + b"x" * (1 << 20) + b'"}'),
    )
    usable, problems = read(path)
    captions = {name[0]: captions for name, (_, captions) in usable.items()}
    assert captions == {"a": ("text",), "b": ("json caption",), "c": (), "d": ("text",)}
    assert {name[0]: problem for name, problem in problems.items()} == {
        "e": NOT_AN_OBJECT,
        "f": sentence("tar-json", reason=sentence("caption-not-text", key="caption", type="int")),
        "g": sentence("tar-json", reason=sentence("file-too-large", limit="1 MiB")),
    }
    usable, problems = read(path, caption_key="long")
    assert {name[0]: captions for name, (_, captions) in usable.items()} == {"a": ("l1", "l2"), "b": (), "c": ()}
    assert sorted(name[0] for name in problems) == ["d", "e", "f", "g"]


def test_an_empty_caption_hides_no_other_and_lines_can_be_joined(tmp_path):
    empty_text = [("a.png", b"1"), ("a.txt", b" \n"), ("a.caption", b"c\n\nd"), ("a.json", b'{"text": "json"}')]
    empty_json = [("b.png", b"2"), ("b.json", b'{"text": ""}'), ("b.txt", b"t")]
    path = tar(tmp_path / "x.tar", *empty_text, *empty_json)
    assert read(path)[0] == {"a.png": (b"1", ("c", "d")), "b.png": (b"2", ("t",))}
    assert read(path, "text", caption_lines="join")[0] == {"a.png": (b"1", ("json",)), "b.png": (b"2", ("t",))}
    assert read(path, caption_lines="join")[0]["a.png"] == (b"1", ("c d",))


def test_accents_make_no_difference_and_folders_of_systems_are_skipped(tmp_path):
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    members = [(f"{nfd}.png", b"1"), (f"{nfc}.txt", b"accents"), *sample("__MACOSX/a"), *sample("d/@eaDir/b"), *sample(".c/d")]
    path = tar(tmp_path / "x.tar", *members, *sample("./e"), (f"{nfc}-mask.png", b"m"))
    usable, problems = read(path, masks="-mask.png")
    assert usable == {f"{nfd}.png": (b"1", ("accents",)), "./e.jpg": (b"bytes of ./e", ("caption",))} and not problems


def test_weights_are_read_from_json(tmp_path):
    rows = {
        "a": {"score": 0.5, "caption": "ignored"},
        "b": {"score": 3},
        "c": {"score": None},
        "d": {},
        "e": {"score": "x"},
    }
    members = [entry for key, row in rows.items() for entry in (*sample(key, key), (f"{key}.json", json.dumps(row).encode()))]
    path = tar(tmp_path / "x.tar", *members, *sample("f"), *sample("g"), ("g.json", b"{"))
    sources = {source.member[0]: source for source in samples(str(path), 0, IMAGE_EXTENSIONS, "", "score")}
    assert [sources[key].weight for key in "abcdf"] == [0.5, 3, None, None, None]
    assert [captions_of(sources[key]) for key in "ab"] == [("a",), ("b",)]
    assert sources["e"].problem == sentence("tar-json", reason=sentence("weight-not-number", key="score", type="str"))
    assert sources["g"].problem == NOT_AN_OBJECT
    assert not any(source.problem or source.weight for source in samples(str(path), 0, IMAGE_EXTENSIONS, ""))


def test_masks_are_matched_anywhere_in_the_tar(tmp_path):
    masks_at_end = ("a_m.png", b"A"), ("k/b_M.PNG", b"B"), ("c_m.png", b"C")
    path = tar(tmp_path / "x.tar", *sample("a"), *sample("aa"), *sample("k/b"), *sample("b"), *masks_at_end)
    sources = list(samples(str(path), 0, IMAGE_EXTENSIONS, "", masks="_m.png"))
    assert [source.member for source in sources[:4]] == ["a.jpg", "aa.jpg", "k/b.jpg", "b.jpg"]
    assert [source.mask and read_bytes(source.mask) for source in sources[:4]] == [b"A", None, b"B", None]
    assert sources[2].mask.name == f"{path}/k/b_M.PNG"
    (orphan,) = sources[4:]
    assert orphan.member.startswith("c_m.png") and orphan.problem == sentence("mask-without-image")
    assert len(read(path)[0]) == 7  # without `masks`, masks are images
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"b.jpg", data.index(b"aa.txt")) - 2])  # truncate the tar after aa
    *_, last, damage = samples(str(path), 0, IMAGE_EXTENSIONS, "", masks="_m.png")
    assert last.member == "aa.jpg" and NO_END.search(damage.problem)
    assert last.problem == sentence("tar-part-missing", part="mask", reason=damage.problem)


@pytest.mark.parametrize(
    "caption, reason", [(b"caf\xe9", "not-utf8"), (b"a\0b", "contains-nul"), (b"x" * ((1 << 20) + 1), "too-large")]
)
def test_images_with_bad_captions_are_rejected(tmp_path, caption, reason):
    usable, problems = read(tar(tmp_path / "x.tar", ("a.jpg", b"1"), ("a.txt", caption), *sample("b")))
    assert list(usable) == ["b.jpg"] and list(problems) == ["a.jpg"] and says(problems["a.jpg"], f"caption-{reason}")


def test_unsafe_and_special_members_are_rejected(tmp_path):
    path = tar(
        tmp_path / "x.tar",
        *sample("first"),
        member("../up.jpg"),
        member("a/../../up.jpg"),
        member("/etc/abs.jpg"),
        member("soft.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard.jpg", kind=tarfile.LNKTYPE, linkname="first.jpg"),
        member("char.jpg", kind=tarfile.CHRTYPE),
        member("block.jpg", kind=tarfile.BLKTYPE),
        member("pipe.jpg", kind=tarfile.FIFOTYPE),
        member("sparse.jpg", pax_headers={"GNU.sparse.major": "1"}),
        ("captioned.jpg", b"x"),
        member("captioned.txt", kind=tarfile.SYMTYPE, linkname="first.txt"),
        member("null", kind=tarfile.CHRTYPE),
        *sample("last"),
        format=tarfile.PAX_FORMAT,
    )
    assert list(read(path)[0]) == ["first.jpg", "last.jpg"]
    kinds = {"soft.jpg": "symbolic link", "hard.jpg": "hard link", "char.jpg": "device", "block.jpg": "device"}
    kinds |= {"pipe.jpg": "pipe", "sparse.jpg": "sparse file", "captioned.txt": "symbolic link"}
    reasons = {name: sentence("tar-member-kind", kind=kind) for name, kind in kinds.items()}
    reasons |= dict.fromkeys(("../up.jpg", "a/../../up.jpg", "/etc/abs.jpg"), sentence("tar-member-outside"))
    reasons["captioned.jpg"] = sentence("tar-caption-member", member="captioned.txt", reason=reasons["captioned.txt"])
    problems = {source.member: source.problem for source in samples(str(path), 0, IMAGE_EXTENSIONS, "") if source.problem}
    (null_name,) = problems.keys() - reasons.keys()
    assert null_name.startswith("null (at byte ") and problems.pop(null_name) == sentence("tar-member-kind", kind="device")
    assert problems == reasons


def test_gnu_sparse_members_are_rejected(tmp_path):
    header = bytearray(raw("s.jpg", 512, b"S", magic=b"ustar  \0"))
    header[482] = 1  # two more blocks of the map follow
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    map_block = bytes(504) + b"\1" + bytes(7)
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(header) + map_block + bytes(512) + b"s" * 512 + raw("b.jpg", 1, data=b"b") + END)
    assert read(path) == ({"b.jpg": (b"b", ())}, {"s.jpg": sentence("tar-member-kind", kind="sparse file")})


def test_duplicates_are_reported_and_the_first_is_used(tmp_path):
    names = "a.jpg a.jpg a.txt a.TXT b.jpg b.txt a.png a.txt b.jpg b.txt c.jpg d.jpg c.txt"
    usable, problems = read(tar(tmp_path / "x.tar", *((name, str(i).encode()) for i, name in enumerate(names.split(), 1))))
    captions = {name: captions for name, (_, captions) in usable.items()}
    assert captions == {"a.jpg": ("3",), "b.jpg": ("6",), "c.jpg": (), "d.jpg": ()}
    assert usable["a.jpg"][0] == b"1"
    assert [name.split(" (at")[0] for name in problems] == ["a.jpg", "a.TXT", "a.png", "b.jpg", "c.txt"]
    reasons = list(problems.values())
    assert all(says(reason, "tar-member-repeated") for reason in reasons[:2])
    assert reasons[2:] == [sentence("tar-key-not-adjacent", key=key) for key in "abc"]


def test_names_with_more_dots_are_reported_unless_the_sample_has_an_image(tmp_path):
    usable, problems = read(tar(tmp_path / "x.tar", *sample("v1.5"), *sample("ok")))
    assert list(usable) == ["ok.jpg"]
    ((name, reason),) = problems.items()
    assert name.startswith("v1.5.jpg") and reason == sentence("tar-key-has-dots", file=".5.jpg", key="v1")


def test_the_members_of_a_sample_are_limited(tmp_path):
    members = [member(f"a.{i}", kind=tarfile.SYMTYPE) for i in range(200)]
    usable, problems = read(tar(tmp_path / "x.tar", *members))
    too_many = sentence("tar-key-too-many", limit=64, key="a")
    assert not usable and len(problems) == 200 and list(problems.values()).count(too_many) == 136


@pytest.mark.parametrize(
    "end, names, reasons",
    [
        (0, [], {"": pattern("file-empty")}),
        (100, [], {"": pattern("tar-not-a-tar")}),
        (600, [], {"": pattern("tar-truncated", position=600, member="a.jpg")}),
        (1 * 3072, ["a.jpg"], {"": NO_END}),
        (1 * 3072 + 1536, ["a.jpg"], {"b.jpg": NO_CAPTION, "": NO_END}),
        (1 * 3072 + 2500, ["a.jpg"], {"b.jpg": NO_CAPTION, "": pattern("tar-truncated", member="b.txt")}),
        (2 * 3072 + 300, ["a.jpg", "b.jpg"], {"": NO_END}),
        (2 * 3072 + 1000, ["a.jpg", "b.jpg"], {"": pattern("tar-truncated", member="c.jpg")}),
        (3 * 3072 - 300, ["a.jpg", "b.jpg", "c.jpg"], {"": NO_END}),
        (3 * 3072, ["a.jpg", "b.jpg", "c.jpg"], {"": NO_END}),
    ],
)
def test_members_before_a_cut_are_used(tmp_path, end, names, reasons):
    data = b"".join(raw(f"{key}.{e}", 700, data=b"x" * 700) for key in "abc" for e in ("jpg", "txt"))
    assert len(data) == 3 * 3072
    (tmp_path / "x.tar").write_bytes(data[:end])
    usable, problems = read(tmp_path / "x.tar")
    assert list(usable) == names and all(captions for _, captions in usable.values())
    problems = {name if name != "." else "": reason for name, reason in problems.items()}
    assert problems.keys() == reasons.keys() and all(reason.search(problems[name]) for name, reason in reasons.items())


def test_an_image_before_a_damaged_header_is_rejected_because_its_caption_may_be_missing(tmp_path):
    members = [raw(f"{key}.jpg", 700, data=b"x" * 700) for key in "abc"]
    members[1] = b"y" + members[1][1:]
    (tmp_path / "x.tar").write_bytes(b"".join(members) + END)
    usable, problems = read(tmp_path / "x.tar")
    assert not usable and problems["."] == sentence("tar-damaged", position=1536)
    assert NO_CAPTION.search(problems["a.jpg"])


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
def test_compressed_tars_are_rejected(tmp_path, name):
    data = tar(tmp_path / "plain", *sample("a")).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data))
    usable, problems = read(tmp_path / name)
    assert not usable and problems["."] == sentence("tar-compressed")
    with refused("folder-empty", first_problem=f" (first problem: {tmp_path / name}: {problems['.']})"):
        list(scan([FolderTable(path=str(tmp_path / name))]))


def test_false_headers_take_no_memory(tmp_path):
    path = tmp_path / "x.tar"
    first_sample = raw("a.jpg", 1, data=b"a") + raw("a.txt", 1, data=b"t")
    pax = b"30 path=" + b"y" * 21 + b"\n"
    false_headers = {
        "tar-truncated": [
            raw("big.jpg", 8 << 30),
            raw("big.jpg", 1 << 80),
            raw("pax", 1 << 30, b"x"),
            raw("l", 1 << 40, b"L"),
        ],
        "tar-header-too-large": [raw("p", 2 << 20, b"x", bytes(2 << 20)), raw("p", 2 << 20, b"L", bytes(2 << 20))],
        "tar-header-damaged": [
            raw("p", len(data), b"x", data)
            for data in (b"x", b"99 path=a\n", b"-5 a=b\n", b"9" * 9999, b"12 size=abc\n", pax[1:])
        ],
    }
    tracemalloc.start()
    for code, headers in false_headers.items():
        for header in headers:
            path.write_bytes(first_sample + header + raw("b.jpg", 1, data=b"b") + raw("c.jpg", 1, data=b"c") + END)
            tracemalloc.reset_peak()
            usable, problems = read(path)
            is_reported = any(says(problem, code) for problem in problems.values())
            assert "a.jpg" in usable and is_reported, (header[:20], usable, problems)
            assert ("c.jpg" in usable) == (code != "tar-truncated") and "b.jpg" not in usable
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_giant_member_is_rejected_and_skipped(tmp_path):
    path = tmp_path / "x.tar"
    size = (1 << 30) + 1
    with path.open("wb") as file:  # sparse on the disk
        file.write(raw("big.jpg", size))
        file.seek(-(-size // 512) * 512, os.SEEK_CUR)
        file.write(raw("b.jpg", 1, data=b"b") + END)
    assert read(path) == ({"b.jpg": (b"b", ())}, {"big.jpg": sentence("file-too-large", limit="1 GiB")})


def test_a_pax_size_replaces_the_size_in_the_header(tmp_path):
    path = tmp_path / "x.tar"
    pax = raw("pax", 12, b"x", b"12 size=700\n")
    path.write_bytes(pax + raw("a.jpg", 0) + b"x" * 700 + bytes(324) + raw("b.jpg", 1, data=b"b") + END)
    usable, problems = read(path)
    assert [len(data) for data, _ in usable.values()] == [700, 1] and not problems


def test_truncated_and_corrupted_tars_are_read_or_rejected(tmp_path):
    members = *sample("a"), *sample("d/" + "n" * 120), member("s.jpg", kind=tarfile.SYMTYPE), *sample("é")
    data = tar(tmp_path / "x.tar", *members, format=tarfile.PAX_FORMAT).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "y.tar"
    for _ in range(400):
        broken = bytearray(data[: rng.integers(len(data))] if rng.random() < 0.3 else data)
        for position in rng.integers(0, max(len(broken), 1), rng.integers(4)):
            broken[position : position + 1] = rng.bytes(1)
        path.write_bytes(broken)
        usable, _ = read(path)
        assert all(name.endswith(".jpg") for name in usable)


@pytest.mark.parametrize("kind", ["missing", "pipe", "folder"])
def test_paths_that_are_not_files_are_rejected(tmp_path, kind):
    path = tmp_path / "x.tar"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    usable, problems = read(path)
    assert not usable and says(problems["."], "file-unreadable" if kind == "missing" else "file-not-regular")


def test_a_tar_without_permission_is_rejected(tmp_path, monkeypatch):
    tar(tmp_path / "x.tar", *sample("a"))

    monkeypatch.setattr("builtins.open", denied)
    assert read(tmp_path / "x.tar") == ({}, {".": sentence("file-unreadable", cause="Permission denied")})


def test_output_of_img2dataset_is_read_from_a_folder_or_a_pattern(tmp_path):
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    for i, place in enumerate(("00000.tar", "00001.tar", "more/00002.tar")):
        tar(folder / place, *(entry for j in range(2) for entry in sample(f"{i:05d}{j:04d}", f"{i} {j}")))
        (folder / place).with_suffix(".parquet").write_bytes(b"never read")
        (folder / place.replace(".tar", "_stats.json")).write_text("{}")
    (folder / "loose.png").write_bytes(b"x")

    def captions(path):
        return [" ".join(captions_of(source)) for source in scan([FolderTable(path=str(path))])]

    assert captions(folder) == ["0 0", "0 1", "1 0", "1 1", "", "2 0", "2 1"]
    assert captions(folder / "{00000..00001}.tar") == ["0 0", "0 1", "1 0", "1 1"]
    assert captions(folder / "more/00002.tar") == ["2 0", "2 1"]
    roots = [FolderTable(path=str(folder / "00001.tar")), FolderTable(path=str(folder))]
    sources = [(source.root, *captions_of(source)) for source in scan(roots)]
    assert sources[:3] == [(0, "1 0"), (0, "1 1"), (1, "0 0")] and len(sources) == 7


def test_memory_does_not_grow_with_the_size_of_a_tar(tmp_path):
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        for i in range(3000):
            for extension in ("jpg", "json", "txt"):
                file.write(raw(f"{i:06d}.{extension}", 600, data=b"x" * 600))
        file.write(END)
    tracemalloc.start()
    count = sum(not source.problem for source in samples(str(path), 0, IMAGE_EXTENSIONS, ""))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000 and peak < 1 << 20


def test_a_pax_size_of_0_replaces_the_size_in_the_header(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(raw("pax", 9, b"x", b"9 size=0\n") + raw("a.jpg", 700) + raw("b.jpg", 1, data=b"b") + END)
    usable, problems = read(path)
    assert [len(data) for data, _ in usable.values()] == [0, 1] and not problems
