import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_cod.models import LLAMA_PRESETS, PLACEMENTS, CodLlamaForCausalLM, llama_preset

from .tiny import LLAMA_CASES, inputs, tiny_model, tokens


def gradients(model, **batch):
    model.zero_grad()
    model(**batch).logits.square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("model_type", "placement"), [*LLAMA_CASES, ("cod_qwen3", "lns"), ("cod_vit", "lns")])
def test_gradient_checkpointing_changes_no_gradient(model_type, placement, reentrant):
    model = tiny_model(model_type, placement).train()
    expected = gradients(model, **inputs(model_type))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    handle = model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    if model_type == "cod_vit":
        batch = {"pixel_values": inputs(model_type)["pixel_values"].requires_grad_()}
    else:
        batch = inputs(model_type)
        model.enable_input_require_grads()
    got = gradients(model, **batch)
    handle.remove()
    assert len(calls) == 2  # once forward, once again for the backward pass
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 1e-6 * (1 + gradient.abs().max()), name


@pytest.mark.parametrize(("model_type", "placement"), [*LLAMA_CASES, ("cod_olmo", "lns"), ("cod_olmo2", "reordered")])
def test_lora_trains_saves_loads_and_merges(model_type, placement, tmp_path):
    base = tiny_model(model_type, placement)
    plain = base(tokens()).logits
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    got = model(tokens()).logits
    assert (got - plain).abs().max() > 1e-3
    got.sum().backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora" in name
    }
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_type, placement), tmp_path)
    assert (loaded(tokens()).logits - got).abs().max() <= 1e-6
    merged = loaded.merge_and_unload()
    assert isinstance(merged, type(tiny_model(model_type, placement)))
    assert (merged(tokens()).logits - got).abs().max() <= 1e-4  # merging rounds the weights


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_trainer_learns_a_batch_by_heart(placement, tmp_path):
    torch.manual_seed(0)
    model = CodLlamaForCausalLM(tiny_model("cod_llama", placement).config)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
    )
    before = model(tokens(8, 12), labels=tokens(8, 12)).loss.item()
    Trainer(model, arguments, train_dataset=rows).train()
    assert model(tokens(8, 12), labels=tokens(8, 12)).loss.item() < before - 0.5


# Millions of parameters in the papers: 134.1, 247.4, 368.0, 1339.1; 7B has Llama's 6738.4.
@pytest.mark.parametrize(
    ("size", "millions"), [("130M", 134.1), ("250M", 247.4), ("350M", 368.0), ("1B", 1339.1), ("7B", 6738.4)]
)
def test_presets_have_the_papers_sizes(size, millions):
    with torch.device("meta"):
        model = CodLlamaForCausalLM(llama_preset(size, "mix"))
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1) == millions
    layers = model.config.num_hidden_layers
    post = sum(type(layer.placement).__name__ == "PostNorm" for layer in model.model.layers)
    assert post == {12: 3, 24: 6, 32: 8}[layers]


def test_presets_take_fields_and_name_themselves():
    config = llama_preset("130M", vocab_size=49152, num_hidden_layers=6)
    assert (config.norm_placement, config.vocab_size, config.num_hidden_layers) == ("lns", 49152, 6)
    with pytest.raises(ValueError, match=f"size: expected one of {', '.join(LLAMA_PRESETS)}, got '3B'"):
        llama_preset("3B")


def test_the_snippet_of_the_docs_runs_and_its_model_too():
    text = (Path(__file__).parents[2] / "docs/concepts/placements.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    names: dict = {}
    with torch.device("meta"):  # the first model is large
        exec(snippet, names)
    assert names["model"].config.norm_placement == "mix"
    model = type(names["model"])(names["config"])
    assert model(tokens(1, 5)).logits.isfinite().all()
