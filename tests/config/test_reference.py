"""The reference of config keys: every key has a meaning, and docs/config.md is up to date."""

import json

import pytest
from commandline import fastsd
from environment import ROOT
from sentences import refused

from fastsd.config.reference import entries, explain, lookup, page
from fastsd.config.schema import TABLES, Config


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "config.md").read_text() == page(), "run python -m fastsd.config.reference > docs/config.md"


def test_every_key_has_a_meaning_and_its_default():
    names = [entry.name for entry in entries()]
    tables = {"": Config, **TABLES}
    keys = {f"{name}.{key}".strip("."): field for name, table in tables.items() for key, field in table.model_fields.items()}
    assert set(keys) - set(names) == {"model", "data", "stage", "cache", "sample", "validate_", "log", "export"}  # tables
    assert len(names) == len(set(names)) and all(len(entry.meaning) > 1 for entry in entries())
    for entry in entries():
        if entry.name in keys and entry.default not in ("", "unset", "no table"):
            assert json.loads(entry.default) == keys[entry.name].get_default(call_default_factory=True)


@pytest.mark.parametrize(
    ("name", "names", "text"),
    [
        ("grad_clip", ["stage.grad_clip"], "largest gradient norm"),
        ("stage.batch", ["stage.batch"], "images per optimizer step A whole number at least 1; default 32; fixed."),
        ("log.every", ["log.every"], "default 10"),
        ("every", ["validate.every", "log.every"], "interval"),
        ("data.folders.weight", ["data.folders.weight"], "share of an epoch"),
        ("weighting_min", ["stage.weighting_min"], 'only with weighting = "min_snr", "debiased" or "p2"'),
        ("until", ["stage.until"], "required"),
        ("seed", ["seed"], "default 0"),
    ],
)
def test_a_key_is_explained_with_and_without_its_table(name, names, text):
    matches = lookup(name)
    assert [entry.name for entry in matches] == names
    assert text in " ".join(explain(matches[0], 60).split())
    assert max(map(len, explain(matches[0], 60).splitlines())) <= 60


def test_a_table_is_all_of_its_keys():
    assert [entry.key for entry in lookup("[log]")] == ["every", "tensorboard", "wandb", "notify"]
    assert [entry.name for entry in lookup("model.lora")][:2] == ["model.lora", "model.lora.rank"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("stage.trian", "did you mean stage.train?"),
        ("Gradclip", "did you mean stage.grad_clip?"),
        ("zzz", "`fastsd config` lists all keys"),
    ],
)
def test_an_unknown_key_has_a_similar_one(name, advice):
    with refused("config-key-unknown", name=name, advice=advice):
        lookup(name)


def test_the_command(monkeypatch, capsys):
    code, out, _ = fastsd("config", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and "[[stage]]\n    name, train, until," in out
    code, out, _ = fastsd("config", "lr", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and out.startswith("stage.lr\n")
    code, _, error = fastsd("config", "learning", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and error.startswith("fastsd: learning: the config has no such key or table")
