"""LoRA on every matrix of the layers, banks of experts included, and what the report says of the others."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconH1Config

from examples.tiny_architectures import build as build_type
from hf_cod import LayerScores, OwLoreAdamW, find_decoder_layers, lora_ranks, perplexity, quantize
from hf_cod.io.packing import pack
from hf_cod.io.text import embedded_text
from hf_cod.layers.checks import pruned_matrices, sizes_of
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.adapter_targets import adapter_targets
from hf_cod.training.runs.methods import adapter_notes, set_up
from tests.fresh_processes import run_fresh
from tests.tiny_models import MIXTURE_TYPES, build_mixture, unmapped_outputs

IDS = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(7))


def trained(model, steps=3, lora_rank=2, **choice):
    """Wrapped by LoRA and trained; the losses."""
    wrapped, optimizer = set_up("lora", model, None, OwLoreSettings(**choice), 1e-2, lora_rank)
    losses = []
    for _ in range(steps):
        loss = wrapped.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return wrapped.eval(), losses


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def adapted_names(wrapped):
    """Name of each matrix with a LoRA layer -> that layer."""
    found = {}
    for name, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            is_linear = isinstance(module.get_base_layer(), torch.nn.Linear)
            bank = "" if is_linear else f".{module.parameter_name}"
            found[name.replace(".base_layer", "") + bank] = module
    return found


MISREAD = ("deepseek_v3", "glm4_moe", "qwen3_next")
RARE = ("qwen2_moe", "qwen3_next", "olmoe", "glm4_moe")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.families if kind in RARE else []) for kind in MIXTURE_TYPES]
)
def test_each_target_is_adapted_with_the_rank_and_merged(kind, tmp_path):
    """Also matrices beside the experts that PEFT takes for experts by their names (`MISREAD`)."""
    model = build_mixture(kind)
    before, targets = copy.deepcopy(model.state_dict()), adapter_targets(find_decoder_layers(model))
    wrapped, losses = trained(model)
    layers = adapted_names(wrapped)
    assert layers.keys() == {*targets.modules, *targets.banks} and losses[-1] < losses[0]
    assert all(layer.r == {"default": 2} and layer.scaling["default"] == 2 for layer in layers.values())
    assert bool(targets.misread) == (kind in MISREAD) and bool(targets.banks) == (kind != "dbrx")
    expected = logits(wrapped)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    after = merged.state_dict()
    assert after.keys() == before.keys()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(unmapped_outputs(again), unmapped_outputs(merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {*targets.banks, *(f"{name}.weight" for name in targets.modules)}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_expert_has_a_product_of_its_own(kind):
    """W_e + (alpha / r) B_e A_e, for both orientations of a bank."""
    model = build_mixture(kind)
    stack = find_decoder_layers(model)
    before = {m.name: m.weights().clone() for i in range(4) for m in stack.expert_matrices(i)}
    wrapped, _ = trained(model)
    factors = {
        name: (layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone())
        for name, layer in adapted_names(wrapped).items()
        if name in before
    }
    wrapped.merge_and_unload()
    for matrix in (m for i in range(4) for m in stack.expert_matrices(i)):
        A, B = factors[matrix.name]
        for expert in range(matrix.experts):
            # Rank by rank of one expert in A, expert by expert of one rank in B.
            of_expert = B[:, expert :: matrix.experts] @ A[2 * expert : 2 * expert + 2]
            expected = before[matrix.name][expert] + 2 * of_expert
            torch.testing.assert_close(matrix.weights()[expert], expected, atol=1e-5, rtol=1e-5)


LOADS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconH1Config
folder = sys.argv[1]
ids = torch.load(folder + "/ids.pt")
for kind in sys.argv[2].split():
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/{kind}")
    model = PeftModel.from_pretrained(base, f"{folder}/{kind}-adapter").eval()
    assert "hf_cod" not in sys.modules
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, f"{folder}/{kind}.pt")
"""


@pytest.mark.process
def test_adapters_load_in_a_fresh_process_without_us(tmp_path):
    kinds = ["mixtral", "gpt_oss", "deepseek_v3"]
    torch.save(IDS, tmp_path / "ids.pt")
    expected = {}
    for kind in kinds:
        build_mixture(kind).save_pretrained(tmp_path / kind)
        wrapped, _ = trained(AutoModelForCausalLM.from_pretrained(tmp_path / kind))
        wrapped.save_pretrained(tmp_path / f"{kind}-adapter")
        expected[kind] = logits(wrapped)
    done = run_fresh(LOADS, tmp_path, " ".join(kinds))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "missing adapter keys" not in done.stderr
    for kind in kinds:
        assert torch.equal(torch.load(tmp_path / f"{kind}.pt"), expected[kind])


def test_banks_are_chosen_by_name():
    stack = find_decoder_layers(build_mixture("mixtral"))
    everything = {*adapter_targets(stack).modules, *adapter_targets(stack).banks}
    for choice, expected in (
        ({"include": ["experts"]}, {name for name in everything if ".experts." in name}),
        ({"exclude": ["experts"]}, {name for name in everything if ".experts." not in name}),
        ({"include": [r".*\.1\..*down_proj"]}, {"model.layers.1.mlp.experts.down_proj"}),
    ):
        wrapped, _ = trained(build_mixture("mixtral"), 1, **choice)
        assert adapted_names(wrapped).keys() == expected


