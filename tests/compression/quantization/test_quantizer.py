import copy
import json
import pickle
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from examples.tiny_architectures import build as build_type
from hf_cod import LayerScores, OwlBnbConfig, collect_statistics, find_decoder_layers, quantize
from hf_cod.compression.quantization.bnb import Linear4bit
from hf_cod.compression.quantization.experts import QuantizedExperts
from hf_cod.compression.quantization.linear import Linear3bit
from tests.compression.quantization.matrices import llama, mixed
from tests.fresh_processes import run_fresh
from tests.tiny_models import OTHERS, batch_for, build

FAMILIES = ["llama", "llama_tied", "gpt2", "opt", "qwen2_moe", "mixtral", "bert", "bert_headless", "vit"]
# A fresh process that loads a model and writes what it computes.
FRESH = """
import sys, torch, hf_cod
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(3, 12)[None]).logits, sys.argv[2])
"""
# A fresh process that does not know this package, and fails at each of two models.
WITHOUT = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for folder in sys.argv[1:]:
    for reader in (AutoModelForCausalLM, LlamaForCausalLM):
        try:
            reader.from_pretrained(folder, trust_remote_code=True)
        except (ValueError, RuntimeError) as error:
            print("refused", str(error).splitlines()[0])
"""


def auto_of(family):
    return OTHERS[family][0] if family in OTHERS else AutoModelForCausalLM


@torch.no_grad()
def outputs(model):
    return model(**batch_for(model))[0]


def stored(model):
    kinds = (Linear3bit, Linear4bit, QuantizedExperts)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def equal_files(one, two):
    one, two = ({k: t for f in d.glob("*.safetensors") for k, t in load_file(f).items()} for d in (one, two))
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_save_and_load_again(family, tmp_path):
    model = mixed(family)
    layers = stored(model)
    assert layers.keys() == model.config.quantization_config.modules.keys()
    assert {m.bits for m in layers.values()} == {3, 4}
    assert all(m.config._is_quantized for m in model.modules() if isinstance(m, PreTrainedModel))
    expected = outputs(model)
    model.save_pretrained(tmp_path / "one")
    loaded = auto_of(family).from_pretrained(tmp_path / "one")
    assert not any(p.requires_grad for m in stored(loaded).values() for p in m.scales.parameters())
    # A router that stays as it is may be loaded to another alignment, for which its sums are rounded otherwise.
    torch.testing.assert_close(outputs(loaded), expected, atol=1e-6, rtol=1e-6)
    loaded.save_pretrained(tmp_path / "two")
    assert equal_files(tmp_path / "one", tmp_path / "two")
    dense = loaded.dequantize()
    assert not dense.is_quantized and not stored(dense)
    assert not any(hasattr(module.config, "_is_quantized") for module in dense.modules() if hasattr(module, "config"))
    torch.testing.assert_close(outputs(dense), expected, atol=1e-4, rtol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    again = auto_of(family).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(outputs(again), outputs(dense), atol=1e-5, rtol=1e-5)
    assert not hasattr(again.config, "quantization_config")


@pytest.mark.parametrize("kind", ["falcon_mamba", "jamba"])
def test_a_model_that_looks_for_the_mark_finds_it_as_after_a_reload(kind, tmp_path):
    """These call `dt_proj` only if their config has the mark, and else multiply by its weight."""
    model = build_type(kind)
    calls = calls_of_dt_proj(model)
    assert outputs(model).isfinite().all() and not calls
    quantize(model, bits=4)
    assert model.config._is_quantized
    expected = outputs(model)
    assert calls
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._is_quantized
    again = calls_of_dt_proj(loaded)
    assert torch.equal(outputs(loaded), expected) and len(again) == len(calls)


def calls_of_dt_proj(model):
    """A list that gets an entry for each call."""
    calls = []
    for name, module in model.named_modules():
        if name.endswith("dt_proj"):
            module.register_forward_hook(lambda *_: calls.append(True))
    return calls


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral", "bert", "vit"])
def test_what_is_quantized_while_loading_is_what_is_quantized_in_memory(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    loaded = auto_of(family).from_pretrained(tmp_path, quantization_config=OwlBnbConfig(bits=3))
    quantize(model, OwlBnbConfig(bits=3))
    assert torch.equal(outputs(loaded), outputs(model))
    assert stored(loaded).keys() == stored(model).keys()
    loaded.save_pretrained(tmp_path / "stored")
    assert torch.equal(outputs(auto_of(family).from_pretrained(tmp_path / "stored")), outputs(model))


def test_shared_weights_are_refused_while_loading_too(tmp_path):
    """Files have a shared tensor once, so that a reload would lack the other one's codes and scales."""
    build_type("zamba2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model: expected a separate weight .*shared_transformer"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=OwlBnbConfig(bits=4))
    config = OwlBnbConfig(bits=4, exclude=r".*shared_transformer.*")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    loaded.save_pretrained(tmp_path / "stored")
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "stored")), outputs(loaded))


