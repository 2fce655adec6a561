"""The near-equal modeling files are what their template makes."""

from pathlib import Path

import pytest

import hf_cod.models
from hf_cod.models.templates import DECODERS, modeling_file


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
def test_files_are_what_the_template_makes(decoder):
    path = Path(hf_cod.models.__file__).parent / f"modeling_cod_{decoder.name}.py"
    assert path.read_text(encoding="utf-8") == modeling_file(decoder), "run python -m hf_cod.models.templates"
