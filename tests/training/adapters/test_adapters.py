"""OwLore adapters through PEFT's own doors: made, trained, saved, loaded, merged, exported."""

import copy

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import save_as_lora
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from examples.tiny_architectures import build as build_type
from hf_cod import LayerScores, OwLoreAdamW, OwLoreConfig, owlore, pack_sparse
from hf_cod.training.adapters import registry
from hf_cod.training.owlore.increment import Increment
from tests.compression.quantization.matrices import mixed
from tests.fresh_processes import run_fresh
from tests.tiny_models import batch_for, build, build_mixture
from tests.training.owlore.references import galore

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(7))


def adapted(family="llama", r=4, dtype=torch.float32, **settings):
    return get_peft_model(build(family, dtype=dtype).train(), OwLoreConfig(r=r, **settings))


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def trained(family="llama", steps=5, **settings):
    """An adapter that has folded and has a basis, too."""
    model = adapted(family, **settings)
    train(model, OwLoreAdamW(model, lr=1e-2, n_active=2, interval=2), steps)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def exact_basis(G, r, generator):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return Vh[:r].T if G.shape[0] >= G.shape[1] else U[:, :r]


def test_an_adapter_learns_what_the_optimizer_learns(monkeypatch):
    """In float64, to 1e-10, within an interval and over several; both get the basis of a full SVD."""
    for module in ("increment", "moments"):
        monkeypatch.setattr(f"hf_cod.training.owlore.{module}.gradient_basis", exact_basis)
    plain = build("llama").double().train()
    for name, p in plain.named_parameters():
        p.requires_grad_("norm" not in name)  # an adapter trains matrices alone
    model = adapted(dtype=torch.float64, max_rank=32)
    optimizers = [OwLoreAdamW(m, lr=1e-2, n_active=2, interval=4, **k) for m, k in ((plain, {"rank": 4}), (model, {}))]
    draws = set()
    for step in range(14):
        draws.add(tuple(optimizers[1].active))
        assert optimizers[0].active == optimizers[1].active
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            train(m, optimizer, 1, step)
        merged = copy.deepcopy(model).merge_and_unload()
        for (name, p), q in zip(plain.named_parameters(), merged.parameters(), strict=True):
            torch.testing.assert_close(q, p, atol=1e-10, rtol=0, msg=name)
    assert len(draws) > 1 and max(model.lost_energy().values()) < 1e-20


def test_one_interval_is_galore_as_its_paper_defines_it(monkeypatch):
    monkeypatch.setattr("hf_cod.training.owlore.increment.gradient_basis", exact_basis)
    model = adapted(dtype=torch.float64)
    optimizer, states = OwLoreAdamW(model, lr=1e-2, n_active=4, interval=50), {}
    for step in range(6):
        weights = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
        ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(step))
        weights(input_ids=ids, labels=ids).loss.backward()
        train(model, optimizer, 1, step)
        after = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
        for name, w in weights.named_parameters():
            if "proj" in name:
                expected = galore(w.detach(), w.grad, states.setdefault(name, {}), 1e-2, 4, step == 0, 1.0)
                torch.testing.assert_close(after[name], expected, atol=1e-10, rtol=0, msg=name)


LOADS = """
import sys, torch, transformers
from hf_cod import OwLoreConfig
from peft import AutoPeftModelForCausalLM, PeftModel
ids, folder = torch.load(sys.argv[1] + "/ids.pt"), sys.argv[1]
base = transformers.AutoModelForCausalLM.from_pretrained(folder + "/base")
one = PeftModel.from_pretrained(base, folder + "/adapter")
two = AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter")
with torch.no_grad():
    torch.save([m(input_ids=ids).logits for m in (one, two)], folder + "/logits.pt")
"""

LOADS_LORA = """
import sys, torch, transformers
from peft import PeftModel
folder = sys.argv[1]
base = transformers.AutoModelForCausalLM.from_pretrained(folder + "/base")
model = PeftModel.from_pretrained(base, folder + "/lora")
with torch.no_grad():
    torch.save(model(input_ids=torch.load(folder + "/ids.pt")).logits, folder + "/logits.pt")
assert "hf_cod" not in sys.modules
"""


