import ast
import inspect
from pathlib import Path

import pytest

import hf_cod
import hf_cod.models


def test_every_public_name_is_there_and_documented():
    for name in hf_cod.__all__:
        thing = getattr(hf_cod, name)
        assert inspect.getdoc(thing), name
    assert hf_cod.__all__ == sorted(hf_cod.__all__)
    assert set(hf_cod.__all__) <= set(dir(hf_cod))


@pytest.mark.parametrize("package", [hf_cod, hf_cod.models])
def test_editors_see_what_is_imported_when_it_is_used(package):
    """The block for type checkers and the table of lazy names say the same."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    if package is hf_cod:
        assert {name: f"hf_cod.{home}" for name, home in hf_cod._HOMES.items()} == seen
    else:
        assert {name: file for file, names in hf_cod.models._NAMES.items() for name in names} == seen
    assert set(package.__all__) == seen.keys() - {"OwLoreConfig"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_cod' has no attribute 'prun'"):
        _ = hf_cod.prun
    with pytest.raises(AttributeError, match=r"module 'hf_cod\.models' has no attribute 'CodGpt'"):
        _ = hf_cod.models.CodGpt
