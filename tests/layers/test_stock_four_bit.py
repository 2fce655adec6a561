"""bitsandbytes' own 4-bit layers, repacked on any processor as its forward pass does on those with AVX512-BF16."""

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu as repack
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_cod import OwLoreAdamW, OwLoreConfig, OwLoreSettings, diagnose, find_decoder_layers, perplexity, score_layers
from hf_cod.analysis.diagnostics.gradients import measure_gradient_norm
from hf_cod.analysis.monitoring.monitor import LayerMonitor
from hf_cod.layers.finished_layers import fingerprint_of_work
from hf_cod.layers.speed import measure_speed
from hf_cod.layers.stock_four_bit import keep_unpacked
from hf_cod.training.healing.recovery import recover
from hf_cod.training.runs.methods import set_up
from tests.tiny_models import build

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    build("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


@pytest.fixture
def load(checkpoint):
    def load(nested=False, dtype=torch.bfloat16, path=checkpoint, **settings):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=torch.float32,
            **settings,
        )
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype)
        for layer in layers(model).values():  # as on a processor without AVX512-BF16
            layer.support_avx512bf16_for_cpu = False
        return model

    return load


def layers(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "support_avx512bf16_for_cpu")}


def repacked(model):
    """After a forward pass in eval mode, as it leaves the model on such a processor."""
    for layer in layers(model).values():
        layer.support_avx512bf16_for_cpu = True
        layer.weight.data, layer.weight.quant_state = repack(layer.weight.data, layer.weight.quant_state)
    return model


def is_repacked(model):
    return [
        bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False)) for layer in layers(model).values()
    ]


def weights(model):
    return [dequantize_4bit(m.weight.data, m.weight.quant_state).float() for m in layers(model).values()]


def as_bytes(tensor):
    """Codes that are stored as floating point may read as NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_weights(model, other):
    """Codes, scales and their form, as a checkpoint holds them."""
    assert layers(model) and not any(is_repacked(model))
    mine, theirs = model.state_dict(), other.state_dict()
    assert [(key, t.dtype, t.shape) for key, t in mine.items()] == [
        (key, t.dtype, t.shape) for key, t in theirs.items()
    ]
    assert all(torch.equal(as_bytes(mine[key]), as_bytes(theirs[key])) for key in mine)


def gradients(model):
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def lora(model):
    torch.manual_seed(0)
    return set_up("lora", model, None, OwLoreSettings(), 1e-2, 4)[0]


def beside_lora(model):
    """Another's LoRA, under this package's optimizer."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    OwLoreAdamW(wrapped, n_active=4, rank=None)
    return wrapped


def monitored_lora(model):
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    LayerMonitor(wrapped, [{"input_ids": IDS}])
    return wrapped


def owlore(model):
    wrapped = get_peft_model(model, OwLoreConfig(r=4))
    OwLoreAdamW(wrapped, n_active=4)
    return wrapped


@pytest.mark.parametrize("adapted", [lora, beside_lora, monitored_lora, owlore], ids=lambda f: f.__name__)
def test_gradients_are_those_before_repacking(load, adapted):
    """And stay so when the model is evaluated in between, which does not repack it again."""
    expected = gradients(adapted(load()))
    model = adapted(repacked(load()))
    model.eval()(input_ids=IDS)
    found = gradients(model)
    assert expected and found.keys() == expected.keys() and not any(is_repacked(model))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_scales_of_bfloat16_weights_come_back_bit_equal(load, storage, caplog):
    model = repacked(load(bnb_4bit_quant_storage=storage))
    keep_unpacked(model)
    assert_same_weights(model, load(bnb_4bit_quant_storage=storage))
    assert not caplog.messages


def test_after_bitsandbytes_own_way_back(load):
    """Which saving takes: codes are restored, scales stay transposed."""
    model, stock = repacked(load()), load()
    model.state_dict()
    assert not any(is_repacked(model))
    keep_unpacked(model)
    assert_same_weights(model, stock)


