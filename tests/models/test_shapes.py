"""Shapes that the config records: built by every constructor, with this package and, as remote code, without it."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import hf_cod
from hf_cod import drop
from hf_cod.models.factors import LowRankLinear
from hf_cod.models.shaping import record_shapes
from tests.fresh_processes import run_fresh
from tests.tiny_models import CAUSAL, OTHERS, batch_for, build

from .tiny import tiny_model, tokens

# transformers cuts and joins gate and up of DINOv2's MLP while it loads and saves a class of that name.
DINOV2 = {"use_swiglu_ffn": True, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8}
DINOV2 |= {"patch_size": 4, "mlp_ratio": 2, "num_labels": 3}
# One mechanism for what differs by layer: low rank, head counts, widths.
LLAMA = {
    "model.layers.1.mlp.up_proj": {"rank": 5},
    "model.layers.1.mlp.down_proj": {"rank": 7},
    "model.layers.2.self_attn.q_proj": {"out_features": 16},
    "model.layers.2.self_attn.k_proj": {"out_features": 8},
    "model.layers.2.self_attn.v_proj": {"out_features": 8, "rank": 3},
    "model.layers.2.self_attn.o_proj": {"in_features": 16},
    "model.layers.3.self_attn.q_proj": {"out_features": 16},
    "model.layers.3.self_attn.o_proj": {"in_features": 16},
    "model.layers.3.self_attn": {"num_key_value_groups": 1},
    "model.layers.3.mlp.gate_proj": {"out_features": 20},
    "model.layers.3.mlp.up_proj": {"out_features": 20},
    "model.layers.3.mlp.down_proj": {"in_features": 20, "bias": 1},
    "model.layers.3.mlp": {"intermediate_size": 20},
}
GPT2 = {"transformer.h.0.attn.c_attn": {"rank": 6}, "transformer.h.2.mlp.c_fc": {"rank": 9}}
GPT2 |= {"transformer.h.3.mlp.c_fc": {"out_features": 40}, "transformer.h.3.mlp.c_proj": {"in_features": 40}}
BERT = {
    "bert.encoder.layer.1.attention.self.query": {"rank": 4},
    "bert.encoder.layer.1.intermediate.dense": {"rank": 8},
}
OF_FAMILY = {"llama": LLAMA, "llama_tied": LLAMA, "qwen3": LLAMA, "gpt2": GPT2, "bert": BERT}


def shaped(family="llama", dtype=torch.float32, shapes=None):
    model = build(family, dtype=dtype)
    record_shapes(model, OF_FAMILY[family] if shapes is None else shapes)
    fill(model)
    return model


@torch.no_grad()
def fill(model):
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def logits(model, batch=None):
    return model.eval()(**(batch or batch_for(model))).logits


# A process that cannot import this package, or one that does.
LOADER = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
root = sys.argv[1]
for name, auto, batch in torch.load(f"{{root}}/jobs.pt"):
    options = {options}
    model = globals()[auto].from_pretrained(f"{{root}}/{{name}}", **options)
    with torch.no_grad():
        logits = model(**batch).logits
    torch.save(logits, f"{{root}}/{{name}}.pt")
    model.save_pretrained(f"{{root}}/again/{{name}}")
    if name == "llama":
        head = AutoModelForSequenceClassification.from_pretrained(f"{{root}}/{{name}}", num_labels=3, **options)
        assert head(**batch).logits.shape == (3, 3) and type(head.model).__name__ == "ShapedLlamaModel"
        assert head.model.layers[1].mlp.up_proj.rank == 5
print("hf_cod" in sys.modules)
"""


def load_elsewhere(root: Path, with_package: bool) -> None:
    (root / "hidden").mkdir(exist_ok=True)
    (root / "hidden" / "hf_cod.py").write_text("raise ImportError('hidden by a test')")
    place = Path(hf_cod.__file__).parent.parent if with_package else root / "hidden"
    code = LOADER.format(
        imports="import hf_cod" if with_package else "", options={} if with_package else {"trust_remote_code": True}
    )
    done = run_fresh(code, root, cwd=root, paths=[place], environment={"HF_MODULES_CACHE": str(root / "modules")})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(with_package)