def test_scores_and_statistics_serve_while_loading(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    counts = [find_decoder_layers(model).count_weights(i) for i in range(4)]
    LayerScores("tiny", "made up", [0.0, 1.0, 3.0, 2.0], counts).save(tmp_path / "scores.json")
    collect_statistics(model, [batch_for(model)]).save(tmp_path / "sums.safetensors")
    config = OwlBnbConfig(bits=3.65, scores=tmp_path / "scores.json", statistics=str(tmp_path / "sums.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    four = {name.split(".")[2] for name, module in stored(loaded).items() if module.bits == 4}
    assert four == {"2", "3"}
    plain = mixed()
    quantize(model, config)
    assert torch.equal(outputs(loaded), outputs(model)) and not torch.equal(outputs(loaded), outputs(plain))
    loaded.save_pretrained(tmp_path / "stored")
    kept = json.loads((tmp_path / "stored" / "config.json").read_text())["quantization_config"]
    assert kept["score"] == "made up" and "scores" not in kept and "statistics" not in kept


def test_one_matrix_at_a_time_is_dense_while_loading(tmp_path, monkeypatch):
    from hf_cod.compression.quantization import quantizer

    llama(dtype=torch.bfloat16).save_pretrained(tmp_path)
    alive, most = [], []

    def watched(W, *args):
        alive.append(weakref.ref(W))
        most.append(sum(reference() is not None for reference in alive))
        return round_matrix(W, *args)

    round_matrix = quantizer.round_matrix
    monkeypatch.setattr(quantizer, "round_matrix", watched)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=OwlBnbConfig(bits=3))
    assert len(most) == 28 and max(most) == 1


@pytest.mark.process
def test_a_fresh_process_computes_the_same_bit_by_bit(tmp_path):
    mixed(dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 2
    done = run_fresh(FRESH, tmp_path, tmp_path / "logits.pt")
    assert done.returncode == 0 and "UNEXPECTED" not in done.stderr, done.stderr
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.arange(3, 12)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.process
def test_without_this_package_loading_fails_and_says_what_to_install(tmp_path):
    folders = [tmp_path / "3", tmp_path / "4"]
    for folder in folders:
        model = llama(layers=1)
        quantize(model, OwlBnbConfig(bits=int(folder.name)))
        model.save_pretrained(folder)
        kept = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert "pip install hf_cod" in kept["install"]
    done = run_fresh(WITHOUT, *folders)
    assert done.returncode == 0 and done.stdout.count("refused") == 4, "never random weights"
    assert done.stdout.count("requires hf_cod: pip install hf_cod, then import hf_cod") == 2
    assert done.stderr.count("pip_install_hf_cod_then_import_hf_cod") >= 2  # a class of a family asks for no type


@pytest.mark.parametrize("bits, most", [(3, 3.13), (4, 4.13)])
def test_the_files_are_as_small_as_the_format_promises(bits, most, tmp_path):
    model = build("llama", layers=2, hidden_size=256, intermediate_size=512)
    report = quantize(model, OwlBnbConfig(bits=bits))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    found = sum(t.nbytes for key, t in tensors.items() if ".layers." in key and "norm" not in key)
    assert (
        found
        == report.results["planned_bytes"]
        == pytest.approx(report.results["bits"] * sum(report.layers["parameters"]) / 8)
    )
    assert bits < report.results["bits"] <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_honoured_and_scales_stay_exact(dtype, tmp_path):
    model = mixed("opt")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    cast = model.to(dtype)
    before = load_file(tmp_path / "model.safetensors")
    for found in (loaded, cast):
        for key, tensor in found.state_dict().items():
            if ".scales." in key:
                assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key])
            elif tensor.is_floating_point():
                assert tensor.dtype == dtype
        assert outputs(found).dtype == dtype and outputs(found).isfinite().all()
    assert torch.equal(outputs(loaded), outputs(cast))


def test_a_dense_checkpoint_in_another_dtype(tmp_path):
    llama().save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=OwlBnbConfig(bits=3.5))
        assert loaded.model.embed_tokens.weight.dtype == dtype and outputs(loaded).dtype == dtype


def test_names_with_and_without_the_head(tmp_path):
    model = mixed()
    model.save_pretrained(tmp_path / "causal")
    bare = AutoModel.from_pretrained(tmp_path / "causal")
    with torch.no_grad():
        expected = model.model(**batch_for(model))[0]
    assert torch.equal(outputs(bare), expected) and "layers.0.mlp.up_proj" in stored(bare)
    bare.save_pretrained(tmp_path / "bare")
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "bare")), expected)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")  # with a new head
    with torch.no_grad():
        assert torch.equal(causal.model(**batch_for(model))[0], expected)
    llama().save_pretrained(tmp_path / "dense")
    loaded = AutoModel.from_pretrained(tmp_path / "dense", quantization_config=OwlBnbConfig(bits=3))
    assert len(stored(loaded)) == 28


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"])
def test_device_maps(device_map, tmp_path):
    mixed().save_pretrained(tmp_path / "stored")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", device_map=device_map)
    assert torch.equal(outputs(loaded), outputs(mixed()))
    llama().save_pretrained(tmp_path / "dense")
    config = OwlBnbConfig(bits=3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, device_map=device_map)
    assert {m.bits for m in stored(loaded).values()} == {3} and outputs(loaded).isfinite().all()