@pytest.mark.parametrize(("nested", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_rounded_scales_are_reported(load, nested, dtype, caplog, tmp_path):
    """They cannot come back; what is saved is a checkpoint of the same form, with weights off by the rounding alone."""
    model, stock = repacked(load(nested, dtype)), load(nested, dtype)
    owlore(model).unload()
    (warning,) = caplog.messages
    assert f"{len(layers(model))} 4-bit matrices were repacked" in warning and "exact weights" in warning
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(m.weight.quant_state.nested == nested for m in layers(again).values())
    for found, kept, expected in zip(weights(again), weights(model), weights(stock), strict=True):
        assert torch.equal(found, kept)
        assert (found - expected).norm() < 0.004 * expected.norm()


def matrices(model):
    stack = find_decoder_layers(model)
    return [pair for index in range(len(stack)) for pair in stack.matrices(index)]


def work(model, path):
    return fingerprint_of_work(path, model, [{"input_ids": IDS}])


def test_reading_a_repacked_model(load, tmp_path):
    """Matrices, scores and the sign of resumed work are those of the weights; the model stays repacked, bit for bit."""
    stock, model = load(), repacked(load())
    before = [(m.weight.data.clone(), m.weight.quant_state.absmax.clone()) for m in layers(model).values()]
    for (name, found), (_, expected) in zip(matrices(model), matrices(stock), strict=True):
        assert torch.equal(found, expected), name
    assert score_layers(model, method="weight_norm").values == score_layers(stock, method="weight_norm").values
    assert work(model, tmp_path) == work(stock, tmp_path)
    assert all(is_repacked(model)) and all(m.support_avx512bf16_for_cpu for m in layers(model).values())
    for layer, (codes, scales) in zip(layers(model).values(), before, strict=True):
        assert torch.equal(layer.weight.data, codes) and torch.equal(layer.weight.quant_state.absmax, scales)


def repacking(model):
    """One that the next forward pass in eval mode would repack."""
    for layer in layers(model).values():
        layer.support_avx512bf16_for_cpu = True
    return model.eval()


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: score_layers(model, method="owl", batches=[{"input_ids": IDS}]).values,
        lambda model: perplexity(model, [{"input_ids": IDS}]),
        lambda model: diagnose(model, batches=[{"input_ids": IDS}]).layers["angular_distance"],
    ],
    ids=["scores", "perplexity", "diagnosis"],
)
def test_measuring_repacks_nothing(load, measure):
    """And says the same on every processor."""
    model, stock = repacking(load()), load()
    assert measure(model) == measure(stock)
    assert all(m.support_avx512bf16_for_cpu for m in layers(model).values())
    assert_same_weights(model, stock)


def test_speed_is_measured_repacked(load, monkeypatch):
    """As such a processor serves the model, which is left as it was. Others have no product of repacked weights."""
    products = []

    def product(x, codes, out=None, state=None):
        products.append(state)
        return x.new_zeros(*x.shape[:-1], state.shape[0])

    monkeypatch.setattr("bitsandbytes.functional.gemv_4bit", product)
    model, stock = repacking(load(nested=True)), load(nested=True)
    measure_speed({"model": find_decoder_layers(model)}, IDS[:1], rounds=1, new_tokens=2)
    assert products and all(m.support_avx512bf16_for_cpu for m in layers(model).values())
    assert_same_weights(model, stock)


def test_what_cannot_be_undone_is_refused(load):
    model = repacked(load())
    first = next(iter(layers(model).values())).weight.quant_state
    first.absmax = first.absmax[:, :-1]
    with pytest.raises(
        ValueError, match=r"model: expected 4-bit weights as they were loaded, got scales of shape .* in"
    ):
        get_peft_model(model, OwLoreConfig(r=4))


def test_training_of_the_codes_is_refused(load):
    """Also where they are stored as floating point."""
    model = load(bnb_4bit_quant_storage=torch.bfloat16)
    with pytest.raises(ValueError, match="weights are quantized"):
        measure_gradient_norm(model, [{"input_ids": IDS}])
    with pytest.raises(ValueError, match="expected plain floating-point weights, got Params4bit"):
        recover(model, [{"input_ids": IDS}], 1)
