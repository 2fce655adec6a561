import pytest
from torch import nn

from hf_cod import LayerScores, OwlBnbConfig, allocate, find_decoder_layers, quantize
from hf_cod.compression.quantization.plan import plan_bits, plan_of
from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.compression.quantization.widths import stored_bits
from tests.compression.quantization.matrices import llama, quantized
from tests.tiny_models import build

LAYERS = 4


def scores(values, parameters=36_864):
    return LayerScores("tiny", "made up", values, [parameters] * len(values))


def allocation():
    return allocate(scores([1.0, 2.0, 3.0, 4.0]), "bits", 3.5)


def plan(model, bits, *args, **settings):
    return plan_bits(find_decoder_layers(model), bits, StorageSettings(**settings), *args)


def layer_bits(found):
    """The set of widths in each layer."""
    return [{b for name, b in found.bits.items() if f".layers.{i}." in name} for i in range(LAYERS)]


def test_the_layers_with_the_highest_scores_get_four_bits():
    model = llama()
    found = plan(model, 3.64, scores([0.1, 5.0, -1.0, 2.0]))
    assert layer_bits(found) == [{3}, {4}, {3}, {4}]
    assert found.stored <= 3.64 and len(found.bits) == 7 * LAYERS and not found.left


def test_earlier_layers_come_first_among_equals():
    for given in ([], [scores([1.0] * LAYERS)]):
        assert layer_bits(plan(llama(), 3.64, *given)) == [{4}, {4}, {3}, {3}]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block", [32, 64])
def test_stored_bits_are_those_of_the_tensors(block, double_quant):
    storage = StorageSettings(block=block, double_quant=double_quant)
    for size in ((64, 128), (37, 70), (3, 12)):
        for bits in (3, 4):
            state = quantized(size, bits, bias=False, block=block, double_quant=double_quant).state_dict()
            assert stored_bits(size, bits, storage) == 8 * sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize("bits", [3, 3.2, 3.5, 3.77, 4])
def test_the_budget_is_met_within_one_matrix(bits):
    model = build("llama", hidden_size=128, intermediate_size=256, layers=12)
    found = plan(model, bits)
    if bits in (3, 4):
        assert set(found.bits.values()) == {bits}
    else:
        assert bits - 0.1 < found.stored <= bits  # one of 12 layers' larger matrices is 0.02 to 0.03 bits


def test_one_layer():
    found = plan(build("llama", layers=1, hidden_size=64, intermediate_size=128), 3.5)
    assert set(found.bits.values()) == {3, 4} and found.stored <= 3.5


@pytest.mark.parametrize("bits", [2.9, 0, -1, float("nan"), float("inf")])
def test_bits_that_cannot_be_meant(bits):
    with pytest.raises(ValueError, match=r"bits: expected (3, 4, or stored bits between them|a finite number)"):
        OwlBnbConfig(bits=bits)


def test_a_budget_below_that_of_padded_rows_comes_with_a_way_out():
    model = build("llama", hidden_size=96, intermediate_size=96)
    way = "rows are padded to a multiple of block 64: set bits 3, the smallest size, or set block 32, with which 3.5"
    with pytest.raises(ValueError, match=rf"got 3.5; {way} can be reached$"):
        plan_bits(model, 3.5)
    assert {*plan_bits(model, 3).bits.values()} == {3} and plan_bits(model, 3.5, block=32).stored <= 3.5
    with pytest.raises(ValueError, match=r"got 3.5; rows are padded .*: set bits 3, the smallest size$"):
        plan_bits(build("llama", hidden_size=40, intermediate_size=40), 3.5)


