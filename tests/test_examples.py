"""The library's face: the names that `fastsd` exports, and every program in examples/."""

import importlib
import re
import runpy
import subprocess
import sys

import pytest
from caching import StubVae, config, draw_many
from environment import ROOT

import fastsd
from fastsd.data.building.build import build_cache

EXAMPLES = sorted(set(ROOT.glob("examples/*.py")) - set(ROOT.glob("examples/*_listing.py")))  # see test_cluster_listings.py


def test_exports_are_what_type_checkers_see():
    source = (ROOT / "fastsd/__init__.pyi").read_text()
    declared = re.findall(r"^from (\S+) import (\w+) as (\w+)", source, re.M)
    assert {name: f"{module}:{attribute}" for module, attribute, name in declared} == fastsd._EXPORTS
    for module, attribute, name in declared:
        assert getattr(fastsd, name) is getattr(importlib.import_module(module), attribute)
    with pytest.raises(AttributeError, match="sampel"):
        fastsd.sampel  # noqa: B018


def test_importing_fastsd_imports_nothing_heavy():
    code = "import sys, fastsd; sys.exit(bool({'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cached")
    draw_many(root, 9)
    build_cache(config(root), StubVae())
    return root / "cache"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tiny_model, cache_folder, tmp_path, monkeypatch, capsys):
    argument = {"dlion": [], "latents": [cache_folder]}.get(path.stem, [tiny_model])
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, argument)])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.count("\n") >= 1
    assert len(path.read_text().splitlines()) < 40
