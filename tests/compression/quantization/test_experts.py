"""Banks of experts in three and four bits: what they compute, how they are stored, what they are rounded to."""

import copy
import gc
import sys

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForCausalLM

from hf_cod import OwlBnbConfig, collect_statistics, drop_experts, find_decoder_layers, narrow, prune, quantize
from hf_cod.compression.quantization import bnb_decoding
from hf_cod.compression.quantization.experts import QuantizedExperts
from hf_cod.compression.quantization.quantizer import _Quantize
from hf_cod.training.runs.memory import LiveStorages
from tests import references as naive_models
from tests.compression.quantization import references
from tests.compression.quantization.test_quantizer import DISK, FRESH, equal_files, rewrite
from tests.fresh_processes import run_fresh
from tests.tiny_models import MIXTURE_TYPES, batch_for, build_mixture, tiny_config, unmapped_outputs

WIDTHS = "hidden_size intermediate_size intermediate_size_mlp moe_intermediate_size shared_expert_intermediate_size"
BANK = "model.layers.3.mlp.experts"


def mixture(kind="mixtral", **sizes):
    """A tiny mixture whose matrices fill blocks of 32."""
    if kind == "dbrx":
        return build_mixture(kind, ffn_hidden_size=64, **sizes)
    known = tiny_config(kind).to_dict()
    widths = {name: 64 for name in WIDTHS.split() if known.get(name) is not None}
    return build_mixture(kind, **{**widths, **sizes})


def quantized(kind="mixtral", bits=3.5, batches=None, **sizes):
    model = mixture(kind, **sizes)
    report = quantize(model, OwlBnbConfig(bits=bits, block=32), batches=batches)
    return model, report


@torch.no_grad()
def logits(model, batch=None):
    return model(**(batch or batch_for(model))).logits


def banks(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedExperts)}


