"""What a checkpoint lacks or has too much: one line, wherever a model is loaded."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_cod import factorize, quantize
from hf_cod.cli.main import main
from hf_cod.io.models import load_model
from hf_cod.models import to_lns
from tests.tiny_models import batch_for, build, outputs
from tests.tiny_tokenizers import gpt_like

TEXT = "one two three four five six seven eight nine ten " * 40


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def change_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def of_layer(weights, index):
    return sorted(name for name in weights if re.search(rf"(layers|layer|h)\.{index}\.", name))


def without_layer(weights):
    for name in of_layer(weights, 2):
        del weights[name]


def without_one(weights):
    del weights[of_layer(weights, 1)[0]]


def with_one_more_layer(weights):
    weights |= {name.replace("3", "4", 1): weights[name].clone() for name in of_layer(weights, 3)}


def of_another_shape(weights):
    weights[of_layer(weights, 1)[0]] = torch.zeros(3, 5)


def with_a_bias_in_the_head(weights):
    weights["lm_head.bias"] = torch.ones(99)


DAMAGES = {
    without_layer: r"\d+ missing: \S+\.2\.\S+, \S+\.2\.\S+, \S+\.2\.\S+, \.\.\.$",
    without_one: r"1 missing: \S+\.1\.\S+$",
    with_one_more_layer: r"\d+ unexpected: \S+\.4\.\S+, \S+\.4\.\S+, \S+\.4\.\S+, \.\.\.$",
    of_another_shape: r"1 of another shape: \S+\.1\.\S+ \(3, 5\) for \(.*\)$",
}


@pytest.mark.parametrize("headless", [False, True], ids=["head", "headless"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_a_damaged_checkpoint_is_an_error(family, damage, headless, tmp_path):
    model = build(family)
    (model.base_model if headless else model).save_pretrained(tmp_path)
    change_weights(tmp_path, damage)
    told = (
        rf"^model: expected a checkpoint of all weights of {'' if headless else type(model).__name__}.* and no others"
    )
    with pytest.raises(ValueError, match=rf"{told}, got in '.*' .*{DAMAGES[damage]}") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("headless", [False, True], ids=["head", "headless"])
@pytest.mark.parametrize("dtype, stored", [(torch.int64, "I64"), (torch.bool, "BOOL")])
def test_weights_that_were_stored_as_whole_numbers(dtype, stored, headless, tmp_path):
    model = build("llama")
    (model.base_model if headless else model).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({of_layer(weights, 1)[1]: torch.ones(32, 48, dtype=dtype)}))
    with pytest.raises(ValueError, match=rf"^model: expected floating-point numbers as \S+\.mlp\.\S+, got {stored} in"):
        load_model(str(tmp_path))


def test_codes_that_were_stored_as_floating_point_numbers(tmp_path):
    model = build("llama")
    quantize(model, bits=4, block=32)
    model.save_pretrained(tmp_path)

    def as_floats(weights):
        name = next(name for name in weights if weights[name].dtype == torch.uint8)
        weights[name] = weights[name].float() + 0.5

    change_weights(tmp_path, as_floats)
    with pytest.raises(ValueError, match=r"^model: expected whole numbers as \S+, got F32 in"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_floating_point_dtype_load(dtype, tmp_path):
    build("llama").to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    assert load_model(str(tmp_path))[0].dtype == dtype


def test_an_expert_that_is_missing_and_one_of_another_shape(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    name = next(
        name for name in load_file(tmp_path / "model.safetensors") if ".1.w1." in name or ".1.down_proj" in name
    )
    change_weights(tmp_path, lambda weights: weights.update({name: torch.zeros(3, 5)}))
    for damage in (lambda weights: None, lambda weights: weights.pop(name)):
        change_weights(tmp_path, damage)
        with pytest.raises(ValueError, match=r"^model: expected .*weights of MixtralForCausalLM") as error:
            load_model(str(tmp_path))
        assert "\n" not in str(error.value)


def test_a_tensor_that_the_head_lacks(tmp_path):
    build("llama").save_pretrained(tmp_path)
    change_weights(tmp_path, with_a_bias_in_the_head)
    with pytest.raises(ValueError, match=r"1 unexpected: lm_head\.bias$"):
        load_model(str(tmp_path))


SHAPES = {
    "an entry deleted": (lambda shapes: shapes.pop(min(shapes)), "1 missing: .*; 2 unexpected"),
    "an entry of null": (
        lambda shapes: shapes.update({min(shapes): None}),
        "module_shapes: expected sizes .* got None",
    ),
    "all deleted": (lambda shapes: shapes.clear(), r"28 missing: .*; 56 unexpected"),
    "another rank": (lambda shapes: shapes.update({min(shapes): {"rank": 3}}), r"2 of another shape"),
}


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thin")
    model = build("llama")
    factorize(model, 0.7, "plain")
    model.save_pretrained(folder)
    gpt_like().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def damaged(thin, tmp_path):
    """A copy of the factorized model to damage."""
    for file in thin.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("what", SHAPES)
def test_shapes_that_do_not_fit_the_weights(what, damaged):
    change, message = SHAPES[what]
    change_config(damaged, lambda config: change(config["module_shapes"]))
    with pytest.raises(ValueError, match=rf"^model: expected .*{message}"):
        load_model(str(damaged))


@pytest.mark.parametrize("shapes", [None, [1]])
def test_no_shapes_at_all(shapes, damaged):
    change_config(damaged, lambda config: config.update(module_shapes=shapes))
    with pytest.raises(ValueError, match=r"^model: expected .*(missing|module_shapes: expected sizes by name)"):
        load_model(str(damaged))


@pytest.mark.parametrize("command", ["diagnose", "prune", "quantize"])
@pytest.mark.parametrize("damage", ["shapes", "layer"])
def test_commands_end_with_one_line_and_write_nothing(command, damage, damaged, capsys):
    if damage == "shapes":
        change_config(damaged, lambda config: SHAPES["an entry deleted"][0](config["module_shapes"]))
    else:
        change_weights(damaged, without_layer)
    quick = ["--sequence-length", "8", "--max-samples", "4", "--no-plots", "--text", str(damaged / "text.txt")]
    assert main([command, str(damaged), "--output", str(damaged / "run"), *quick]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith(f"hf-cod {command}: error: model: expected a checkpoint of all")
    assert not (damaged / "run").exists()


def test_quantized_models_are_checked_too(tmp_path):
    model = build("llama")
    quantize(model, bits=4, block=32)
    model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[0].is_quantized
    change_weights(tmp_path, lambda weights: weights.pop("model.layers.2.input_layernorm.weight"))
    with pytest.raises(ValueError, match=r"1 missing: model\.layers\.2\.input_layernorm\.weight"):
        load_model(str(tmp_path))


def test_conversion_names_weights_of_another_shape(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    change_weights(tmp_path / "model", of_another_shape)
    with pytest.raises(ValueError, match=r"source: expected exactly the weights .*\[3, 5\]"):
        to_lns(tmp_path / "model")


def test_heads_of_other_tasks_are_told_and_ignored(tmp_path, caplog):
    model = build("bert")
    model.save_pretrained(tmp_path)
    more = ("cls.seq_relationship.weight", "bert.pooler.dense.weight", "bert.pooler.dense.bias")
    change_weights(tmp_path, lambda weights: weights.update({name: torch.zeros(2) for name in more}))
    with caplog.at_level(logging.WARNING):
        loaded, _ = load_model(str(tmp_path))
    assert torch.equal(outputs(loaded, batch_for(model)), outputs(model))
    assert "BertForMaskedLM ignores weights of other heads in the checkpoint: 3 tensors: bert.pooler" in caplog.text


@pytest.mark.parametrize("family", ["gpt2", "llama_tied"])
def test_a_layer_too_many_is_refused_also_without_the_prefix_of_a_head(family, tmp_path):
    """A tied model may be saved without its head, so that no name has the prefix."""
    model = build(family)
    model.base_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(load_model(str(tmp_path))[0]) is type(model)
    counted = "n_layer" if "n_layer" in config else "num_hidden_layers"
    (tmp_path / "config.json").write_text(json.dumps({**config, counted: config[counted] - 1}))
    with pytest.raises(ValueError, match=r"expected .*weights"):
        load_model(str(tmp_path))


def test_a_pooler_that_nobody_trained_is_left_out(tmp_path):
    """It would be drawn at random, and be saved with the model."""
    model = build("bert")
    model.bert.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path))
    assert type(loaded).__name__ == "BertModel" and loaded.pooler is None
    assert torch.equal(outputs(loaded, batch_for(model)), outputs(model.bert))
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == model.bert.state_dict().keys()


def test_a_missing_bias_of_a_head_is_zero(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("cls.predictions.bias"))
    loaded, _ = load_model(str(tmp_path))
    assert not loaded.cls.predictions.bias.any()
    change_weights(tmp_path, lambda weights: weights.pop("cls.predictions.transform.dense.weight"))
    with pytest.raises(ValueError, match=r"1 missing: cls\.predictions\.transform\.dense\.weight"):
        load_model(str(tmp_path))