@pytest.mark.process
@pytest.mark.parametrize("with_package", [True, False])
def test_a_fresh_process_computes_the_same(with_package, tmp_path):
    autos = {"bert": "AutoModelForMaskedLM"}
    models = {family: shaped(family) for family in OF_FAMILY}
    models["bfloat16"] = shaped("llama", torch.bfloat16)
    models["cod"] = tiny_model("cod_llama", "lns")
    record_shapes(models["cod"], {"model.layers.1.mlp.up_proj": {"rank": 5}})
    fill(models["cod"])
    jobs = []
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        batch = {"input_ids": tokens()} if name == "cod" else batch_for(model)
        jobs.append((name, autos.get(name, "AutoModelForCausalLM"), batch))
    torch.save(jobs, tmp_path / "jobs.pt")
    load_elsewhere(tmp_path, with_package)
    # What a cast makes of buffers is not what loading makes of them.
    models["bfloat16"] = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16")
    for name, _, batch in jobs:
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), logits(models[name], batch)), name
    # What was saved there again is loaded here.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "llama")
    assert torch.equal(logits(again), logits(models["llama"]))
    assert isinstance(again, LlamaForCausalLM) and type(again).__name__ == "ShapedLlamaForCausalLM"


@pytest.mark.process
def test_without_package_and_trust_a_stranger_is_told_and_gets_no_random_weights(tmp_path):
    shaped().save_pretrained(tmp_path / "model")
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'model')!r})"
    done = subprocess.run([sys.executable, "-c", code], input="n", capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "trust_remote_code" in done.stderr


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_generation_with_and_without_cache(family):
    model = shaped(family)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch_for(model, "left"), **options)
    assert torch.equal(cached, model.generate(**batch_for(model, "left"), **options, use_cache=False))
    if family == "llama":  # heads differ by layer in the cache
        keys = [layer.keys.shape[1] for layer in model(**batch_for(model), use_cache=True).past_key_values.layers]
        assert keys == [2, 2, 1, 2]
        static = model.generate(**batch_for(model, "left"), **options, cache_implementation="static")
        assert torch.equal(cached, static)


def test_every_head_and_copy_has_the_shapes(tmp_path):
    model = shaped()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, LlamaModel) and base.layers[2].self_attn.q_proj.out_features == 16
    expected = model.model(**batch_for(model)).last_hidden_state
    assert torch.equal(base(**batch_for(model)).last_hidden_state, expected)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert torch.equal(head.model(**batch_for(model)).last_hidden_state, expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and torch.equal(logits(other), logits(model))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config) and config.module_shapes == model.config.module_shapes
    assert pickle.loads(pickle.dumps(config)) == config
    torch.manual_seed(0)
    new = AutoModelForCausalLM.from_config(config)
    deviation = new.model.layers[1].mlp.up_proj.reduce.weight.std()
    assert float(deviation) == pytest.approx(config.initializer_range, rel=0.3), "as Linears are"


def test_the_base_model_alone(tmp_path):
    model = build("llama").model
    record_shapes(model, {"layers.1.mlp.up_proj": {"rank": 5}})
    fill(model)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again(**batch_for(model)).last_hidden_state, model(**batch_for(model)).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_device_map_and_ties(dtype, tmp_path):
    model = shaped("llama_tied")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="auto")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    cast = model.to(dtype).state_dict()
    assert all(torch.equal(tensor, cast[name]) for name, tensor in loaded.state_dict().items())


