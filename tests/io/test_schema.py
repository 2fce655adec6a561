"""What config.json says of our formats, changed in any way: refused in one line, or what it says."""

import copy
import json
import re
import struct

import peft
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_cod import (
    DepthPlan,
    FitPlan,
    LayerStatistics,
    OwlBnbConfig,
    OwLoreConfig,
    RankPlan,
    SparseConfig,
    TrainingHistory,
    WidthPlan,
    apply_steps,
    drop_layers,
    factorize,
    narrow,
    pack_sparse,
    prune,
)
from hf_cod.layers.checks import sizes_of
from hf_cod.layers.stack import find_decoder_layers
from tests.io.mutations import mutated
from tests.io.test_reading import LONG
from tests.tiny_models import build

CONFIGS = {
    "quantized": OwlBnbConfig(bits=3.5, skip=["lm_head"], compute_dtype="bfloat16", modules={"layers.0.up": 3}),
    "packed": SparseConfig(min_sparsity=0.4, modules={"layers.0.up": 7}),
}


def check_refusal(error):
    assert re.match(r"\S[^\n]*: expected [^\n]*", str(error)) and "\n" not in str(error), str(error)
    assert str(error).isprintable() and len(str(error)) < 1000, str(error)


def parsed(raw):
    """What transformers reads of a config.json; None where that is its error, not ours."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


@pytest.mark.parametrize("examples", LONG)
@pytest.mark.parametrize("name", CONFIGS)
def test_quantization_configs(name, examples):
    whole = CONFIGS[name]

    @settings(max_examples=examples)
    @given(mutated(whole.to_dict()))
    def check(raw):
        content = parsed(raw)
        if not isinstance(content, dict):
            return
        try:
            found = type(whole).from_dict(copy.deepcopy(content))
        except ValueError as error:
            check_refusal(error)
            return
        told = found.to_dict()
        assert {key: told[key] for key in content} == content

    check()


def test_whole_ones_come_back():
    for whole in CONFIGS.values():
        assert type(whole).from_dict(whole.to_dict()).to_dict() == whole.to_dict()


@pytest.mark.parametrize("dtype", [torch.int8, "int8", "uint8", "float8_e4m3fn", "bool", "nn", "Tensor", 16, 1.0, []])
def test_dtypes_to_compute_in(dtype):
    with pytest.raises(ValueError, match=r"compute_dtype: expected the name of a dtype"):
        OwlBnbConfig(compute_dtype=dtype)


@pytest.mark.parametrize("examples", LONG)
def test_module_shapes(examples):
    """Built without memory for weights, as from_pretrained does: so a rank of terabytes would show here, too."""
    model = build("llama")
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    factorize(model, RankPlan("parameter_share", 0.9, dict.fromkeys(names, 3), "given"), "plain")
    config, most = model.config, sum(p.numel() for p in build("llama").parameters())

    @settings(max_examples=examples)
    @given(mutated(config.module_shapes))
    def check(raw):
        config.module_shapes = parsed(raw)
        try:
            with torch.device("meta"):
                made = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            check_refusal(error)
            return
        assert sum(p.numel() for p in made.parameters()) <= most

    check()


UP = "model.layers.0.mlp.up_proj"  # 48 x 32 weights


def shaped(number, folder, **sizes):
    """A config whose module has such a size, built as from_pretrained builds it."""
    model = build("llama")
    factorize(model, RankPlan("parameter_share", 0.9, {UP: 3}, "given"), "plain")
    model.config.module_shapes = {UP.removeprefix("model."): {"rank": 3, **dict.fromkeys(sizes, number)}}
    return AutoModelForCausalLM.from_config(model.config)


def numbered(number, folder):
    model = build("llama")
    narrow(model, WidthPlan(0.7, [2, 4, 4, 4], [16] * 4, "given"), "magnitude", "none")
    (name, told), *_ = ((n, s) for n, s in model.config.module_shapes.items() if not {"rank", "in_features"} & set(s))
    model.config.module_shapes = {name: dict.fromkeys(told, number)}
    return AutoModelForCausalLM.from_config(model.config)


def packed(number, folder, renamed=False):
    """With names in the file that are not the model's, the numbers are not compared with the file."""
    model = build("llama")
    prune(model, 0.7, "magnitude")
    pack_sparse(model).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"][UP] = number
    (folder / "config.json").write_text(json.dumps(config))
    if renamed:
        tensors = {f"other.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, key_mapping={r"^other\.": ""})


def adapter(number, folder, key, value):
    peft.get_peft_model(build("llama"), OwLoreConfig(r=4)).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, key: value(number)}))
    return peft.PeftModel.from_pretrained(build("llama"), folder)


