import inspect

import pytest

from hf_cod import DiagnoseSettings, collect_statistics, find_decoder_layers, prune
from hf_cod.io.stack_argument import takes_stack
from hf_cod.layers.stack import DecoderLayers
from tests.tiny_models import build_encoder_decoder


def test_a_stack_stands_in_signature_and_documentation_of_what_takes_a_path():
    for function in (find_decoder_layers, collect_statistics, prune):
        assert inspect.signature(function).parameters["stack"].default is None
        assert "        stack: instead of layers_path: " in function.__doc__
    assert not takes_stack(inspect.signature(DecoderLayers)), "of data that have a path it is no choice"
    assert DiagnoseSettings(stack="encoder") == DiagnoseSettings(layers_path="encoder")


def test_bad_stacks_are_refused_in_one_line():
    model = build_encoder_decoder("bart")
    with pytest.raises(ValueError, match=r"^stack: expected none with layers_path 'model\.decoder\.layers', got 'en"):
        find_decoder_layers(model, layers_path="model.decoder.layers", stack="encoder")
    with pytest.raises(ValueError, match=r"^stack: expected a string or None, got int$"):
        find_decoder_layers(model, stack=3)
    with pytest.raises(ValueError, match=r"^stack: expected one of 'encoder' \(model\.encoder\.layers, 4 layers\), 'd"):
        find_decoder_layers(model, stack="vision")
    with pytest.raises(ValueError, match=r"^find_decoder_layers: did you mean stack\?"):
        find_decoder_layers(model, stak="encoder")