def test_offloaded_to_disk(tmp_path):
    model = shaped()
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    places |= {"model.layers.3": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = {"device_map": places, "offload_folder": str(tmp_path / "aside")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert loaded.model.layers[1].mlp.up_proj.expand.weight.device.type == "meta"
    assert torch.equal(logits(loaded), logits(model))


def test_adapters_on_factors_learn_save_load_and_merge(tmp_path):
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(shaped(), settings)
    batch = batch_for(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("up_proj.reduce.lora_A" in name for name in learning)
    assert any("up_proj.expand.lora_B" in name for name in learning)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(shaped(), tmp_path)
    assert torch.equal(logits(again, batch), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded, batch), logits(merged, batch))


def test_layers_can_be_dropped_afterwards(tmp_path):
    model = shaped()
    drop(model, [0, 2])
    assert model.model.layers[0].mlp.up_proj.rank == 5 and model.model.layers[1].mlp.up_proj.out_features == 20
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    names = json.loads((tmp_path / "config.json").read_text())["module_shapes"]
    assert {name.split(".")[1] for name in names} == {"0", "1"}


def test_checkpoints_whose_files_name_experts_otherwise(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "stock")  # with a matrix for each expert
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    record_shapes(model, {"model.layers.1.self_attn.q_proj": {"rank": 4}})
    fill(model)
    model.save_pretrained(tmp_path / "shaped")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shaped")), logits(model))


@pytest.mark.parametrize("family", [*CAUSAL, *OTHERS])
def test_every_family_goes_through_files(family, tmp_path):
    """One Linear of each, whatever the family calls it."""
    model = build(family)
    name = next(n for n, m in model.base_model.named_modules() if type(m) is nn.Linear or hasattr(m, "nf"))
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    before = model.base_model.get_submodule(name).weight
    record_shapes(model, {prefix + name: {"rank": 2}})
    assert isinstance(model.base_model.get_submodule(name), LowRankLinear)
    with torch.no_grad():
        for factor in model.base_model.get_submodule(name).parameters():
            factor.fill_(float(before[0, 0]))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        one, two = (m(**batch_for(m)).to_tuple()[0] for m in (model, again.eval()))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({"model.layers.9.mlp.up_proj": {"rank": 5}}, "expected modules of LlamaModel, got 'layers.9.mlp.up_proj'"),
        ({"lm_head": {"rank": 5}}, "expected modules inside model, got 'lm_head'"),
        ({"model.layers.1.mlp.up_proj": {"rank": 33}}, "expected a rank of layers.1.mlp.up_proj up to 32, got 33"),
        ({"model.layers.1.mlp.up_proj": {"rank": 0}}, "expected whole numbers above 0, got rank = 0 of layers.1"),
        ({"model.layers.1.mlp.up_proj": {"rank": "5"}}, "expected whole numbers above 0, got rank = '5'"),
        ({"model.layers.1.mlp.up_proj": {"width": 5}}, "expected in_features, out_features, rank, bias, sparse of"),
        ({"model.layers.1.mlp.up_proj": {"sparse": 1}}, "expected a rank with the sparse part of layers.1.mlp.up"),
        ({"model.layers.1.self_attn": {"heads": 5}}, "expected numbers that LlamaAttention layers.1.self_attn has"),
        ({"model.layers.1.self_attn": {"layer_idx": 3}}, "expected numbers that .* has, got 'layer_idx'"),
        ({"model.embed_tokens": {"embedding_dim": 3}}, "expected numbers that .* has, got 'embedding_dim'"),
        ({"model.layers.1.mlp": {"intermediate_size": 49}}, "expected intermediate_size of .* up to 48, got 49"),
    ],
)
def test_bad_shapes(shapes, message):
    with pytest.raises(ValueError, match=f"module_shapes: {message}"):
        record_shapes(build("llama"), shapes)


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    model = shaped()
    model.model.layers[0].mlp.up_proj = LowRankLinear(32, 48, 3, bias=False)
    with pytest.raises(ValueError, match=r"expected rank 3 of layers.0.mlp.up_proj, as the model has, got None"):
        model.save_pretrained(tmp_path)
    model = shaped()
    model.model.layers[1].mlp.up_proj = LowRankLinear(32, 48, 5, bias=False, sparse=True)
    with pytest.raises(ValueError, match=r"expected sparse 1 of layers.1.mlp.up_proj, as the model has, got None"):
        model.save_pretrained(tmp_path)

    class Own(LlamaForCausalLM):
        pass

    with pytest.raises(ValueError, match=r"model: expected a class of transformers or hf_cod, .*, got Own"):
        record_shapes(Own(build("llama").config), LLAMA)


def test_a_file_of_an_unknown_family(tmp_path):
    shaped().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "base_model_type": "llama9"}))
    with pytest.raises(ValueError, match="base_model_type: expected a model type of transformers, got 'llama9'"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("changed", ["up_proj", "gate_proj"])
def test_weights_keep_their_names_where_transformers_would_convert_those_of_the_family(changed, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(Dinov2Config(**DINOV2)).eval()
    record_shapes(model, {f"dinov2.encoder.layer.1.mlp.{changed}": {"rank": 3}})
    fill(model)
    pixels = torch.randn(2, 3, 8, 8)
    expected = model(pixels).logits
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert isinstance(loaded.base_model, Dinov2Model) and torch.equal(loaded(pixels).logits, expected)
    loaded.base_model.save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(base(pixels).last_hidden_state, model.base_model(pixels).last_hidden_state)
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(pixels).logits, expected)


def test_towers_with_configs_of_their_own_keep_their_names_too(tmp_path):
    """LLaVA with DINOv2 as its tower."""
    tower = Dinov2Config(**{**DINOV2, "reshape_hidden_states": False})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(**sizes, vocab_size=99, num_key_value_heads=4)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=98, vision_feature_layer=-1)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    (name,) = [name for name, _ in model.named_modules() if name.endswith("vision_tower.encoder.layer.1.mlp.up_proj")]
    record_shapes(model, {name: {"rank": 3}})
    fill(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(model.model.vision_tower).__name__ == "InnerDinov2Model"
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    pickle.loads(pickle.dumps(loaded))


def test_a_model_with_code_of_its_own_is_refused_with_what_accepts_it():
    model = build("llama")
    model.__class__ = type("Zed", (type(model),), {})
    accepts = "got Zed with code of its own; prune, drop-layers and finetune accept it"
    with pytest.raises(ValueError, match=rf"^model: expected a class of transformers or hf_cod, .*, {accepts}"):
        record_shapes(model, {})