def in_a_fresh_process(code, folder):
    torch.save(IDS, folder / "ids.pt")
    done = run_fresh(code, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "missing adapter keys" not in done.stderr
    return torch.load(folder / "logits.pt")


@pytest.mark.process
def test_saved_small_and_loaded_in_a_fresh_process(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base").train(), OwLoreConfig(r=4))
    train(model, OwLoreAdamW(model, lr=1e-2, n_active=1, interval=50), 3)
    model.eval().save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    numbers = sum(value.numel() for key, value in saved.items() if not key.endswith("lost"))
    # One of four layers has learnt; N and P of each matrix are r (m + n) numbers.
    layer = build("llama").model.layers[0]
    assert numbers == sum(4 * (m.in_features + m.out_features) for m in layer.modules() if hasattr(m, "in_features"))
    for found in in_a_fresh_process(LOADS, tmp_path):
        torch.testing.assert_close(found, logits(model), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(logits(model), logits(build("llama")), atol=1e-3)


@pytest.mark.parametrize("saved", ["whole", "weights alone"])
def test_a_config_makes_another_adapter_that_trains(saved, tmp_path):
    config = OwLoreConfig(r=4)
    model = get_peft_model(build("llama").train(), config)
    train(model, OwLoreAdamW(model, lr=1e-2, n_active=1, interval=50), 1)
    if saved == "whole":
        model.save_pretrained(tmp_path)
        assert not config.held and PeftConfig.from_pretrained(tmp_path).held
    else:
        get_peft_model_state_dict(model)
    again = get_peft_model(build("llama").train(), config)
    train(again, OwLoreAdamW(again, lr=1e-2, n_active=1, interval=50), 2)
    assert not torch.allclose(logits(again.eval()), logits(build("llama")), atol=1e-3)


@pytest.mark.process
@pytest.mark.parametrize("rank", [16, 0.9999])
def test_exported_to_a_lora_that_loads_without_us(rank, tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base").train(), OwLoreConfig(r=4))
    train(model, OwLoreAdamW(model, lr=1e-2, n_active=2, interval=2), 5)
    model.eval()
    save_as_lora(
        tmp_path / "lora", model, rank=rank
    )  # of increments of rank 3 x 4 at most, or a share of their squares
    found, base = in_a_fresh_process(LOADS_LORA, tmp_path), logits(build("llama"))
    assert (found - logits(model)).norm() <= (1e-4 if rank == 16 else 0.05) * (logits(model) - base).norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_disabled_merged_and_unmerged(family):
    model = trained(family)
    whole = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build(family)))
    assert torch.equal(logits(model), whole) and not torch.allclose(whole, logits(build(family)), atol=1e-3)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), whole, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), whole, atol=1e-5, rtol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), whole, atol=1e-5, rtol=1e-4)
    assert not [m for m in merged.modules() if isinstance(m, Increment)]


def test_several_adapters_share_a_base(tmp_path):
    model = trained()
    first = logits(model)
    model.save_pretrained(tmp_path)
    model.add_adapter("second", OwLoreConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("second")
    base = logits(build("llama"))
    assert torch.equal(logits(model), base)
    train(model.train(), OwLoreAdamW(model, lr=1e-2, n_active=1, interval=2), 3)
    second = logits(model.eval())
    model.set_adapter("default")
    assert torch.equal(logits(model), first) and not torch.allclose(second, base, atol=1e-3)
    model.load_adapter(tmp_path, "third")
    model.delete_adapter("default")
    model.set_adapter("third")
    torch.testing.assert_close(logits(model), first)
    model.base_model.set_adapter(["second", "third"])
    both = model.merge_and_unload()
    q = both.model.layers[0].self_attn.q_proj.weight - build("llama").model.layers[0].self_attn.q_proj.weight
    assert q.abs().max() > 0


def test_the_base_does_not_move_and_others_rest():
    model = adapted()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "owlore" not in name}
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=1, interval=3)
    train(model, optimizer, 2)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if "owlore" not in name)
    for index, layer in enumerate(model.base_model.model.model.layers):
        for m in layer.modules():
            if isinstance(m, Increment):
                assert m.N.requires_grad == m.has_basis == (index == optimizer.active[0])
                used = m.N.untyped_storage().nbytes() + m.P.untyped_storage().nbytes()
                assert used == (0 if m.resting else 4 * (m.N.numel() + m.P.numel()))
    with model.disable_adapter():  # as TRL does for the model of reference
        pass
    now = {name for name, p in model.named_parameters() if p.requires_grad}
    assert now and all(f".layers.{optimizer.active[0]}." in name for name in now)


