"""A damaged config.json or tokenizer: an error that names field and file, and no traceback of transformers."""

import json

import pytest

from hf_cod.io.model_config import building
from hf_cod.io.models import load_config, load_model
from hf_cod.models import fold_lns, to_lns
from hf_cod.reporting.loading import loading_of
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

# Changed entries of config.json -> start of the error.
CHECKED = {
    "architectures[0]: expected text, got 5": {"architectures": [5]},
    "architectures: expected a list, got 'x'": {"architectures": "x"},
    "model_type: expected text, got 5": {"model_type": 5},
    "auto_map: expected named entries, got 5": {"auto_map": 5},
    "auto_map['AutoConfig']: expected a list, got 5": {"auto_map": {"AutoConfig": 5}},
    "quantization_config: expected named entries, got []": {"quantization_config": []},
}
# Changed entries -> what transformers raises.
BUILT = {
    "StrictDataclassFieldValidationError": {"num_hidden_layers": "x"},
    "StrictDataclassFieldValidationError ": {"hidden_size": None},
    "ZeroDivisionError": {"num_attention_heads": 0},
    "AttributeError": {"dtype": "x"},
}
WHOLE = {
    "model: expected named entries, got [1]": "[1]",
    "model: expected named entries, got None": "null",
    "model: expected JSON, got other text: ": "{",
    "model: expected each name once, got 'a' twice": '{"a": 1, "a": 1}',
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    build("llama").save_pretrained(folder)
    gpt_like().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(checkpoint):
    """Writes another text to a file of the checkpoint, until the end of the test."""
    before = {path: path.read_text() for path in checkpoint.glob("*.json")}

    def change(text, name="config.json"):
        (checkpoint / name).write_text(text)
        return str(checkpoint)

    yield change
    for path, text in before.items():
        path.write_text(text)


def with_entries(checkpoint, entries):
    return json.dumps({**json.loads((checkpoint / "config.json").read_text()), **entries})


def check_names_the_file(error, start, checkpoint):
    assert str(error.value).startswith(start) and f"in {str(checkpoint / 'config.json')!r}" in str(error.value)


@pytest.mark.parametrize("start", CHECKED)
def test_entries_that_are_checked_before_transformers_reads_them(start, checkpoint, changed):
    source = changed(with_entries(checkpoint, CHECKED[start]))
    for read in (load_model, load_config, lambda name: loading_of(name, "x")):
        with pytest.raises(ValueError, match=r"expected") as error:
            read(source)
        check_names_the_file(error, start, checkpoint)


@pytest.mark.parametrize("kind", BUILT)
def test_errors_of_building_a_config(kind, checkpoint, changed):
    source = changed(with_entries(checkpoint, BUILT[kind]))
    for read in (load_model, load_config):
        with pytest.raises(ValueError, match=r"expected") as error:
            read(source)
        check_names_the_file(
            error, f"model: expected a config that transformers can build, got {kind.strip()}", checkpoint
        )
    for convert in (to_lns, fold_lns):
        with pytest.raises(ValueError, match=f"source: expected a config .*, got {kind.strip()} in "):
            convert(source)


@pytest.mark.parametrize("start", WHOLE)
def test_files_that_are_no_config(start, checkpoint, changed):
    source = changed(WHOLE[start])
    for read in (load_model, load_config, lambda name: loading_of(name, "x")):
        with pytest.raises(ValueError, match=r"expected") as error:
            read(source)
        check_names_the_file(error, start, checkpoint)


def test_errors_of_building_a_model(checkpoint, changed):
    source = changed(with_entries(checkpoint, {"hidden_act": "nope"}))
    with pytest.raises(
        ValueError, match=r"model: expected a config and weights .*, got KeyError in .*: 'nope'"
    ) as error:
        load_model(source)
    assert repr(source) in str(error.value)


def test_infinity_and_the_number_of_no_limit_are_accepted(checkpoint, changed):
    source = changed(with_entries(checkpoint, {"limits": [0.0, float("inf")], "model_max_length": int(1e30)}))
    assert load_config(source).model_max_length == int(1e30)


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match="ours"), building("x", "y"):
        raise RuntimeError("ours")


@pytest.mark.parametrize("content", [{"base_model_name_or_path": 5}, {"auto_mapping": []}, [1]])
def test_a_damaged_adapter_config(content, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"expected .*, got .* in .*adapter_config\.json"):
        loading_of(tmp_path, "x")