def test_ranks_by_score_reach_banks():
    model = build_mixture("qwen3_moe")
    scores = LayerScores("tiny", "owl", [3.0, 1.0, 2.0, 1.0], sizes_of(find_decoder_layers(model)))
    how = lora_ranks(model, scores, r=4)
    config = LoraConfig(**how, **adapter_targets(find_decoder_layers(model)).for_lora())
    for name, layer in adapted_names(get_peft_model(model, config)).items():
        rank = [*how["rank_pattern"].values()][int(name.split(".")[2])]
        assert layer.r == {"default": rank} and layer.scaling["default"] == 2, name


def test_only_the_sampled_layers_banks_train():
    wrapped, _ = trained(build_mixture("mixtral"), 0)
    optimizer = OwLoreAdamW(wrapped, lr=1e-2, n_active=1, rank=None)
    wrapped.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, layer in adapted_names(wrapped).items() if layer.lora_B["default"].weight.any()}
    assert moved and {int(name.split(".")[2]) for name in moved} == {*optimizer.active}
    assert any(".experts." in name for name in moved)


def test_notes_count_what_has_adapters_and_what_has_none():
    note = lambda kind, method: adapter_notes(method, find_decoder_layers(build_mixture(kind)), OwLoreSettings())  # noqa: E731
    assert note("mixtral", "lora") == [
        "24 matrices, 8 of them in banks of experts, with adapters: 159,744 of 159,744 weights (100.0%)",
        "512 weights of the layers without adapters, because they are in no matrix: MixtralTopKRouter (512)",
    ]
    assert note("mixtral", "full") == []
    assert note("mixtral", "owlore-peft") == note("mixtral", "lora")
    stacked, routers = note("dbrx", "lora")[1], note("llama4_text", "lora")[1]
    assert stacked.startswith("12 matrices of 73,728 weights without adapters (experts stacked in a parameter of two")
    assert routers.startswith("4 matrices of 512 weights without adapters (a Llama4Router, whose output is more than")


@pytest.mark.parametrize("method", ["lora", "owlore-peft"])
def test_notes_count_without_banks_too(method):
    """The gates of the recurrence are three-dimensional weights in no matrix."""
    stack = find_decoder_layers(build_type("recurrent_gemma"))
    counted, *others = adapter_notes(method, stack, OwLoreSettings())
    total = sum(stack.count_weights(index) for index in range(len(stack)))
    assert counted.endswith(f"with adapters: {total:,} of {total:,} weights (100.0%)")
    gates = sum(p.numel() for name, p in stack.model.named_parameters() if "rg_lru" in name and p.dim() == 3)
    assert len(others) == 1 and f"RecurrentGemmaRglru ({gates:,})" in others[0]


def test_gates_that_start_at_zero_are_not_pruned():
    stack = find_decoder_layers(build_type("recurrent_gemma"))
    biases = [p for name, p in stack.model.named_parameters() if name.endswith("gate_bias")]
    for bias in biases:
        bias.data.zero_()
    assert biases[0].dim() == 2 and pruned_matrices(stack) == []
    matrix = next(iter(stack.linears(0).values())).weight
    matrix.data.zero_()
    assert [id(p) for p in pruned_matrices(stack)] == [id(matrix)]


def test_packed_banks_have_none_beside_matrices_that_do():
    model = build_mixture("mixtral")
    quantize(model, bits=4.0)
    notes = adapter_notes("lora", find_decoder_layers(model), OwLoreSettings())
    assert notes[0] == "16 matrices with adapters: 12,288 of 159,744 weights (7.7%)"
    assert notes[1].startswith("8 matrices of 147,456 weights without adapters (a bank of packed experts; PEFT adapts")
    wrapped, losses = trained(model, 6)
    assert losses[-1] < losses[0] and not any(".experts." in name for name in adapted_names(wrapped))


def test_a_learned_text_of_the_real_mixture(mixture):
    """Adapters on banks alone lower the perplexity of the embedded text."""
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    windows = pack(AutoTokenizer.from_pretrained(mixture), [embedded_text()], 64)[:24].long()
    batches = [{"input_ids": part} for part in windows.split(8)]
    before = perplexity(model, batches)
    wrapped, optimizer = set_up("lora", model, None, OwLoreSettings(include=["experts"]), 3e-3, 4)
    for _ in range(5):
        for batch in batches:
            wrapped.train()(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert perplexity(wrapped.merge_and_unload(), batches) < 0.95 * before


@pytest.mark.parametrize("method", ["lora", "owlore-peft"])
def test_what_peft_refuses_gets_no_adapter_and_is_counted(method):
    """PEFT adds no LoRA to the output projections of Mamba; OwLore's adapters learn on them."""
    model = AutoModelForCausalLM.from_config(
        FalconH1Config(
            vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            head_dim=16, num_key_value_heads=1, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
            mamba_chunk_size=8,
        )
    )  # fmt: skip
    before = copy.deepcopy(model)
    stack, settings = find_decoder_layers(model), OwLoreSettings(rank=2, n_active=2)
    targets, notes = adapter_targets(stack, lora=method == "lora"), adapter_notes(method, stack, settings)
    refused = [f"model.layers.{i}.mamba.out_proj" for i in (0, 1)] if method == "lora" else []
    assert [*targets.left] == refused and ("PEFT adds no LoRA" in " ".join(notes)) == bool(refused)
    scores = LayerScores("tiny", "owl", [1.0, 1.0], sizes_of(stack))
    wrapped, optimizer = set_up(method, model, scores, settings, 1e-2, 2)
    for _ in range(3):
        wrapped.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = wrapped.merge_and_unload()
    for (name, W), (_, old) in zip(merged.named_parameters(), before.named_parameters(), strict=True):
        if name.endswith("out_proj.weight"):
            assert torch.equal(W, old) == (method == "lora"), name