def tokens(count=320):
    return {"input_ids": torch.randint(3, 99, (8, count // 8), generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("kind", MIXTURE_TYPES)
def test_every_weight_counts_and_what_is_stored_is_what_runs(kind, tmp_path):
    model, report = quantized(kind, 3.8 if kind == "dbrx" else 3.5)
    stack = find_decoder_layers(model)
    assert report.results["bits"] == pytest.approx(3.8 if kind == "dbrx" else 3.5, abs=0.02)
    weights = sum(stack.count_weights(index) for index in range(4))
    dense = sum(m.weight.numel() for i in range(4) for m in stack.linears(i).values() if not hasattr(m, "scales"))
    assert sum(report.layers["parameters"]) + dense == weights and dense < weights / 30
    packed = banks(model)
    assert {matrix.name for i in range(4) for matrix in stack.expert_matrices(i)} == packed.keys()
    assert {width for m in packed.values() for width in m.widths} <= {3, 4}
    stored = sum(
        t.nbytes for m in model.modules() if hasattr(m, "scales") for n, t in m.state_dict().items() if n != "bias"
    )
    assert stored == report.results["planned_bytes"]
    expected = logits(model)
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(unmapped_outputs(loaded), unmapped_outputs(model))
    assert {name: m.bits for name, m in banks(loaded).items()} == {name: m.bits for name, m in packed.items()}
    loaded.save_pretrained(tmp_path / "two")
    assert equal_files(tmp_path / "one", tmp_path / "two")
    loaded.dequantize()
    assert not banks(loaded) and not loaded.is_quantized
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    loaded.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(again), logits(loaded), atol=1e-5, rtol=1e-5)


def storages():
    """Address -> bytes of each storage of numbers that is in memory."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
    real = [one for one in found if one.is_floating_point() and one.device.type == "cpu"]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in real}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "dbrx", "jetmoe"])
def test_banks_that_are_quantized_while_loading(kind, tmp_path, monkeypatch):
    """One bank at a time is dense."""
    model = mixture(kind)
    model.save_pretrained(tmp_path)
    of_banks = {m.parameter.nbytes for i in range(4) for m in find_decoder_layers(model).expert_matrices(i)}
    config = OwlBnbConfig(bits=3, block=32)
    dense, convert = [], _Quantize._of_experts
    before = storages()

    def watched(self, model, name, W):
        sizes = [size for place, size in storages().items() if place not in before and size in of_banks]
        dense.append((sizes, W.nbytes))
        return convert(self, model, name, W)

    with monkeypatch.context() as patch:
        patch.setattr(_Quantize, "_of_experts", watched)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert len(dense) == len(banks(loaded)) and all(sizes == [size] for sizes, size in dense)
    model, _ = quantized(kind, 3)
    assert banks(loaded).keys() == banks(model).keys()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "stored")
    assert not any(p.is_floating_point() and p.dim() == 3 for p in loaded.parameters())
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stored")), logits(loaded))


@pytest.mark.process
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_fresh_process_computes_the_same_bit_by_bit(kind, tmp_path):
    model, _ = quantized(kind)
    model.bfloat16().save_pretrained(tmp_path)
    done = run_fresh(FRESH, tmp_path, tmp_path / "logits.pt")
    assert done.returncode == 0 and "UNEXPECTED" not in done.stderr, done.stderr
    ids = torch.arange(3, 12)[None]
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path), {"input_ids": ids})
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_all_implementations_of_the_interface(kind):
    model, _ = quantized(kind)
    expected = logits(model)
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_dtypes(kind, dtype):
    model, _ = quantized(kind)
    exact = logits(model)
    state = {key: tensor for key, tensor in model.state_dict().items() if ".scales." in key}
    model.to(dtype)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    assert logits(model).dtype == dtype
    dense = copy.deepcopy(model).dequantize()
    assert dense.state_dict().keys() == mixture(kind).state_dict().keys()
    error = float((logits(model) - logits(dense)).float().norm() / exact.norm())
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)  # a token may be routed otherwise


def test_an_expert_without_tokens_is_neither_decoded_nor_multiplied(monkeypatch):
    model, _ = quantized()
    router = model.model.layers[3].mlp.gate.weight
    with torch.no_grad():
        router[2] = -(router[0] + router[1] + router[3])
    ran, product = [], QuantizedExperts.product

    def watched(self, tensors, x, expert):
        ran.append((self, expert, len(x)))
        return product(self, tensors, x, expert)

    monkeypatch.setattr(QuantizedExperts, "product", watched)
    monkeypatch.setattr(QuantizedExperts, "decoded", None)
    logits(model, {"input_ids": torch.tensor([[5]])})
    down = banks(model)[f"{BANK}.down_proj"]
    assert len([expert for module, expert, _ in ran if module is down]) == 2
    assert all(count == 1 for _, _, count in ran)


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])
@pytest.mark.parametrize("sizes", [{"num_local_experts": 1, "num_experts_per_tok": 1}, {"num_experts_per_tok": 4}])
def test_one_expert_and_all_experts(kind, sizes):
    model, report = quantized(kind, batches=[tokens()], **sizes)
    assert report.results["bits"] == pytest.approx(3.5, abs=0.05)
    torch.testing.assert_close(logits(model), logits(copy.deepcopy(model).dequantize()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_memory_beyond_the_weights_is_that_of_two_experts(implementation):
    """Also of the activations of 64 tokens; a bank that is decoded as a whole has eight."""
    model, _ = quantized(num_local_experts=8, hidden_size=256, intermediate_size=256, vocab_size=99)
    model.set_experts_implementation(implementation)
    bank = model.model.layers[3].mlp.experts
    one = (2 * 256 * 256 + 256 * 256) * 4
    for count in (1, 64):
        x = torch.randn(count, 256)
        index = torch.stack([torch.arange(count) % 8, (torch.arange(count) + 3) % 8], 1)
        counter = LiveStorages()
        counter.add([*bank.parameters(), x, index], "weights")
        with counter:
            bank(x, index, torch.full((count, 2), 0.5))
        assert 0 < counter.peak.total() - counter.peak["weights"] <= 2 * one


@pytest.mark.parametrize(
    "kind, implementation",
    [
        *[(kind, name) for kind in ("mixtral", "gpt_oss") for name in ("eager", "grouped_mm", "batched_mm")],
        *[("llama4_text", None), ("jetmoe", None)],  # outside of the interface
    ],
)
def test_gradients_of_what_is_before_the_experts(kind, implementation):
    """As in QLoRA: the packed weights have none."""
    model, _ = quantized(kind)
    dense = copy.deepcopy(model).dequantize()
    if implementation:
        model.set_experts_implementation(implementation)
    found = []
    for each in (model, dense):
        each.requires_grad_(False)
        each.get_input_embeddings().weight.requires_grad_(True)
        each(**batch_for(each)).logits.square().sum().backward()
        found.append(each.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


def test_adapters_are_trained_beside_packed_experts():
    model, _ = quantized("qwen3_moe")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(3):
        losses.append(adapted(**tokens(40), labels=tokens(40)["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert all(torch.equal(t, before[name]) for name, t in adapted.unload().state_dict().items())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_each_expert_is_compensated_by_its_own_tokens(kind):
    """Against the optimal brain quantizer, written out, with the tokens that were routed to the expert."""
    model, intact = mixture(kind).double(), mixture(kind).double()
    batch = tokens()
    quantize(model, OwlBnbConfig(bits=3, block=32), batches=[batch])
    intact.set_experts_implementation("eager")  # the others know no float64
    matrix = find_decoder_layers(intact).expert_matrices(0)[0]
    module = banks(model)[matrix.name]
    inputs = naive_models.routed_experts(intact, batch)[matrix.bank]
    for expert in (0, 3):
        x = inputs[expert][2]
        assert 16 < len(x) < 320
        _, scales = module.matrix_of(module(), expert)
        s = bnb_decoding.dequantize_scales(*scales).double().view(128, -1)
        W = matrix.read(expert)
        H = x.T @ x
        for channel in range(64):
            H[channel, channel] *= 1 + 64 / len(x)
        expected = references.compensated(W[:3], s[:3], H, 3, 32, 0.01)
        torch.testing.assert_close(module.decoded(module(), expert, torch.float64)[:3], expected, atol=1e-6, rtol=1e-6)


def test_compensation_loses_least_and_few_tokens_are_noted():
    batches = [tokens()]
    dense, lost = logits(mixture(), batches[0]), {}
    for kind, given in (("nearest", None), ("compensated", batches)):
        model, report = quantized(bits=3, batches=given)
        lost[kind] = float((logits(model, batches[0]) - dense).norm())
    assert lost["compensated"] < lost["nearest"]
    assert all(0 < error < 0.2 for error in report.layers["error"])
    assert not any("tokens" in note or "token " in note for note in report.notes)
    model, report = quantized(bits=3, batches=[{"input_ids": torch.tensor([[5, 9, 20]])}])
    (few,) = [note for note in report.notes if "weighted scales" in note]
    unseen = [note for note in report.notes if note.startswith("no token entered")]
    seen = int(few.split()[0])
    assert seen + len(unseen) == 4 * 4 * 2 and unseen and f"{BANK}.down_proj.0" in few + " ".join(unseen)
    assert "fewer tokens entered them than 1/16 of their input channels" in few


def test_statistics_weight_the_scales_of_each_expert():
    model = mixture()
    statistics = collect_statistics(model, [batch_for(model)])
    quantize(model, OwlBnbConfig(bits=3, block=32, statistics=statistics))
    plain, _ = quantized(bits=3)
    name = f"{BANK}.down_proj"
    assert not torch.equal(banks(model)[name].scales.absmax, banks(plain)[name].scales.absmax)


def test_a_killed_run_on_a_mixture_resumes(tmp_path, monkeypatch):
    batches, options = [tokens(40)], {"bits": 3.5, "block": 32}
    whole = mixture()
    expected = quantize(whole, OwlBnbConfig(**options), batches=batches)
    change = sys.modules["hf_cod.compression.quantization.quantize"]._LayerChange
    call = change.__call__

    def dying(self, index, sums):
        if index == 2:
            raise KeyboardInterrupt
        return call(self, index, sums)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(change, "__call__", dying)
        quantize(mixture(), OwlBnbConfig(**options), batches=batches, journal=tmp_path)
    resumed = mixture()
    report = quantize(resumed, OwlBnbConfig(**options), batches=batches, journal=tmp_path)
    assert report.notes == expected.notes and report.layers == expected.layers
    assert all(torch.equal(tensor, resumed.state_dict()[key]) for key, tensor in whole.state_dict().items())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text", "jetmoe", "dbrx"])
def test_experts_of_a_quantized_model_are_observed(kind):
    model, _ = quantized(kind, 4 if kind == "dbrx" else 3.5)
    dense = copy.deepcopy(model).dequantize()
    found, expected = (collect_statistics(each, [batch_for(each)]) for each in (model, dense))
    assert found.squares.keys() == expected.squares.keys()
    for name, squares in expected.squares.items():
        torch.testing.assert_close(found.squares[name], squares, atol=1e-3, rtol=1e-3)
    for index in range(4):
        weights, others = (dict(find_decoder_layers(each).matrices(index)) for each in (model, dense))
        assert all(torch.equal(W, others[name]) for name, W in weights.items())


PARTS = ["self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate", "mlp.experts"]
IN_MEMORY = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
IN_MEMORY = dict.fromkeys([*IN_MEMORY, *(f"model.layers.{i}.{part}" for i in range(4) for part in PARTS)], "cpu")
HALVES = {name: "cpu" for name in IN_MEMORY if name != BANK}
HALVES |= {f"{BANK}.gate_up_proj": "cpu", f"{BANK}.down_proj": "disk"}
PLACES = {
    "layers on disk": {"device_map": DISK},
    "experts on disk": {"device_map": {**IN_MEMORY, BANK: "disk"}},
    "one matrix of a bank on disk": {"device_map": HALVES},
    "by memory": {"device_map": "auto", "max_memory": {"cpu": 90_000}},
}


@pytest.mark.parametrize("place", PLACES)
def test_banks_on_several_devices(place, tmp_path):
    model, _ = quantized()
    model.save_pretrained(tmp_path / "stored")
    options = {**PLACES[place], "offload_folder": tmp_path / "offload"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", **options)
    found = {m.is_meta for m in banks(loaded).values()}
    assert banks(loaded)[f"{BANK}.down_proj"].is_meta and found == {False, True}
    for name in ("grouped_mm", "batched_mm", "eager"):
        loaded.set_experts_implementation(name)
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"^model: expected weights in memory, got offloaded ones in \S+; load"
    ) as error:
        loaded.dequantize()
    assert "\n" not in str(error.value)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    assert equal_files(tmp_path / "stored", tmp_path / "again")


def test_packed_banks_that_are_offloaded_later(tmp_path):
    for offload, *where in ((cpu_offload, torch.device("cpu")), (disk_offload, tmp_path)):
        model, _ = quantized(bits=3)
        expected = logits(model)
        offload(model, *where)
        assert banks(model)[f"{BANK}.down_proj"].is_meta and torch.equal(logits(model), expected)


def test_banks_that_go_to_disk_while_they_are_quantized(tmp_path):
    mixture().save_pretrained(tmp_path / "dense")
    config = OwlBnbConfig(bits=3, block=32)
    options = {"device_map": {**IN_MEMORY, BANK: "disk"}, "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match=rf"device_map: expected no quantized layer on disk, got {BANK}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, **options)


CHANGES = {
    "prune": lambda model, batches: prune(model, 0.5, batches=batches),
    "quantize": lambda model, batches: quantize(model, bits=3, block=32, batches=batches),
    "drop_experts": lambda model, batches: drop_experts(model, 0.5, batches=batches),
    "narrow": lambda model, batches: narrow(model, 0.8, channel_multiple=8, batches=batches),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_banks_are_refused_in_one_line(change, place, tmp_path):
    model = mixture()
    disk_offload(model, tmp_path) if place == "disk" else cpu_offload(model, torch.device("cpu"))
    expected = logits(model)
    with pytest.raises(ValueError, match=r"^model: expected weights in memory, got offloaded ones") as error:
        CHANGES[change](model, [tokens()])
    assert "\n" not in str(error.value) and torch.equal(logits(model), expected)


class Einsum(nn.Module):
    """Experts that run all at once, by something else than a product of matrices."""

    def __init__(self, bank):
        super().__init__()
        self.num_experts, self.down_proj = bank.num_experts, bank.down_proj

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return torch.einsum("nd,eod->no", hidden_states, self.down_proj)


def test_banks_that_cannot_be_packed_are_named():
    model = mixture()
    experts = model.model.layers[1].mlp.experts
    model.model.layers[1].mlp.experts = Einsum(experts)
    before = model.model.layers[1].mlp.experts.down_proj
    report = quantize(model, OwlBnbConfig(bits=3, block=32, skip=["layers.2.mlp.experts.gate"]))
    left = {note.split(" is not quantized: ")[0]: note for note in report.notes if " is not quantized: " in note}
    assert "packed matrices, got another use of all of them" in left.pop("model.layers.1.mlp.experts.down_proj")
    assert left.pop("model.layers.2.mlp.experts.gate_up_proj").endswith("skipped") and not left
    assert model.model.layers[1].mlp.experts.down_proj is before
    assert len(banks(model)) == 5 and logits(model).isfinite().all()
    names = [matrix.key for matrix in find_decoder_layers(model).expert_matrices(2)]
    assert names == ["gate_up_proj", "down_proj"], "a packed matrix keeps its place beside a dense one"


def test_a_choice_of_banks():
    model = mixture()
    quantize(model, OwlBnbConfig(bits=3, block=32, include=["experts"], exclude=["layers.0.mlp.experts"]))
    assert len(banks(model)) == 6 and type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_digits_for_another_number_of_experts(tmp_path):
    name = f"{BANK}.down_proj"
    with pytest.raises(ValueError, match="bits: expected 3 or 4, or a digit for each of 4 experts, got 343 for"):
        quantize(mixture(), OwlBnbConfig(modules={name: "343"}))
    with pytest.raises(ValueError, match="modules: expected 3 or 4 bits each, got"):
        OwlBnbConfig(modules={name: "3435"})
    model = mixture()
    quantize(model, OwlBnbConfig(block=32, modules={name: "4343", "model.layers.0.self_attn.q_proj": 4}))
    assert banks(model)[name].widths == [4, 3, 4, 3]
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{name}.scales.offset"))
    with pytest.raises(ValueError, match=rf"{name}.scales.offset: expected it in the checkpoint, got none"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
