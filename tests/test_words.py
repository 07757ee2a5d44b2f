"""The words of the house: names say what a thing is, docstrings begin with what it does or is."""

import ast
import re

import pytest
from environment import ROOT

FILES = sorted(path for folder in ("fastsd", "kernels", "bench") for path in ROOT.glob(f"{folder}/**/*.py"))
# Pronouns and participles that leave open what a variable holds.
BANNED = {
    "found", "said", "own", "which", "what", "each", "asked", "given", "wanted", "here", "where", "of", "known", "theirs",
    "told", "apart", "one", "made",
}  # fmt: skip
RIDDLE = re.compile(r"(What|Whether|Of|How|That|Where|Who|Which)\b")


def names_bound(tree: ast.AST) -> set[str]:
    """Local variables and parameters of all functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names |= {argument.arg for argument in arguments}
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_and_docstrings(path):
    tree = ast.parse(path.read_text())
    assert not names_bound(tree) & BANNED
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = re.sub(r"^Floor [\d.]+: ", "", ast.get_docstring(node) or "")
            assert not RIDDLE.match(docstring), docstring.splitlines()[0]


def test_a_riddle_is_refused():
    tree = ast.parse("def f(given):\n    for own in given: pass\n    return lambda each: each")
    assert names_bound(tree) & BANNED == {"given", "own", "each"}
    assert RIDDLE.match("What the figures amount to.") and not RIDDLE.match("Return what is left.")
