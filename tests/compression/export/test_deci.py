"""Narrowed models as GGUF of llama.cpp's architecture `deci`."""

import re

import gguf
import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from hf_cod import (
    LayerAllocation,
    allocate,
    export,
    factorize,
    find_decoder_layers,
    narrow,
    score_layers,
    token_batches,
)
from hf_cod.compression.export.deci import deci_of
from hf_cod.functional.deci import deci_logits
from tests import real_models
from tests.compression.export.models import batches, llama
from tests.tiny_models import build

QWEN = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 500.0}


def base_of(path, architecture="llama", tokens=99):
    """A GGUF of the intact model: as far as it is read, its architecture and its tokenizer."""
    file = path / f"{architecture}-{tokens}.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"token{i}" for i in range(tokens)])
    writer.add_token_types([1] * tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_tensor("none", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def narrowed(family="llama", **more):
    model = build(family, 4, **{**QWEN, **more}).eval()
    stack = find_decoder_layers(model)
    counts = [stack.count_weights(i) for i in range(4)]
    plan = LayerAllocation("parameter_share", 0.7, [0.9, 0.5, 0.7, 0.7], counts, "given", sizes=counts)
    narrow(model, plan, batches=batches(model), compensation="bias" if family == "llama" else "least_squares")
    return model


def silence(module):
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize(
    "kind, more",
    [("llama", {"rope_parameters": LLAMA3}), ("qwen2", {"tie_word_embeddings": True, "sliding_window": None})],
)
def test_a_file_computes_what_the_model_does(kind, more, tmp_path):
    model = narrowed(kind, **more)
    layers = model.model.layers
    for sublayer in (layers[0].self_attn.o_proj, layers[2].self_attn.o_proj, layers[3].mlp.down_proj):
        silence(sublayer)
    file = base_of(tmp_path, kind)
    report = export(model, tmp_path / "out", to="llama.cpp", bits=5, batches=batches(model), gguf=file)
    assert deci_of(find_decoder_layers(model)).context == 64
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    own = [layer.self_attn.q_proj.out_features // 16 for layer in layers]
    assert keys["general.architecture"] == "deci"
    assert keys["deci.attention.head_count"] == [own[0], own[1], 0, own[3]] and own[0] > own[1]
    channels = [layer.mlp.down_proj.in_features for layer in layers]
    assert keys["deci.feed_forward_length"] == [*channels[:3], 32]
    assert keys["tokenizer.ggml.pre"] == "smollm" and len(keys["tokenizer.ggml.tokens"]) == 99
    assert not any(name.startswith("blk.2.attn") for name in tensors)
    assert ("output.weight" in tensors) is (kind == "llama")
    ids = torch.arange(5, 29)
    heads, groups = keys["deci.attention.head_count"], keys["deci.attention.head_count_kv"]
    numbers = keys["deci.rope.freq_base"], keys["deci.attention.layer_norm_rms_epsilon"]
    found = deci_logits(tensors, heads, groups, *numbers, ids)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    assert "left out, as it adds nothing: attention of layers 2" in report.notes
    assert "left out, as it adds nothing: the MLP of layers 3" in report.notes
    assert report.summary[1].endswith("model.gguf quantized.gguf Q8_0")
    # Sums that llama-quantize would refuse, because of their size, are left out.
    sums = {t.name: t.data.shape[-1] for t in gguf.GGUFReader(tmp_path / "out" / "imatrix.gguf").tensors}
    assert "blk.3.ffn_down.weight.in_sum2" not in sums and "blk.3.ffn_up.weight.in_sum2" in sums
    assert "blk.2.attn_q.weight.in_sum2" not in sums
    assert all(tensors[n.removesuffix(".in_sum2")].shape[1] == of for n, of in sums.items() if n.endswith("sum2"))


def test_bad_input_is_one_line(tmp_path):
    model = narrowed()
    values = {**QWEN, "vocab_size": 99, "num_hidden_layers": 4, "initializer_range": 0.2, "pad_token_id": 0}
    more = ({"no_rope_layer_interval": 2}, {"residual_multiplier": 0.5})
    nope, granite = (
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values, **own)).eval()
        for kind, own in zip(("smollm3", "granite"), more, strict=True)
    )
    (tmp_path / "text.gguf").write_text("no such file")
    ranked = llama(4)
    factorize(ranked, 0.5, batches=batches(ranked))
    cases = [
        (model, None, r"gguf: expected a GGUF of the model before its layers .* got none"),
        (model, base_of(tmp_path, "qwen2"), r"gguf: expected one of architecture llama, as the model, got qwen2: .*"),
        (model, base_of(tmp_path, tokens=98), r"gguf: expected 99 tokens, as the model has, got 98: .*"),
        (model, str(tmp_path / "text.gguf"), r"gguf: expected a GGUF file with a tokenizer, got .*"),
        (model, str(tmp_path / "no.gguf"), r"gguf: expected a GGUF file, got .* which does not exist"),
        (nope, base_of(tmp_path), r"model: expected one that computes as Llama, .* got logits that differ by .*"),
        (granite, base_of(tmp_path), r"model: expected one that computes as Llama, .* got logits that differ by .*"),
        (build("olmo2", 2), base_of(tmp_path), r"model: expected one that computes as Llama, .* got the parameter .*"),
        (ranked, base_of(tmp_path), r"model: expected one that computes as Llama, .* got the parameter model\..*"),
    ]
    for number, (one, file, said) in enumerate(cases):
        with pytest.raises(ValueError, match=f"^{said}$") as caught:
            export(one, tmp_path / f"out{number}", to="llama.cpp", bits=5, gguf=file)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^gguf: expected none for mlx, which reads no GGUF, got 'x'$"):
        export(model, tmp_path / "out", to="mlx", gguf="x")


def test_the_real_llama_cpp_runs_a_narrowed_model(smollm2, brown_text, tmp_path):
    """Greedy tokens after 20 prompts are ours, logits too, and
    the file that it quantizes has the planned size.
    """
    libllama = real_models.benchmark("libllama")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    few = token_batches(tokenizer, brown_text, sequence_length=128, max_samples=8)
    scores = score_layers(model, method="angular", batches=few)
    narrow(model, allocate(scores, "parameter_share", 0.85), batches=few)
    for sublayer in (model.model.layers[20].self_attn.o_proj, model.model.layers[22].mlp.down_proj):
        silence(sublayer)
    source = str(real_models.smollm2_gguf())
    report = export(model, tmp_path, to="llama.cpp", bits=5.2, batches=few, gguf=source)
    file, differences = tmp_path / "model.gguf", []
    engine = libllama.Llama(file, 64, exact=True)
    for start in range(20):
        prompt = tokenizer(brown_text[1000 * start : 1000 * start + 200], return_tensors="pt")["input_ids"][:, :24]
        ids = model.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=99999, pad_token_id=0)
        with torch.no_grad():
            expected = model(ids).logits[0]
        found = torch.from_numpy(engine.logits(ids[0].tolist()))
        differences.append(float((found - expected).norm() / expected.norm()))
        # With equal choices at each prefix, its own greedy tokens are these.
        assert found.argmax(-1)[prompt.shape[1] - 1 : -1].tolist() == ids[0, prompt.shape[1] :].tolist()
    engine.close()
    assert max(differences) < 1e-5, differences
    means = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors}
    imatrix = {
        name.removesuffix(".in_sum2"): (means[name] / means[name.replace("in_sum2", "counts")]).ravel()
        for name in means
        if name.endswith("in_sum2")
    }
    types = libllama.types_of(tmp_path / "tensor-types.txt")
    made = libllama.quantize(file, tmp_path / "small.gguf", "Q8_0", types=types, others="q8_0", imatrix=imatrix)
    size = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(made).tensors)
    assert re.search(r"will have ([\d,]+) bytes", report.summary[-1])[1] == f"{size:,}"