def test_bits_out_of_reach():
    with pytest.raises(ValueError, match=r"bits: expected 3, 4, or 3\.1\d\d to 4\.1\d\d stored bits .*, got 4.7"):
        quantize(llama(), OwlBnbConfig(bits=4.7))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"bits": 8}, r"bits: expected 3, 4, or stored bits .* from 3\.13 to 4\.13 .*, got 8"),
        (
            {"bits": 3.3, "double_quant": False},
            r"bits: expected 3, 4, or stored bits .* from 3\.50 to 4\.50 .*, got 3\.3",
        ),
        ({"bits": 3.3, "allocation": allocation()}, r"bits: expected none with an allocation, .*, got 3\.3"),
        ({"scores": scores([1.0] * LAYERS), "allocation": allocation()}, "scores: expected none with an allocation"),
        ({"bits": 3, "scores": scores([1.0] * LAYERS)}, "scores: expected none with bits 3, which uses no scores"),
        ({"scores": {}}, "scores: expected LayerScores or a file of scores, got dict"),
        ({"allocation": [3, 4]}, "allocation: expected LayerAllocation or a file of allocation, got a list of int"),
        ({"statistics": 5}, "statistics: expected LayerStatistics or a file of statistics, got 5"),
    ],
)
def test_settings_without_an_effect_are_refused_when_they_are_given(given, message):
    with pytest.raises(ValueError, match=message):
        OwlBnbConfig(**given)


def test_stored_bits_of_padded_rows_load():
    assert OwlBnbConfig(bits=12.5, modules={"layers.0.up_proj": 3}).bits == 12.5


def test_scores_of_another_model():
    with pytest.raises(ValueError, match="scores: expected 4 values, one a layer, got 3"):
        plan(llama(), 3.5, scores([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match=r"scores: expected .* with 36,864 weights in layer 0, got 9 .tiny"):
        plan(llama(), 3.5, scores([1.0] * LAYERS, parameters=9))


def test_what_is_left_is_named():
    model = llama()
    model.model.layers[1].mlp.up_proj = nn.Identity()
    model.model.layers[2].mlp.up_proj = model.model.layers[3].mlp.up_proj
    model.model.layers[0].self_attn.k_proj = nn.Linear(64, 0)
    found = plan(model, 3, None, ["o_proj", "layers.3.mlp.down"])
    layers = "model.layers"
    shared = {f"{layers}.{i}.mlp.up_proj": "it shares its weight with another module" for i in (2, 3)}
    skipped = {f"{layers}.{i}.self_attn.o_proj": "skipped" for i in range(4)}
    assert found.left == {
        f"{layers}.0.self_attn.k_proj": "it has no weights",
        **shared,
        **skipped,
        f"{layers}.3.mlp.down_proj": "skipped",
    }
    with pytest.raises(ValueError, match="model: expected a Linear in the layers that can be quantized, got none"):
        plan(model, 3, None, ["layers"])


def test_a_plan_by_name():
    stack = find_decoder_layers(llama())
    name = "model.layers.2.mlp.up_proj"
    found = plan_of(stack, {name: 4}, StorageSettings())
    assert found.bits == {name: 4} and found.sizes == {name: (128, 64)} and 4.12 < found.stored < 4.14
    with pytest.raises(ValueError, match=r"bits: expected names of the layers' matrices, got 'lm_head': unknown"):
        plan_of(stack, {"lm_head": 4}, StorageSettings())
    with pytest.raises(ValueError, match=r"bits: expected 3 or 4, got 2 for model.layers.2.mlp.up_proj"):
        plan_of(stack, {name: 2}, StorageSettings())
    with pytest.raises(ValueError, match="modules: expected 3 or 4 bits each, got"):
        OwlBnbConfig(modules={name: 5})


def test_settings():
    with pytest.raises(ValueError, match="block: expected one of 32, 64, 128, 256, got 48"):
        OwlBnbConfig(block=48)
    with pytest.raises(
        ValueError, match="compute_dtype: expected the name of a dtype such as bfloat16 or float32, got 'bf17'"
    ):
        OwlBnbConfig(compute_dtype="bf17")
    with pytest.raises(ValueError, match="statistics: expected a file of statistics, got 'nowhere'"):
        OwlBnbConfig(statistics="nowhere")
