"""Licence and base of a model that another one is made from."""

import pytest
from huggingface_hub import ModelCard

from hf_cod import RunReport
from hf_cod.io.models import embedded_model
from hf_cod.reporting.inherited import Inherited, inherited
from hf_cod.reporting.result_card import result_card
from hf_cod.reporting.settings import CardSettings
from tests.tiny_models import build

BASE = "base_model: someone/theirs"


@pytest.mark.parametrize(
    "header, expected",
    [
        (f"license: apache-2.0\n{BASE}", Inherited("apache-2.0", "someone/theirs")),
        ("license: other", Inherited()),
        ("license: [mit]\nbase_model: [a, b]", Inherited()),
        ("license: 'a licence | with markup'\nbase_model: /home/me/model", Inherited()),
        ("license: !!python/object/apply:os.getcwd []", Inherited()),
        ("license: {", Inherited()),
        ("- a list", Inherited()),
    ],
)
def test_only_what_a_card_may_say_is_taken(header, expected, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# theirs\n")
    assert inherited(str(tmp_path)) == expected


def test_without_a_card_there_is_nothing(tmp_path):
    assert inherited(str(tmp_path)) == inherited("someone/theirs") == Inherited()


def test_the_licence_goes_from_card_to_card(tmp_path):
    """From the embedded model, which is named by its path in the repository, to all that is made of it."""
    source = embedded_model("pre")
    for number in range(2):
        made = tmp_path / str(number)
        build("llama").save_pretrained(made)
        report = RunReport("finetune", "pre", {"model": source}, {"torch": "2"}, {}, {})
        card = result_card(made, report, made.name, None)
        card.save(made / "README.md")
        assert ModelCard.load(made / "README.md").data.license == "cc-by-sa-4.0"
        shown = "hf_cod/assets/pair/pre" if number == 0 else "0"
        assert f"The licence of {shown} is cc-by-sa-4.0." in card.text
        source = str(made)
    named = result_card(made, report, "1", None, CardSettings(license="mit"))
    assert named.data.license == "mit", "the user knows better"
