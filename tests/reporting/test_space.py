import pytest
import yaml

from hf_cod.reporting.html.page import check_page
from hf_cod.reporting.space import CARD, INDEX, check_card, check_space_id, write_space
from tests.reporting.html.runs import HOSTILE, diagnosed


def test_a_space_is_a_static_page_with_its_card(tmp_path):
    write_space(tmp_path, [diagnosed(3, HOSTILE)], None, ["One sentence."])
    assert {path.name for path in tmp_path.iterdir()} == {INDEX, CARD}
    _, front, _ = (tmp_path / CARD).read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert (card["sdk"], card["app_file"]) == ("static", "index.html") and card["title"].startswith("Layers of ")
    check_page(tmp_path / INDEX)
    check_card(tmp_path / CARD)


def test_a_space_does_not_publish_paths(tmp_path):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    settings = {"text": "/home/me/texts/novel.txt", "more": ["~/secret/list.txt"], "rate": 0.5}
    made = diagnosed(3, str(tmp_path / "models" / "mine"), settings=settings)
    write_space(tmp_path / "space", [made], None, [])
    page = (tmp_path / "space" / INDEX).read_text(encoding="utf-8") + (tmp_path / "space" / CARD).read_text("utf-8")
    assert not [place for place in ("/home/me", "~/secret", str(tmp_path)) if place in page]
    assert '"text": "novel.txt", "more": ["list.txt"], "rate": 0.5' in page and 'title: "Layers of mine"' in page


@pytest.mark.parametrize("name", ["layers", "me/my/layers", "me/", "/me/layers", "me/lay ers", "../layers"])
def test_names_that_the_hub_does_not_allow(name):
    with pytest.raises(ValueError, match="space: expected USER/NAME of a Space on the Hub, got"):
        check_space_id(name)


def test_a_readme_of_others_is_not_a_card(tmp_path):
    (tmp_path / CARD).write_text("---\nsdk: gradio\n---\n")
    with pytest.raises(ValueError, match=r"expected README\.md of a Space of hf_cod"):
        check_card(tmp_path / CARD)
