"""Checks of the words in the code: names of variables, first lines of docstrings, and the codes of messages."""

import ast
import re

import pytest
from environment import ROOT
from sentences import ERRORS, FILE, LINES

FILES = sorted(path for folder in ("fastsd", "kernels", "bench") for path in ROOT.glob(f"{folder}/**/*.py"))
# Pronouns and participles that leave open what a variable holds.
BANNED = {
    "found", "said", "own", "which", "what", "each", "asked", "given", "wanted", "here", "where", "of", "known", "theirs",
    "told", "apart", "one", "made",
}  # fmt: skip
RIDDLE = re.compile(r"(What|Whether|Of|How|That|Where|Who|Which)\b")


def names_bound(tree: ast.AST) -> set[str]:
    """Return the local variables and parameters of all functions."""
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


def literal_texts(argument: ast.expr) -> list[str]:
    """Return the constant parts of a message."""
    parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
    return [part.value for part in parts if isinstance(part, ast.Constant)]


def test_every_error_has_a_code_and_its_sentence():
    codes = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                code, message = node.args
                assert isinstance(code, ast.Constant), f"{path}:{node.lineno}: a code is a literal"
                codes.add(code.value)
                position = 0
                for text in literal_texts(message):
                    position = ERRORS[code.value].find(text, position)
                    assert position >= 0, f"{code.value}: {text!r} is not in {FILE.name}"
    assert codes == ERRORS.keys()
    assert not ERRORS.keys() & LINES.keys()
