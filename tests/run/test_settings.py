"""Settings as text: values, file names, lists on the command line, and differences between configs."""

import pytest

from fastsd.config.schema import parse_config
from fastsd.run.settings import ABSENT, differences, flatten, safe_name, setting_text, short_names, split

TEXTS = [
    (None, "unset"), (0.1, "0.1"), (1 / 3, "0.3333333333"), (1e-5, "1e-05"), (3, "3"), (True, "true"), ("ä b", "ä b"),
    ("", '""'), (["ä", 1], '["ä", 1]'), ([], "[]"),
]  # fmt: skip


@pytest.mark.parametrize("value, text", TEXTS)
def test_values_as_text(value, text):
    assert setting_text(value) == text


def test_file_names_are_valid_everywhere():
    assert safe_name('stage.lr=1e-5, "ä/b": c') == "stage.lr=1e-5-ä-b-c"
    assert safe_name("--a.b..") == "a.b" and safe_name("x" * 100) == "x" * 80


def test_lists_are_split_outside_brackets_and_quotes():
    assert split("a, b,c") == ["a", "b", "c"] and split("") == [""] and split("a,") == ["a", ""]
    assert split("[1, [2, 3]], {a = 1, b = [2, 3]},4") == ["[1, [2, 3]]", "{a = 1, b = [2, 3]}", "4"]
    assert split("'a, \"b', \"c, 'd\",e") == ["'a, \"b'", '"c, \'d"', "e"]
    assert split(r'"a\", b",c') == [r'"a\", b"', "c"]
    assert split('"[",a]') == ['"["', "a]"]


def test_short_names_are_unique_endings():
    assert short_names(["stage.unet.lr", "stage.text.lr", "seed"]) == {
        "stage.unet.lr": "unet.lr", "stage.text.lr": "text.lr", "seed": "seed",
    }  # fmt: skip
    assert short_names(["a/b.c", "d/b.c"]) == {"a/b.c": "a/b.c", "d/b.c": "d/b.c"}
    assert short_names(["lr", "stage.lr"]) == {"lr": "lr", "stage.lr": "stage.lr"}


def test_nested_tables_are_flattened():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": "x"}) == {"a.b.c": "1", "a.d": "unset", "e": "x"}


def make_config(*stages, run="folder", **tables):
    stage = {"train": ["unet"], "until": 9, "batch": 4}
    raw = {"run": run, "model": {"base": "model"}, "data": {"folders": ["images"]}, "cache": {"dir": "cache"}}
    return parse_config(raw | tables | {"stage": [stage | changes for changes in stages]}, "job.toml")


def test_differences_of_single_stages_ignore_their_names_and_the_run():
    first, second = make_config({"name": "a"}), make_config({"name": "b", "lr": 0.5}, run="other", seed=3)
    assert differences([first, first]) == {}
    assert differences([first, second, first]) == {"seed": ["0", "3", "0"], "stage.lr": ["unset", "0.5", "unset"]}
    nameless = make_config({"name": "a"}, validate={"held_out": 3})
    assert differences([first, nameless])["validate.held_out"] == ["0", "3"]


def test_differences_of_several_stages_follow_their_names():
    first = make_config({"name": "a"}, {"name": "b"})
    second = make_config({"name": "b", "batch": 8}, {"name": "a"})
    assert differences([first, second]) == {"stage.b.batch": ["4", "8"]}
    third = make_config({"name": "a"}, {"name": "c", "batch": 2})
    rows = differences([first, third])
    assert rows.keys() == {"stage.b", "stage.c"} and rows["stage.b"][1] == rows["stage.c"][0] == ABSENT
    assert rows["stage.c"][1] == 'train = ["unet"], until = 9, batch = 2'
