"""Text of others in the model card never acts as markup, HTML, YAML or code. A Markdown parser reads it back."""

import ast
import unicodedata

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fastsd.model.formats.model_summary import Adapters, Change, Loss, ModelSummary, Samples, StageSummary
from fastsd.run.markdown import code, inline, link_or_code, one_line, python_string, table, yaml_string
from fastsd.run.model_card import write_card

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = [
    "<script>alert(1)</script>", "<!-- ", "<img src=x onerror=alert(1)>", "a\n\n# heading\n", "a\r\n---\r\nb", "| a | b |",
    "`code` ``` ~~~", "**bold** _em_ __b__ ~~s~~ ***", "[text](javascript:alert(1))", "![x](http://host/x.png)",
    "[ref]: http://x", "\\", "\\|", "\\`", "a\\", "&lt;b&gt; &amp; &#35; &", "# heading #", "- item", "+ item", "* item",
    "1. item", "1984) a", "> quote", "---", "===", "- - -", "\x1b[31mred\x1b[0m\x07", "a\u202eb\u2028c\u0085d", "\ud800",
    "$x^2$", "a_b_c",
    "snake_case = 1", "\tcode", '"quoted": [yaml, {a: b}] # comment', "'", "key: value", "...", "%YAML", "@a", "!tag", "null",
    "\N{GRINNING FACE} \u00e4\u6f22",
]  # fmt: skip


def text_of(tokens) -> str:
    return "".join(text_of(token.children) if token.children else token.content for token in tokens)


def parsed(markdown: str) -> str:
    """Return the text of a document. Its only block is the one that `markdown` opens with."""
    return text_of(PARSER.parse(markdown)).strip()


any_text = st.text(st.sampled_from("\\`*_[]()<>&|~$#+-=.!:1aB \n\t\x1b\u202e\u2028\ud800\"'/"), max_size=12)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_read_back(text):
    check_all(text)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(any_text)
def test_any_text_is_read_back(text):
    check_all(text)


def check_all(text: str) -> None:
    expected = one_line(text)
    assert not any(unicodedata.category(char) in ("Cc", "Cs") for char in expected)
    plain = [token.type for token in PARSER.parse("- a\n- b")]
    assert [token.type for token in PARSER.parse(f"- {inline(text) or 'a'}\n- b")] == plain
    assert parsed(f"# {inline(text)}") == parsed(f"by {inline(text)}.")[3:-1].strip() == expected
    grid = PARSER.parse(table(["a", "b"], [[inline(text), "x"], [inline(text) + "y", "z"]]))
    cells = [token.content for token in grid if token.type == "inline"]
    assert len(cells) == 6 and [parsed(f"# {cell}") for cell in cells[2:]] == [expected, "x", f"{expected}y", "z"]
    if expected:
        (span,) = [token for token in PARSER.parse(f"a {code(text)} b")[1].children if token.type == "code_inline"]
        assert span.content == expected
    assert yaml.safe_load(f"a: {yaml_string(text)}\nb: 1") == {"a": expected, "b": 1}
    literal = python_string(text)
    assert ast.literal_eval(literal) == text and literal.isprintable()


def test_only_hub_ids_are_links():
    assert link_or_code("owner/name_1.5") == "[owner/name_1.5](https://huggingface.co/owner/name_1.5)"
    for name in ("name", "a/b/c", "a/b)", "../b", "a/b\n", "javascript:a/b", "a /b"):
        assert link_or_code(name) == f"`{one_line(name)}`"


def summary(text: str, path: str) -> ModelSummary:
    stage = StageSummary(name=text, train=[text, text], optimizer=text, lr=1.0, precision=text, batch=1, settings={"a": text})
    stage = stage.model_copy(update={"changes": [Change(step=1, key=text, before=text, after=text)]})
    loss = Loss(set=text, weights=text, first_step=0, first=1, step=2, last=1, se=0.1)
    samples = Samples(step=1, prompts=[text, text], sampler=text, steps=1, guidance=1)
    texts = dict.fromkeys(("version", "title", "author", "license", "precision", "note"), text)
    lora = Adapters(rank=1, alpha=1, targets=[text])
    lists = {"stages": [stage], "settings": {"b": text}, "validation": [loss], "samples": samples, "lora": lora}
    return ModelSummary(**texts, **lists, base=path, vae=f"{path}2", date="2026-01-01", weights="raw")


@pytest.mark.parametrize("text", filter(one_line, HOSTILE))
def test_a_card_with_hostile_text_has_the_structure_of_any_other(text, tmp_path):
    (tmp_path / "samples.png").touch()

    def card(value: str, path: str, single: str) -> tuple[str, list[str]]:
        write_card(tmp_path, summary(value, path), single=single)
        _, front, body = (tmp_path / "README.md").read_text().split("---\n", 2)
        tokens = PARSER.parse(body)
        types = [token.type for token in tokens]
        types += [child.type for token in tokens for child in token.children or () if child.type != "text"]
        return yaml.safe_load(front), [name for name in types if name != "text_special"]

    plain_front, plain_types = card("plain", "path", "file.safetensors")
    front, types = card(text, text, f"{text}.safetensors")
    assert types == plain_types and "html_inline" not in types and "html_block" not in types
    assert front == plain_front | {"license": one_line(text)}