def test_what_is_folded_is_bounded_and_what_is_lost_is_told():
    model = adapted(max_rank=6, dtype=torch.float64)
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=4, interval=2)
    module = model.base_model.model.model.layers[1].mlp.up_proj.owlore_increment["default"]
    fold, lost = module.fold, []

    def watched():
        before = module.dense().detach()
        fold()
        lost.append(float((module.dense().detach() - before).square().sum()))

    module.fold = watched
    for step in range(8):
        train(model, optimizer, 1, step)
        assert module.A.shape[0] == min(6, 4 * ((step + 1) // 2)) and module.has_basis == (step % 2 == 0)
    assert lost[0] < 1e-20 and min(lost[1:]) > 1e-10
    kept = float(module.dense().detach().square().sum())
    assert model.lost_energy()["model.layers.1.mlp.up_proj"] == pytest.approx(sum(lost) / (sum(lost) + kept), rel=1e-6)


def test_lost_energy_is_of_the_active_adapter():
    model = trained(r=4, max_rank=5)
    model.add_adapter("second", OwLoreConfig(r=2))
    first = model.lost_energy()
    assert max(first.values()) > 0
    model.set_adapter("second")
    assert not any(model.lost_energy().values()) and model.lost_energy("default") == first
    with pytest.raises(ValueError, match="adapter_name: expected one of default, second, got 'typo'"):
        model.lost_energy("typo")


def test_truncation_loses_what_it_says():
    increment = Increment(20, 30, rank=4, max_rank=5, dtype=torch.float64)
    increment.B, increment.A = torch.randn(30, 5).double(), torch.randn(5, 20).double()
    increment.P = torch.linalg.qr(torch.randn(20, 4).double()).Q
    increment.N.data = torch.randn(30, 4).double()
    whole = increment.dense().detach()
    increment.fold()
    S = torch.linalg.svdvals(whole)
    assert float(increment.dense().detach().sub(whole).square().sum()) == pytest.approx(
        float(S[5:].square().sum()), rel=1e-6
    )
    assert increment.lost_energy() == pytest.approx(float(S[5:].square().sum() / S.square().sum()), rel=1e-6)


def test_bfloat16_base():
    model = adapted(dtype=torch.bfloat16)
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=4, interval=4)
    losses = [train(model, optimizer, 1, 0)[0] for _ in range(10)]
    increment = next(m for m in model.modules() if isinstance(m, Increment))
    assert losses[-1] < losses[0] - 0.05
    assert increment.N.dtype == increment.A.dtype == torch.float32
    whole = logits(model.eval())
    assert whole.dtype == torch.bfloat16
    merged, base = logits(model.merge_and_unload()), logits(build("llama", dtype=torch.bfloat16))
    assert (merged - whole).norm() < 0.1 * (whole - base).norm()  # the sum is rounded to bfloat16, too


def test_folding_on_a_bfloat16_base_loses_what_it_tells_alone():
    model = adapted(dtype=torch.bfloat16, max_rank=32)
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=4, interval=2)
    increments = [m for m in model.modules() if isinstance(m, Increment)]
    for step in range(8):
        before = [m.dense().detach().clone() for m in increments]
        optimizer.increments.fold()
        for m, dense in zip(increments, before, strict=True):
            assert float((m.dense() - dense).norm()) <= 1e-5 * float(dense.norm())
        optimizer.increments.begin(optimizer.active, 0, optimizer.draw)
        train(model, optimizer, 1, step)
    assert all(len(m.A) >= 16 for m in increments) and not any(float(m.lost) > 1e-9 for m in increments)


def test_converted_once_the_optimizer_exists():
    """The base becomes bfloat16; what an adapter learns stays float32."""
    model = adapted()
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=4, interval=3)
    train(model, optimizer, 2)
    model.to(torch.bfloat16)
    losses = [train(model, optimizer, 1, 0)[0] for _ in range(8)]
    increments = [m for m in model.modules() if isinstance(m, Increment)]
    assert losses[-1] < losses[0] - 0.03
    assert {t.dtype for m in increments for t in (m.N, m.P, m.A, m.B)} == {torch.float32}
    assert model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16


