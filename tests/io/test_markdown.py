"""What others wrote is shown as it reads."""

import re

import pytest
from markdown_it import MarkdownIt

from hf_cod.io.markdown import escaped
from hf_cod.io.report import RunReport

ODD = [
    "<script>alert(1)</script>",
    "a | b",
    "[click](http://x.y)",
    "![x](http://x.y/z.png)",
    "*bold* and __bold__ and _it_ and `code`",
    "two\n# lines",
    "# heading",
    "- item",
    "1. item",
    "~~gone~~",
    "model.layers.0.mlp_x.weight",
    "a & b &lt; c",
    "\\*",
]


def text_of(tokens) -> str:
    return "".join(
        token.content if token.type == "text" else "" for inline in tokens for token in inline.children or []
    )


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("frame", ["- {}", "# {}", "| {} | x |\n|---|---|", "{}"])
def test_it_renders_as_it_reads(text, frame):
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    plain = {token.type for token in parser.parse(frame.format("word"))}
    tokens = parser.parse(frame.format(escaped(text)))
    assert {token.type for token in tokens} == plain
    kinds = {child.type for token in tokens for child in token.children or []}
    assert kinds <= {"text", "text_special"}
    shown = "".join(child.content for token in tokens for child in token.children or [])
    assert " ".join(text.split()) == shown.removesuffix("x" if frame.startswith("|") else "")


def test_names_of_a_report_make_no_markup():
    name = "<img src=x onerror=y> | [a](b)"
    report = RunReport("prune", name, {"text": name}, {"torch": name}, {name: [1.0]}, {}, [name], [name])
    html = MarkdownIt("commonmark").enable("table").render(report.to_markdown())
    assert "<img" not in html and "<a " not in html and len(re.findall("<th[ >]", html)) == 2
