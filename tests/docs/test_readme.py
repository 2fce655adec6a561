"""README is short, its first two bash blocks are what CI runs, and its highlights stand where it links to."""

import re
import tomllib

from tests.docs.pages import ROOT, blocks, read

README = read("README.md")


def test_it_is_read_in_ten_minutes():
    assert len(README.splitlines()) <= 220
    assert len(README.split()) <= 1500


def test_the_first_two_bash_blocks():
    """One command that sets up and runs the demo, and one that runs the tests, which .ci/run takes from here."""
    first, second = blocks(README, "bash")[:2]
    assert first.strip() == "pip install -q '.[all]' && hf-cod demo"
    assert second.startswith("pip install -q -e '.[test]' && ") and "pytest" in second


def test_a_package_index_shows_no_broken_picture_or_link():
    """As hatch-fancy-pypi-readme makes the description of pyproject.toml: only what lies beside README is taken out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "readme" in project["project"]["dynamic"]
    described = README
    for each in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        described = re.sub(each["pattern"], each["replacement"], described)
    links = r"\]\(([^)\s]+)\)"
    kept = re.findall(links, described)
    assert kept == [link for link in re.findall(links, README) if link.startswith(("https:", "#"))]
    assert "![" in README and "![" not in described and "see your model's layers, fine-tune on one" in described
    assert len(described.splitlines()) >= len(README.splitlines()) - 2


def test_the_highlights_stand_on_the_pages_that_they_link():
    table = README.split("## Highlights")[1].split("## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| [")]
    assert len(rows) == 5
    for what, figures, command in rows:
        page, anchor = re.search(r"\]\((docs/.*?\.md)#(.*?)\)", what).groups()
        text = read(page)
        anchors = {
            re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in re.findall("^#+ (.*)", text, re.M)
        }
        assert anchor in anchors, f"{page}#{anchor}"
        numbers = re.findall(r"\d+\.\d+", figures)
        assert len(numbers) >= 2 or "31 x" in figures
        for number in numbers:
            assert re.search(rf"(?<![\d.]){re.escape(number)}", text), f"{number} of {what} is not on {page}"
        script = re.search(r"examples/[\w/]+\.py|hf-cod demo", command).group()
        assert script == "hf-cod demo" or (ROOT / script).is_file()