def test_four_bit_base(tmp_path):
    """bitsandbytes' NF4, after an evaluation, which on some CPUs repacks the weights."""
    from bitsandbytes import functional
    from transformers import BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128}
    build("llama", dtype=torch.bfloat16, **sizes).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)  # noqa: E731
    base = load()
    logits(base)
    model = get_peft_model(base, OwLoreConfig(r=8)).train()
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=2, interval=4)
    bytes_before = {n: p.detach().clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    losses = [train(model, optimizer, 1, 0)[0] for _ in range(10)]
    assert losses[-1] < losses[0] - 0.05
    assert bytes_before and all(torch.equal(dict(model.named_parameters())[n], p) for n, p in bytes_before.items())
    whole = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), whole, atol=0.05, rtol=0.05)
    module = model.base_model.model.model.layers[optimizer.active[0]].mlp.up_proj
    assert not module.base_layer.support_avx512bf16_for_cpu
    codes, state = functional.quantize_4bit(
        (module.get_base_weight().float() + module.get_delta_weight("default")).bfloat16(), quant_type="nf4"
    )
    index, merged = optimizer.active[0], model.merge_and_unload()
    weight = merged.model.layers[index].mlp.up_proj.weight
    found = functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(found, functional.dequantize_4bit(codes, state))


