"""Types of tensors for llama-quantize."""

import re

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cod import LayerStatistics, collect_statistics, export, score_layers, token_batches
from hf_cod.compression.export.llama_cpp import BLOCKS, LADDER, stored, type_of
from hf_cod.layers.gguf_names import gguf_names
from hf_cod.layers.stack import find_decoder_layers
from tests import real_models
from tests.compression.export.models import batches, llama, scores
from tests.tiny_models import build


def test_blocks_are_those_of_the_package():
    for kind, expected in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]] == expected


def test_types_by_the_width_of_rows():
    assert [type_of((64, 512), width) for width in LADDER] == ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0"]
    found = [type_of((64, 576), width) for width in LADDER]
    assert found == ["iq4_nl", "iq4_nl", "iq4_nl", "q5_0", "q8_0", "q8_0"]
    assert stored((64, 512), 3, None, 0) == 64 * 2 * 110 * 8


def kinds_of(directory, names):
    """Type of each tensor, by the first line that matches it, as llama-quantize reads the file."""
    lines = [line.rsplit("=", 1) for line in (directory / "tensor-types.txt").read_text().splitlines()]
    return {name: next((kind for rule, kind in lines if re.search(rule, name)), None) for name in names}


@pytest.mark.parametrize("width, expected", [(256, ("q4_k", "q3_k")), (64, ("q5_0", "iq4_nl"))])
def test_files(width, expected, tmp_path):
    model = llama(hidden_size=width, intermediate_size=256 if width == 256 else 128)
    low, high = (4.5, 5.5) if width == 64 else (110 * 8 / 256, 4.5)
    report = export(
        model, tmp_path, to="llama.cpp", bits=low + (high - low) / 3, scores=scores(model, [1.0, 3.0, 2.0]),
        batches=batches(model),
    )  # fmt: skip
    names = [f"blk.{i}.{kind}.weight" for i in range(3) for kind in ("attn_q", "attn_output", "ffn_up", "ffn_down")]
    found = kinds_of(tmp_path, [*names, "token_embd.weight", "blk.11.attn_q.weight", "blk.1.attn_q_norm.weight"])
    assert {found[name] for name in names if name.startswith("blk.1.")} == {expected[0]}
    assert {found[name] for name in names if not name.startswith("blk.1.")} == {expected[1]}
    assert {found[name] for name in found if name not in names} == {None}
    line = report.summary[1]
    assert "llama-quantize --imatrix imatrix.gguf --tensor-type-file tensor-types.txt" in line
    assert line.endswith("--token-embedding-type q8_0 --output-tensor-type q8_0 model-bf16.gguf model.gguf Q8_0")
    read = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert len(read.tensors) == 3 * 7 * 2 and np.isfinite(read.tensors[0].data).all()
    assert not (tmp_path / "config.json").exists()


def test_planned_bytes_are_those_of_a_gguf(tmp_path):
    """Each tensor by the sizes of the gguf package."""
    model = llama(hidden_size=256, intermediate_size=288, num_attention_heads=4)
    report = export(model, tmp_path, to="llama.cpp", bits=4.8)
    assert any("no importance matrix" in note for note in report.notes)
    total = 0
    for name, tensor in model.state_dict().items():
        bits = report.results["module_bits"].get(name.removesuffix(".weight"))
        kind = type_of(tuple(tensor.shape), bits) if bits else "f32" if tensor.dim() < 2 else "q8_0"
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
        total += tensor.numel() // block * size
    assert report.summary[2].startswith(f"The tensors of the GGUF will have {total:,} bytes")


def test_tied_embeddings_count_once_and_opt_is_refused(tmp_path):
    model = llama(tie_word_embeddings=True)
    report = export(model, tmp_path / "tied", to="llama.cpp", bits=5)
    untied = export(llama(), tmp_path / "untied", to="llama.cpp", bits=5)
    counts = [int(r.summary[2].split(" bytes")[0].split()[-1].replace(",", "")) for r in (report, untied)]
    assert counts[1] - counts[0] == 99 * 64 // 32 * 34
    with pytest.raises(ValueError, match=r"^model: expected an architecture that GGUF has names for, got opt$"):
        opt = build("opt", 2, hidden_size=64, ffn_dim=128, word_embed_proj_dim=64)
        export(opt, tmp_path / "opt", to="llama.cpp", bits=5)


def test_the_real_llama_cpp_makes_what_was_planned(smollm2, brown_text, tmp_path):
    """Sizes and types are those of the plan; logits of 16 bits are ours, and those of the plan are near them."""
    libllama = real_models.benchmark("libllama")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    few = token_batches(tokenizer, brown_text, sequence_length=128, max_samples=8)
    statistics = collect_statistics(model, few)
    found = score_layers(model, statistics, "owl")
    report = export(model, tmp_path, to="llama.cpp", bits=4.8, scores=found, statistics=statistics)
    sums = LayerStatistics.load(tmp_path / "imatrix.gguf", model=model)
    names = gguf_names(find_decoder_layers(model))
    means = {
        f"{names[name][0][0]}.weight": (sums.squares[name] / sums.tokens[name]).float().numpy() for name in sums.squares
    }
    half = libllama.quantize(real_models.smollm2_gguf(), tmp_path / "half.gguf", "F16", requantize=True)
    types = libllama.types_of(tmp_path / "tensor-types.txt")
    file = libllama.quantize(half, tmp_path / "plan.gguf", "Q8_0", types=types, others="q8_0", imatrix=means)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    size = sum(int(tensor.n_bytes) for tensor in tensors.values())
    assert f"will have {size:,} bytes" in report.summary[-1]
    modules, kinds = dict(model.named_modules()), set()
    for name, width in report.results["module_bits"].items():
        kind = tensors[f"{names[name][0][0]}.weight"].tensor_type.name.lower()
        assert kind == type_of(tuple(modules[name].weight.shape), width), name
        kinds.add(kind)
    assert kinds == {"iq4_nl", "q4_k", "q5_0", "q5_k"}
    ids = tokenizer(brown_text[-2000:])["input_ids"][:128]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    divergence = {}
    for path in (half, file):
        engine = libllama.Llama(path, len(ids))
        logits = torch.from_numpy(engine.logits(ids))
        engine.close()
        log_p, log_q = expected.log_softmax(-1), logits.log_softmax(-1)
        divergence[path] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert divergence[half] < 1e-4 < divergence[file] < 0.2


@pytest.mark.parametrize("tied", [False, True])
def test_bits_of_the_embedding_are_planned(tied, tmp_path):
    model = llama(tie_word_embeddings=tied)
    reports = [
        export(model, tmp_path / str(width), to="llama.cpp", bits=5, embedding_bits=width) for width in (8, 5, 4)
    ]
    told = [int(re.search(r"will have ([\d,]+) bytes", r.summary[-1])[1].replace(",", "")) for r in reports]
    blocks = 99 * 64 // 32 * (1 if tied else 2)
    assert [told[0] - other for other in told[1:]] == [blocks * (34 - 22), blocks * (34 - 18)]
    assert "--token-embedding-type q5_0 --output-tensor-type q5_0" in reports[1].summary[1]
    for to, width, said in (("llama.cpp", 3, "expected one of 4, 5, 6, 8"), ("mlx", 5, "expected none with mlx")):
        with pytest.raises(ValueError, match=f"^embedding_bits: {said}"):
            export(model, tmp_path / "other", to=to, bits=5, embedding_bits=width)
