"""Checks of the words in the code: names of variables, first lines of docstrings, and the codes of messages."""

import ast
import re

import pytest
from environment import ROOT
from sentences import ERRORS, FILE, LINES, SENTENCES, WARNINGS

PRODUCT = sorted(path for folder in ("fastsd", "kernels", "bench") for path in ROOT.glob(f"{folder}/**/*.py"))
FILES = [*PRODUCT, *sorted(ROOT.glob("tests/**/*.py")), *sorted(ROOT.glob("examples/*.py"))]
# Pronouns and participles that leave open what a variable holds.
BANNED = {
    "found", "said", "own", "which", "what", "each", "asked", "given", "wanted", "here", "where", "of", "known", "theirs",
    "told", "apart", "one", "made",
}  # fmt: skip
# Words that stood for several things. docs/glossary.md has one for each.
HOMONYMS = {"part", "parts", "pieces", "noised", "contender", "peer", "micro", "told", "misses", "bad"}
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
    in_house = path.is_relative_to(ROOT / "fastsd") or path.is_relative_to(ROOT / "kernels")
    assert not names_bound(tree) & (BANNED | HOMONYMS if in_house else BANNED)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = re.sub(r"^Floor [\d.]+: ", "", ast.get_docstring(node) or "")
            assert not RIDDLE.match(docstring), docstring.splitlines()[0]


def test_a_riddle_is_refused():
    tree = ast.parse("def f(given):\n    for own in given: pass\n    return lambda each: each")
    assert names_bound(tree) & BANNED == {"given", "own", "each"}
    assert RIDDLE.match("What the figures amount to.") and not RIDDLE.match("Return what is left.")


def is_table(line: int, tree: ast.AST) -> bool:
    """Return True if a bracket that closes on a line belongs to a literal, or to the operands of a kernel."""
    closing = [node for node in ast.walk(tree) if getattr(node, "end_lineno", 0) == line and node.lineno < line]
    if any(isinstance(node, ast.Dict | ast.List | ast.Tuple | ast.Set) for node in closing):
        return True
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.lineno < line < node.body[0].lineno
    ]
    return any(
        ast.unparse(decorator).startswith("triton.jit") for function in functions for decorator in function.decorator_list
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_tables_are_laid_out_by_hand(path):
    text = path.read_text()
    tree, lines = ast.parse(text), text.splitlines()
    for number, line in enumerate(lines, start=1):
        if line.endswith("# fmt: skip"):
            assert is_table(number, tree), f"{path}:{number}"
        elif line == "# fmt: off":
            (node,) = [node for node in tree.body if node.lineno == number + 1]
            assert isinstance(node, ast.Assign | ast.AnnAssign | ast.ClassDef), f"{path}:{number}"


def test_a_call_laid_out_by_hand_is_refused():
    text = "x = f(\n    1, 2,\n)  # fmt: skip\ny = [\n    1, 2,\n]  # fmt: skip"
    assert not is_table(3, ast.parse(text)) and is_table(6, ast.parse(text))


def decimal_sizes(text: str) -> list[str]:
    """Return the sizes in decimal units. Bandwidths have them, and so have the names of cards and SSDs in shops."""
    return re.findall(r"(?<!12 )(?<!16 )(?<!24 )(?<!\+)\b[KMG]B\b(?!/s|\?)", text)


def test_sizes_have_binary_units():
    """`nvidia-smi`, `df -h` and PyTorch count in MiB and GiB, so all sizes that users read are comparable with theirs."""
    code = [(path, line) for path in ROOT.glob("fastsd/**/*.py") for line in path.read_text().splitlines() if '"' in line]
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("configs/*"), ROOT / "README.md"]
    prose = [(path, line) for path in pages for line in path.read_text().splitlines()]
    assert not [(path.name, line) for path, line in code + prose if decimal_sizes(line)]


def test_a_decimal_size_is_refused():
    assert decimal_sizes("takes 6.9 GB") and decimal_sizes('f"{x:.1f} GB free"') and decimal_sizes('"peak GB", "waits"')
    assert not decimal_sizes("a 24 GB card reads 1008 GB/s") and not decimal_sizes("9.6 GiB")


def literal_texts(argument: ast.expr) -> list[str]:
    """Return the constant parts of a message."""
    values = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
    return [value.value for value in values if isinstance(value, ast.Constant)]


def test_every_error_has_a_code_and_its_sentence():
    codes = set()
    for path in PRODUCT:
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
    assert len(SENTENCES) == len(ERRORS) + len(LINES) + len(WARNINGS)
    assert all("-" in name for name in SENTENCES)  # no word that also stands for something else


def test_warnings_and_no_other_lines_have_their_word():
    """`Console.warn` writes it. What it gets is a sentence of no other table, and its sentences are written by nothing else."""
    tables = {"warn": (WARNINGS, ERRORS | LINES), "echo": (LINES, WARNINGS)}
    checked = 0
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") not in tables or not node.args:
                continue
            texts = [text for text in literal_texts(node.args[0]) if re.search(r"\w{3}.*\w{3}", str(text))]
            sentence = re.compile(".*?".join(map(re.escape, texts)))
            right, wrong = (
                [name for name, text in table.items() if texts and sentence.search(text)] for table in tables[node.func.attr]
            )
            assert not wrong or right, f"{path}:{node.lineno}: {wrong}"
            checked += bool(right)
    assert checked > 40
    for name, text in SENTENCES.items():
        assert not re.match(r"(?i)(warning|note|caution)\b|!", text), f"{name}: the word is not part of a sentence"


def test_a_test_looks_for_every_sentence():
    tests = "".join(path.read_text() for path in FILES if path.is_relative_to(ROOT / "tests"))
    missing = [name for name in SENTENCES if f'"{name}"' not in tests and f"'{name}'" not in tests]
    assert not missing, "a refusal that no test meets may vanish unnoticed; write its test, or remove a line nobody looks for"