def test_mixed_three_and_four_bit_base(tmp_path):
    """Trained, saved, loaded, switched off, and exported to a LoRA on the same base."""
    base = logits(mixed().eval())
    model = get_peft_model(mixed(), OwLoreConfig(r=8)).train()
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=2, interval=3)
    codes = {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    losses = [train(model, optimizer, 1, 0)[0] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05
    assert codes and all(torch.equal(dict(model.named_parameters())[n], p) for n, p in codes.items())
    whole = logits(model.eval())
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(mixed(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), whole)
    save_as_lora(tmp_path / "lora", model, rank=24)  # max_rank 16 and r 8
    lora = PeftModel.from_pretrained(mixed(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(lora), whole, atol=1e-4, rtol=1e-4)


class Opaque(torch.nn.Module):
    """A matrix that nobody can read: Linear-like by its two attributes alone."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", (linear.weight.detach() * 100).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) / 100).T


def test_any_linear_like_base():
    model = build("llama").train()
    for layer in model.model.layers:
        layer.mlp.up_proj = Opaque(layer.mlp.up_proj)
    model = get_peft_model(model, OwLoreConfig(r=4))
    losses = train(model, OwLoreAdamW(model, lr=1e-2, n_active=4, interval=2), 6, 0)
    up = model.base_model.model.model.layers[0].mlp.up_proj
    assert up.get_delta_weight("default").abs().max() > 0 and all(loss > 0 for loss in losses)
    with pytest.raises(ValueError, match="merge: expected a weight that can be written, got Opaque"):
        model.merge_and_unload()


def test_packed_base():
    """Matrices without their zeros: learnt beside; a merge is refused as for every adapter."""
    model = build("llama").train()
    for layer in model.model.layers:
        for m in layer.modules():
            if isinstance(m, torch.nn.Linear):
                m.weight.data[m.weight.abs() < m.weight.abs().median() * 1.5] = 0
    model = get_peft_model(pack_sparse(model), OwLoreConfig(r=4))
    train(model, OwLoreAdamW(model, lr=1e-2, n_active=4, interval=2), 5)
    assert model.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default").abs().max() > 0


@pytest.mark.slow
def test_compiled():
    found = []
    for compiled in (False, True):
        model = adapted()
        optimizer = OwLoreAdamW(model, lr=1e-2, n_active=2, interval=2)
        train(torch.compile(model, backend="eager") if compiled else model, optimizer, 5)
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_transformers_own_loading(tmp_path):
    """`load_adapter` of a model, without a PeftModel around it."""
    model = trained()
    model.save_pretrained(tmp_path)
    other = build("llama")
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(other.eval()), logits(model), atol=1e-6, rtol=1e-5)


def test_low_memory_loading(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(other.eval()), logits(model))


FIRST = "base_model.model.model.layers.0.mlp.up_proj.owlore_increment."
DAMAGED = {
    "lost": lambda saved: saved.pop(FIRST + "lost"),
    "N and P of": lambda saved: saved.pop(FIRST + "N"),
    r"columns of P and B of .*got \(0": lambda saved: [saved.pop(FIRST + name) for name in "NP"],
    "no tensors": lambda saved: [saved.pop(key) for key in [*saved] if ".layers.0." in key],
    "finite": lambda saved: saved.update({FIRST + "N": saved[FIRST + "N"] * float("nan")}),
    "floating": lambda saved: saved.update({FIRST + "N": saved[FIRST + "N"].int()}),
    "'foo'": lambda saved: saved.update({"foo": torch.ones(1)}),
    "layers.9": lambda saved: saved.update({FIRST.replace("0", "9") + "lost": torch.ones(())}),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_an_adapter_with_other_tensors_is_refused(tmp_path, message):
    """PEFT only warns of missing tensors: the base model would be taken for the adapted one."""
    model = adapted()
    train(model, OwLoreAdamW(model, lr=1e-2, n_active=4, interval=50), 2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    DAMAGED[message](saved)
    save_file(saved, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"adapter: expected .*, got .*({message})|adapter: expected .*({message})"):
        PeftModel.from_pretrained(build("llama"), tmp_path)


def test_auto_class_loads(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), OwLoreConfig(r=4))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(again.peft_config["default"], OwLoreConfig) and again.peft_config["default"].r == 4


def test_the_hook_fits_this_peft():
    """One more member of an enum that is otherwise as it was; adding it again does nothing."""
    from peft.utils import PeftType

    member = registry.peft_type()
    assert member is PeftType.OWLORE is PeftType("OWLORE") is registry.peft_type() and member == "OWLORE"
    assert list(PeftType).count(member) == 1 and PeftType.LORA in list(PeftType)
    registry.register(OwLoreConfig, object)
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[member].__name__ == "OwLoreModel"


def test_a_peft_that_cannot_be_extended_is_told(monkeypatch):
    class Closed:
        __members__ = ()

        def __new__(cls):
            raise TypeError

    monkeypatch.setattr(registry, "PeftType", Closed)
    with pytest.raises(ImportError, match="peft: expected a version whose list of methods can be extended"):
        registry.peft_type()


def test_an_export_that_would_load_into_experts_is_refused(tmp_path):
    """PEFT reads the names of DeepSeek-V3's first MLP as those of experts."""
    with pytest.raises(TypeError, match="OwLoreLinear"):
        save_as_lora(tmp_path, adapted("deepseek_v3"), rank=4)
    attention = adapted("deepseek_v3", target_modules=["o_proj"])
    save_as_lora(tmp_path, attention, rank=4)


def test_adapters_of_shared_weights_are_refused():
    """Each use would get an adapter of its own, and merging would add all of them to the one weight."""
    message = "^model: expected a separate weight for each matrix, got .*shared_transformer"
    for config in (OwLoreConfig(r=4), OwLoreConfig(r=4, target_modules=["q_proj"])):
        with pytest.raises(ValueError, match=message):
            get_peft_model(build_type("zamba2"), config)
    model = get_peft_model(build_type("zamba2"), OwLoreConfig(r=4, target_modules=["in_proj"]))
    assert any("owlore_increment" in name for name, _ in model.named_parameters())


def test_experts_without_adapters_are_told(caplog):
    adapted("mixtral", exclude_modules=["down_proj"])
    assert "% of its weights never train: model.layers.*.mlp.experts.down_proj" in caplog.text


@pytest.mark.parametrize(
    "config, message",
    [
        ({"r": 0}, "r: expected at least 1, got 0"),
        ({"r": 4, "max_rank": 0}, "max_rank: expected at least 1, got 0"),
        ({"r": 64}, "r: expected at most 32, the width of the layers' matrices, got 64"),
        ({"r": 4, "target_modules": ["lm_head"]}, "target_modules: expected matrices of the layers in model.layers"),
        ({"r": 4, "target_modules": ["mlp"]}, "target_modules: expected matrices of the layers"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(build("llama"), OwLoreConfig(**config))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_active": 5}, "n_active: expected between 1 and the model's 4 layers, got 5"),
        ({"n_active": 1, "rank": 8}, r"rank: expected none with an OwLore adapter, got 8; set OwLoreConfig"),
        ({"n_active": 1, "deselected": "keep"}, "deselected: expected none with an OwLore adapter, got 'keep'"),
        (
            {"n_active": 1, "scores": LayerScores("other", "owl", [1.0] * 4, [7] * 4)},
            "scores: expected those of a model with .* weights in layer 0, got one with 7 .other.",
        ),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        OwLoreAdamW(adapted(), **arguments)


def test_only_layers_with_adapters_are_drawn():
    model = adapted(layers_to_transform=[2, 3])
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=1, interval=1)
    seen = set()
    for step in range(8):
        seen.update(optimizer.active)
        train(model, optimizer, 1, step)
    assert seen == {2, 3}


def test_training_without_our_optimizer_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="optimizer: expected OwLoreAdamW, which"):
        model(**batch_for(model), labels=batch_for(model)["input_ids"])
    with torch.no_grad():
        model(**batch_for(model))


def test_gradients_that_are_not_finite_are_skipped(caplog):
    """In the step that looks for a basis and in later ones; then the search goes on."""
    model = adapted()
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=2, interval=50)
    before = copy.deepcopy(model.state_dict())
    spoiled = float("nan")
    (model(input_ids=IDS, labels=IDS).loss * spoiled).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert "gradients are not finite" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    train(model, optimizer, 2)
    after = copy.deepcopy(model.state_dict())
    assert after.keys() > before.keys()  # there are bases now
    (model(input_ids=IDS, labels=IDS).loss * spoiled).backward()
    optimizer.step()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_three_lines_are_the_same_factory():
    optimizer_cls, arguments = owlore(n_active=1, interval=3, lr=1e-2)
    assert isinstance(optimizer_cls()(adapted(), **arguments), OwLoreAdamW)


def test_the_default_rank_is_lowered_to_the_width(caplog, tmp_path):
    """With a note, and to what a file holds."""
    model = get_peft_model(build("llama"), OwLoreConfig())
    assert "r: 32 instead of the default 128: the width of the layers' matrices" in caplog.text
    model.save_pretrained(tmp_path)
    assert type(OwLoreConfig.from_pretrained(tmp_path).r) is int and OwLoreConfig.from_pretrained(tmp_path).r == 32


FAMILIES = {
    # Adds to the output of a matrix in place.
    "falcon": {"hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "parallel_attn": True},
    # Its router is a Linear that returns a tuple.
    "phimoe": {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    # Multiplies a weight without calling its module.
    "mamba": {"hidden_size": 32, "time_step_rank": 16},
}


def of_family(kind):
    torch.manual_seed(0)
    common = {"vocab_size": 99, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**common, **FAMILIES[kind]))


@pytest.mark.parametrize("kind, excluded", [("falcon", None), ("phimoe", "router"), ("mamba", "dt_proj")])
def test_each_adapter_has_an_effect(kind, excluded, caplog):
    """Each matrix that gets one trains; the others are told, and refused where they are named."""
    base = of_family(kind)
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, OwLoreConfig(r=4)).train()
    assert (excluded is None) == ("gets no adapter" not in caplog.text) and str(excluded or "") in caplog.text
    train(model, OwLoreAdamW(model, lr=1e-2, n_active=2), 2)
    increments = {name: m for name, m in model.named_modules() if isinstance(m, Increment)}
    assert increments and all(m.dense().any() for m in increments.values())
    assert not any(f".{excluded}." in name for name in increments)
    plain = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(plain[name], tensor) for name, tensor in before.items())
    if excluded:
        with pytest.raises(ValueError, match=f"target_modules: expected other matrices than .*{excluded}"):
            get_peft_model(of_family(kind), OwLoreConfig(r=4, target_modules=[excluded]))


def test_a_matrix_that_is_applied_by_groups_gets_no_adapter(caplog):
    model = get_peft_model(build_mixture("deepseek_v4"), OwLoreConfig(r=4))
    adapted = [name for name, m in model.named_modules() if isinstance(m, Increment)]
    assert any("o_b_proj" in name for name in adapted) and not any("o_a_proj" in name for name in adapted)
    assert "o_a_proj gets no adapter: a DeepseekV4GroupedLinear, which computes something else" in caplog.text


def test_a_first_gradient_through_a_change_in_place():
    """Equal to the gradient of a model that adds without changing its output."""
    gradients = []
    for in_place in (True, False):
        torch.manual_seed(0)
        increment = Increment(6, 4, rank=4, max_rank=4)
        increment.begin(0)
        x, y = torch.randn(3, 6), torch.randn(3, 4, requires_grad=True)
        out = increment(y * 1, x)
        out = out.mul_(3).add_(y) if in_place else 3 * out + y
        out.pow(2).sum().backward()
        gradients.append((y.grad, increment.N.grad))
    assert all(g is not None and g.any() for g in gradients[0])
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected)
