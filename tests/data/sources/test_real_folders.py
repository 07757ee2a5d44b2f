"""Folders as people have them: nothing is ignored in silence, and nothing is read differently than its owner meant."""

import pytest
from dataset import DataSet, picture, png
from sentences import says


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch, capsys) -> DataSet:
    return DataSet(tmp_path, tiny_model, monkeypatch, capsys)


def test_several_captions_are_reported_and_can_be_joined(folder):
    folder.put("a.png", png(picture(1)), b"first paragraph\n\nsecond\n")
    folder.put("b.png", png(picture(2)), b"one")
    folder.put("c.png", png(picture(3)), b"1\n2\n3")
    assert folder.cached() == {"first paragraph", "second", "one", "1", "2", "3"}
    for out in (folder.out, folder.run("cache", "--stats")):
        assert says(out, "several-captions", count=2, most=3)
    joined = "data.caption_lines=join"
    assert folder.cached(joined) == {"first paragraph second", "one", "1 2 3"}
    assert says(folder.out, "images-cached", cached=3, encoded=0)
    assert not says(folder.out, "several-captions")
