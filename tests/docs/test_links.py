"""What pages name is there: files of the repository, pages, commands. mkdocs checks anchors and links between pages."""

import ast
import re

import pytest
import yaml

import hf_cod
from hf_cod.cli.main import COMMANDS
from tests.docs.pages import DOCS, NAMES, ROOT, read

FILES = r"(?<![\w/.-])((?:hf_cod|examples|tests|docs|model_cards|\.ci|\.github)/[\w./-]*[\w/])"
GENERATED = {"reference/cli.md", "contributing.md", "changelog.md"}


@pytest.mark.parametrize("page", NAMES)
def test_files_that_are_named_exist(page):
    for name in re.findall(FILES, read(page)):
        assert "NAME" in name or (ROOT / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere_in_a_clone(page):
    """Also where nobody has built the site: none leads to a generated page."""
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)", read(page)):
        assert ((ROOT / page).parent / link).exists(), link


def test_every_page_is_in_the_navigation_and_every_command_has_one():
    """mkdocs says so, too, where it is installed."""

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in pages(each)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert written | GENERATED == {page for page in listed if not page.startswith("reference/api/")}
    assert {f"how-to/{command}.md" for command in COMMANDS} <= set(listed)
    index = (DOCS / "how-to/index.md").read_text(encoding="utf-8")
    assert all(f"]({command}.md)" in index for command in COMMANDS)


def test_the_site_needs_no_network():
    """Fonts, scripts and styles are those that the theme carries."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript", "extra"}.intersection(config)
    assert [next(iter(p)) if isinstance(p, dict) else p for p in config["plugins"]] == [
        "search",
        "gen-files",
        "mkdocstrings",
    ]


def test_the_pages_of_the_api_are_those_of_the_generator():
    tree = ast.parse((DOCS / "generate.py").read_text(encoding="utf-8"))
    assigned = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    rooms = ast.literal_eval(assigned["ROOMS"])
    assert {home.partition(".")[0] for home in hf_cod._HOMES.values()} == rooms.keys()
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"reference/api/(\w+)\.md", nav)) == {*rooms, "index"}


# Figures that say what a format is, not what was measured.
DEFINITIONS = {"3.127", "4.127"}


def test_a_figure_stands_once():
    """What was measured stands on the benchmark pages; only README's highlights cite it."""
    figure = r"(?<![\d.,v/])\d+\.\d+(?![\d.]|%| MB)|(?<![\d.,])\d{1,3},\d{3}(?!\d)"
    measured, places = {}, {}
    for page in NAMES:
        found = {number for number in re.findall(figure, read(page)) if len(re.sub(r"\D", "", number)) >= 4}
        places[page] = found - DEFINITIONS
        if "benchmarks/" in page:
            measured[page] = places[page]
    known = set().union(*measured.values())
    assert len(known) > 150
    for page in NAMES:
        if "benchmarks/" not in page and page != "README.md":
            assert not places[page] & known, page
