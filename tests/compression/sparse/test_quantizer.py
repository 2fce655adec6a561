import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from hf_cod import SparseConfig, SparseLinear, collect_statistics, pack_sparse, score_layers
from tests.compression.sparse.matrices import prune, sparse_model
from tests.fresh_processes import run_fresh
from tests.tiny_models import batch_for, build

FAMILIES = ["llama", "llama_tied", "qwen2", "opt", "mixtral", "qwen2_moe", "deepseek_v3", "gemma3"]
# A fresh process that loads a model and writes what it computes.
FRESH = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(3, 12)[None]).logits, sys.argv[2])
"""


@torch.no_grad()
def logits(model, tokens: int = 9) -> torch.Tensor:
    return model(torch.arange(3, 3 + tokens)[None]).logits


def fresh(folder, imports: str):
    return run_fresh(FRESH.format(imports=imports), folder, folder / "logits.pt")


@pytest.mark.parametrize("family", FAMILIES)
def test_pack_save_and_load_again(family, tmp_path):
    model = sparse_model(family)
    few, many = logits(model, 3), logits(model, 20)
    assert pack_sparse(model) is model
    packed = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert packed and len(packed) == len(model.config.quantization_config.modules)
    torch.testing.assert_close(logits(model, 3), few, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model, 20), many, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    dense = loaded.dequantize()
    assert torch.equal(logits(dense, 3), few) and not dense.is_quantized
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), 3), few)


@pytest.mark.process
def test_a_fresh_process_computes_the_same_bit_by_bit(tmp_path):
    model = pack_sparse(sparse_model(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    done = fresh(tmp_path, "import hf_cod")
    assert done.returncode == 0 and "UNEXPECTED" not in done.stderr, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))
    assert (tmp_path / "logits.pt").is_file()


@pytest.mark.process
def test_without_this_package_loading_fails_and_says_what_to_install(tmp_path):
    pack_sparse(sparse_model()).save_pretrained(tmp_path)
    done = fresh(tmp_path, "")
    assert done.returncode != 0 and not (tmp_path / "logits.pt").exists(), "never random weights"
    assert "requires hf_cod: pip install hf_cod, then import hf_cod" in done.stderr
    assert "pip install hf_cod" in json.loads((tmp_path / "config.json").read_text())["quantization_config"]["install"]


def test_the_files_are_as_small_as_the_format_promises(tmp_path):
    model = sparse_model(dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    dense = sum(m.weight.nbytes for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    pack_sparse(model).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    packed = sum(t.nbytes for key, t in tensors.items() if key.endswith(("mask", "values", "row_starts")))
    assert packed / dense < 0.39  # 0.3625, and here 8 bytes for each row of 256 or 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_honoured(dtype, tmp_path):
    model = pack_sparse(sparse_model())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {t.dtype for t in loaded.state_dict().values() if t.is_floating_point()} == {dtype}
    cast = model.to(dtype).state_dict()
    assert all(torch.equal(tensor, cast[key]) for key, tensor in loaded.state_dict().items())
    assert logits(loaded).dtype == dtype


def test_a_dense_checkpoint_is_packed_while_it_is_loaded(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SparseConfig(min_sparsity=0.6))
    assert any(isinstance(m, SparseLinear) for m in loaded.modules())
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
    loaded.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(loaded))


def test_only_what_is_sparse_enough_is_packed():
    model = build("llama")
    prune(model.model.layers[1], 0.9)
    prune(model.model.layers[2], 0.4)
    pack_sparse(model, min_sparsity=0.6)
    assert len(model.config.quantization_config.modules) == 7
    assert all(name.startswith("model.layers.1.") for name in model.config.quantization_config.modules)
    pack_sparse(model, min_sparsity=0.2)
    assert len(model.config.quantization_config.modules) == 14
    pack_sparse(model, min_sparsity=0.95)
    assert len(model.config.quantization_config.modules) == 14, "what is packed stays packed"


def test_banks_of_experts_stay_dense_and_are_counted(caplog):
    model = build("mixtral")
    banks = [p for p in model.parameters() if p.dim() == 3]
    with torch.no_grad():
        for p in banks[1:]:
            p.mul_(torch.rand_like(p) > 0.7)
    with pytest.raises(ValueError, match=r"got at most 0.0% \(.*\) and banks of experts, which are not packed; prune"):
        pack_sparse(model)
    prune(model.model.layers[0].self_attn, 0.9)
    pack_sparse(model)
    left = sum(p.numel() for p in banks[1:])
    told = f"{len(banks) - 1} matrices of banks of experts with {left:,} weights are not packed"
    assert told in caplog.text and banks[1] is dict(model.named_parameters())["model.layers.0.mlp.experts.down_proj"]


def test_what_is_shared_stays_dense():
    model = sparse_model("llama_tied")
    with torch.no_grad():
        model.lm_head.weight.mul_(torch.rand_like(model.lm_head.weight) > 0.9)
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    before = logits(model)
    pack_sparse(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


def test_generation_and_compile():
    model, packed = sparse_model(), pack_sparse(sparse_model())
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2}
    assert torch.equal(packed.generate(**batch_for(model), **options), model.generate(**batch_for(model), **options))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(packed), atol=1e-5, rtol=1e-5)


def test_scores_of_a_packed_model():
    model = sparse_model()
    batches = [batch_for(model)]
    dense = score_layers(model, collect_statistics(model, batches), threshold=3.0)
    pack_sparse(model)
    packed = score_layers(model, collect_statistics(model, batches), threshold=3.0)
    assert packed.values == pytest.approx(dense.values, rel=1e-5) and packed.parameters == dense.parameters


def test_adapters_learn_beside_packed_matrices(tmp_path):
    def adapted(model):
        torch.manual_seed(0)
        options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
        return peft.get_peft_model(model, peft.LoraConfig(**options))

    dense, packed = adapted(sparse_model()), adapted(pack_sparse(sparse_model()))
    batch = batch_for(dense)
    for model in (dense, packed):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (dense, packed)]
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)
    packed.save_pretrained(tmp_path)
    for safe in (False, True):
        with pytest.raises(ValueError, match=r"call model.dequantize\(\)"):
            packed.merge_adapter(safe_merge=safe)
        packed.unload() if safe else None
    packed = peft.PeftModel.from_pretrained(pack_sparse(sparse_model()), tmp_path)
    packed.base_model.model.dequantize()
    torch.testing.assert_close(logits(packed.merge_and_unload()), logits(dense), atol=1e-4, rtol=1e-4)


def test_bad_models():
    dense = build("llama")
    with pytest.raises(
        ValueError, match=r"min_sparsity: expected a model with a Linear in which at least 50% is zero, got"
    ):
        pack_sparse(dense)
    assert not hasattr(dense, "hf_quantizer") or dense.hf_quantizer is None
    with pytest.raises(ValueError, match=r"got at most 0.0% \(no matrix\) and Conv1D, which is not packed"):
        pack_sparse(build("gpt2"))
    for start in ("pissa", "olora"):
        with pytest.raises(
            ValueError, match=r"adapters whose initialization changes it: pissa, olora\); call model.dequantize"
        ):
            peft.get_peft_model(pack_sparse(sparse_model()), peft.LoraConfig(r=2, init_lora_weights=start))
    with pytest.raises(ValueError, match="min_sparsity: expected a share of zeros between 0 and 1, got 50"):
        pack_sparse(sparse_model(), min_sparsity=50)
    with pytest.raises(ValueError, match="model: expected a loaded transformers model, got Linear"):
        pack_sparse(nn.Linear(2, 2))
    broken = sparse_model()
    broken.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"expected finite weights, got NaN or inf in model.layers.2.mlp.up_proj"):
        pack_sparse(broken)
    adapted = sparse_model()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), adapted)
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        pack_sparse(adapted)


@pytest.fixture
def checkpoint(tmp_path):
    pack_sparse(sparse_model()).save_pretrained(tmp_path)
    return tmp_path


NAME = "model.layers.0.mlp.up_proj"


def rewrite(folder, key: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[key] = change(tensors[key])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("mask", lambda t: t ^ 1, rf"{NAME}: expected row_starts\[\d+\] = .* as the mask counts"),
        ("row_starts", lambda t: t + (torch.arange(len(t)) == 3), rf"{NAME}: expected row_starts\[3\]"),
        ("row_starts", lambda t: t - 5, rf"{NAME}: expected row_starts\[0\] = 0"),
    ],
)
def test_a_damaged_file(part, change, message, checkpoint):
    rewrite(checkpoint, f"{NAME}.{part}", change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def remove(folder, *keys: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if key not in keys}
    assert len(kept) == len(tensors) - len(keys)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def record(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["modules"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: rewrite(f, f"{NAME}.values", lambda t: t[:-1].clone()), rf"{NAME}: expected \d+ values as config"),
        (lambda f: rewrite(f, f"{NAME}.values", lambda t: t.int()), rf"{NAME}: expected values of floating point, got"),
        (lambda f: rewrite(f, f"{NAME}.values", lambda t: t * torch.nan), rf"{NAME}: expected finite values, got NaN"),
        (lambda f: remove(f, f"{NAME}.values"), rf"{NAME}: expected mask.* got none of values"),
        (lambda f: remove(f, f"{NAME}.mask"), rf"{NAME}: expected mask.* got none of mask"),
        (lambda f: remove(f, f"{NAME}.mask", f"{NAME}.values"), rf"{NAME}: expected mask.* got none of mask, values"),
        (lambda f: remove(f, *(f"{NAME}.{p}" for p in ("mask", "values", "row_starts"))), rf"{NAME}: .* none in files"),
        (lambda f: record(f, lambda modules: modules.pop(NAME)), rf"{NAME}: expected .* one in files, none in config"),
        (lambda f: record(f, lambda modules: modules.clear()), "modules: expected the names of packed matrices"),
        (lambda f: record(f, lambda modules: modules.update({NAME: 7})), rf"{NAME}: expected 7 values as config"),
        (
            lambda f: record(f, lambda modules: modules.update({NAME: -1})),
            "modules.*: expected a whole number of at least 0, got -1",
        ),
        (
            lambda f: record(f, lambda modules: modules.update({NAME: "x"})),
            "modules.*: expected a whole number of at least 0, got 'x'",
        ),
    ],
)
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["", "mismatched"])
def test_a_damaged_checkpoint_never_loads(damage, message, options, checkpoint):
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint, **options)


def test_a_file_that_was_cut(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"weights: expected a complete safetensors file, got .*model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_shards_and_weights_on_disk(tmp_path):
    model = pack_sparse(sparse_model())
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(len(model.model.layers))}
    for buffers in (False, True):
        options = {"device_map": places, "offload_folder": tmp_path / "offload", "offload_buffers": buffers}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", **options)
        torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("family, head", [("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)])
def test_with_and_without_a_head(family, head, tmp_path, caplog):
    model = sparse_model(family)
    with torch.no_grad():  # heads with matrices of their own are packed, too
        for name, module in model.named_modules():
            if type(module) is nn.Linear and ("lm_head" in name or "transform" in name):
                module.weight.mul_(torch.rand_like(module.weight) > 0.8)
    pack_sparse(model).save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        assert torch.equal(base(ids).last_hidden_state, hidden)
    assert {m.split(".")[0] for m in base.config.quantization_config.modules} <= {n for n, _ in base.named_children()}
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "base")(ids).last_hidden_state, hidden)
    caplog.clear()
    whole = head.from_pretrained(tmp_path / "base")
    stray = [line for line in caplog.text.splitlines() if "UNEXPECTED" in line and "layer" in line]
    assert not stray, "the sign is passed over under its other name, too"
    assert any(isinstance(m, SparseLinear) for m in whole.modules())
    assert torch.equal(whole.base_model(ids).last_hidden_state, hidden)
    classes = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", num_labels=3)
    assert torch.equal(classes.base_model(ids).last_hidden_state, hidden)
    for folder, prefix in (("whole", f"{model.base_model_prefix}."), ("base", "")):
        key = min(k for k in load_file(tmp_path / folder / "model.safetensors") if k.endswith("values") and prefix in k)
        record(tmp_path / folder, lambda modules, key=key: modules.pop(key.removesuffix(".values")))
        for auto in (AutoModel, head):
            with pytest.raises(ValueError, match=r"expected a packed matrix .* none in config.json"):
                auto.from_pretrained(tmp_path / folder)


def test_a_model_that_has_not_the_modules(checkpoint):
    with pytest.raises(ValueError, match=r"modules: expected modules of LlamaForCausalLM, got 'model.layers.1"):
        AutoModelForCausalLM.from_pretrained(checkpoint, num_hidden_layers=1)