def planned(plan, apply):
    """A plan for the model, from its file."""
    model = build("llama")

    def read(number, folder):
        made = plan(number, sizes_of(find_decoder_layers(model)))
        return apply(model, type(made).load(made.save(folder / "plan.json")))

    return read


def with_weights(function, *methods):
    """The function by methods that run the model on nothing."""
    return lambda model, plan: function(model, plan, *methods)


def statistics(number, folder):
    header = {f"squares/{UP}": {"dtype": "F64", "shape": [number], "data_offsets": [0, 8 * number]}}
    raw = json.dumps({**header, "__metadata__": {"format": "1", "model": "m", "path": "layers"}}).encode()
    (folder / "s.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(64))
    return LayerStatistics.load(folder / "s.safetensors")


def history(number, folder):
    header = {"format": 1, "model": "m", "layers": number, "settings": {}}
    (folder / "history.jsonl").write_text(json.dumps(header) + "\n")
    return TrainingHistory.load(folder)


def fitted(number, sizes):
    return FitPlan("bits", 5.0, {"rank": number}, 4.1, 4.0, {}, {}, [], [], [])


# What a size, rank or count is in -> (what reads it, what it says).
SIZED = {
    "rank of module_shapes": (
        lambda n, f: shaped(n, f, rank=0),
        r"module_shapes: expected a rank of .* up to 32, got \d",
    ),
    "in_features of module_shapes": (lambda n, f: shaped(n, f, in_features=0), "in_features of .* up to 32, got"),
    "out_features of module_shapes": (lambda n, f: shaped(n, f, out_features=0), "out_features of .* up to 48, got"),
    "numbers of module_shapes": (numbered, "module_shapes: expected .* up to"),
    "values of a packed matrix": (packed, r"up_proj: expected \d+ values as config.json says"),
    "values of a packed matrix of another name": (
        lambda n, f: packed(n, f, renamed=True),
        f"modules: expected at most 1536 stored weights of '{UP}', got",
    ),
    "rank of an adapter": (lambda n, f: adapter(n, f, "r", int), "r: expected at most 32, the width"),
    "columns of P": (lambda n, f: adapter(n, f, "held", lambda n: {UP: [n, 0]}), f"held: .* at most 32 .* {UP}, got"),
    "columns of B": (lambda n, f: adapter(n, f, "held", lambda n: {UP: [0, n]}), f"held: .* at most 32 .* {UP}, got"),
    "block of a 4-bit matrix": (lambda n, f: OwlBnbConfig(block=n), "block: expected one of 32, 64, 128, 256, got"),
    "rank of a plan": (
        planned(
            lambda n, sizes: RankPlan("parameter_share", 0.9, {UP: n}, "given", {}, "m", sizes),
            with_weights(factorize, "plain"),
        ),
        r"ranks: expected 1\.\.19 for",
    ),
    "heads of a plan": (
        planned(
            lambda n, sizes: WidthPlan(0.7, [n] * 4, [8] * 4, "given", "m", sizes),
            with_weights(narrow, "magnitude", "none"),
        ),
        "heads: expected a multiple of 2",
    ),
    "channels of a plan": (
        planned(
            lambda n, sizes: WidthPlan(0.7, [2] * 4, [n] * 4, "given", "m", sizes),
            with_weights(narrow, "magnitude", "none"),
        ),
        r"channels: expected 1\.\.48 in layer 0",
    ),
    "layers of a plan": (
        planned(lambda n, sizes: DepthPlan("m", "given", [n], sizes, [0.5] * 4, [], {}, "given"), drop_layers),
        "layers: expected",
    ),
    "step of a plan": (planned(fitted, lambda model, plan: apply_steps(model, plan.steps)), ": expected"),
    "sums of statistics": (statistics, "statistics: expected a file of statistics"),
    "layers of a history": (history, r"layers: expected a whole number in 1\.\.100000, got"),
}


@pytest.mark.parametrize("number", [10**9, 10**13, 10**30])
@pytest.mark.parametrize("place", SIZED)
def test_a_number_that_asks_for_terabytes_is_refused(place, number, tmp_path):
    """In one line of ours, which no failed allocation gives."""
    read, told = SIZED[place]
    with pytest.raises(ValueError, match=told) as error:
        read(number, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("held", [{UP: 4}, {UP: [4]}, {UP: [4, "4"]}, {UP: [4, -1]}, {"../up": [4, 4]}, [UP]])
def test_columns_of_an_adapter_of_another_kind(held, tmp_path):
    with pytest.raises(ValueError, match=r"^held.*: expected .*, got "):
        adapter(held, tmp_path, "held", lambda given: given)