PARTS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0", "model.layers.2"]
DISK = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk", "model.layers.3": "disk"}


def test_layers_on_disk(tmp_path):
    model = mixed()
    expected = outputs(model)
    model.save_pretrained(tmp_path / "stored")
    options = {"device_map": DISK, "offload_folder": tmp_path / "offload"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", **options)
    assert loaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(outputs(loaded), expected) and torch.equal(outputs(loaded), expected)
    statistics = collect_statistics(loaded, [batch_for(loaded)])
    assert statistics.squares.keys() == stored(loaded).keys()
    loaded.save_pretrained(tmp_path / "again")
    assert equal_files(tmp_path / "stored", tmp_path / "again")


def test_layers_that_go_to_disk_while_they_are_quantized(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    options = {
        "device_map": DISK,
        "offload_folder": tmp_path / "offload",
        "quantization_config": OwlBnbConfig(bits=3.5),
    }
    with pytest.raises(ValueError, match=r"device_map: expected no quantized layer on disk, got model.layers.1"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options)


def test_copies(tmp_path):
    model = mixed()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other), outputs(model))
        other.save_pretrained(tmp_path / "copy")
        model.save_pretrained(tmp_path / "model")
        assert equal_files(tmp_path / "copy", tmp_path / "model")


def test_generation_and_compile():
    model = mixed()
    dense = copy.deepcopy(model).dequantize()
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2}
    batch = batch_for(model, "left")
    assert torch.equal(model.generate(**batch, **options), dense.generate(**batch, **options))
    three = llama(layers=1)
    quantize(three, OwlBnbConfig(bits=3))
    compiled = torch.compile(three, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled), outputs(three), atol=1e-5, rtol=1e-5)


@pytest.fixture
def checkpoint(tmp_path):
    mixed(layers=2).save_pretrained(tmp_path)
    return tmp_path


FOUR, THREE = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reconfigure(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("part", ["scales.absmax", "scales.nested_absmax", "scales.offset", "weight"])
@pytest.mark.parametrize("name", [FOUR, THREE])
def test_a_file_that_lacks_a_tensor(name, part, checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop(f"{name}.{part}"))
    with pytest.raises(ValueError, match=rf"{name}.{part}: expected it in the checkpoint, got none"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("part", ["scales.absmax", "scales.nested_absmax", "weight"])
@pytest.mark.parametrize("name", [FOUR, THREE])
def test_a_tensor_of_another_shape(name, part, checkpoint):
    key = f"{name}.{part}"
    rewrite(checkpoint, lambda tensors: tensors.update({key: torch.cat([tensors[key], tensors[key]])}))
    with pytest.raises(RuntimeError):  # transformers' own, with a report that names the tensor and both shapes
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("part", ["scales.nested_absmax", "scales.offset"])
def test_scales_that_are_no_numbers(part, checkpoint):
    rewrite(checkpoint, lambda tensors: tensors[f"{THREE}.{part}"].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{THREE}.{part}: expected finite numbers, got NaN or infinity"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_a_file_that_was_cut(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|offset"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["modules"].clear(), "modules: expected the names of the quantized matrices, got none"),
        (lambda c: c["modules"].update({THREE: 5}), "modules: expected 3 or 4 bits each, got"),
        (lambda c: c["modules"].update({"model.layers.9.mlp.up_proj": 3}), "modules: expected modules of Llama.*9"),
        (lambda c: c["modules"].update({"model.layers.0.mlp": 3}), "modules: expected matrices of LlamaForCausalLM"),
        (lambda c: c.update(block=48), "block: expected one of 32, 64, 128, 256, got 48"),
    ],
)
def test_a_config_that_cannot_be(change, message, checkpoint):
    reconfigure(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["modules"].pop(THREE),
        lambda c: c["modules"].update({THREE: 4}),
        lambda c: c.update(block=32),
    ],
)
def test_a_config_of_other_tensors(change, checkpoint):
    reconfigure(checkpoint, change)
    with pytest.raises(RuntimeError):  # transformers' own, with a report that names the tensors
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_scales_in_32_bits_are_not_taken_for_scales_in_eight(checkpoint):
    reconfigure(checkpoint, lambda c: c.update(double_quant=False))
    with pytest.raises(ValueError, match=r"scales.absmax: expected torch.float32, got torch.uint8"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_weights_that_are_no_numbers_while_loading(tmp_path, caplog):
    model = llama()
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=OwlBnbConfig(bits=3))


def test_bitsandbytes_missing(tmp_path, monkeypatch):
    model = mixed(layers=1)
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name in ("bnb", "bnb_decoding"):
        monkeypatch.delitem(sys.modules, f"hf_cod.compression.quantization.{name}")
    for attempt in (lambda: AutoModelForCausalLM.from_pretrained(tmp_path), lambda: quantize(llama())):
        with pytest.raises(ImportError, match=r"bits: .* pip install 'hf_cod\[bitsandbytes\]'"):
            attempt()
