"""OwLore adapters on banks of experts, through PEFT's own doors, on all families of mixtures."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_cod import OwLoreAdamW, OwLoreConfig, find_decoder_layers
from hf_cod.training.adapters.bank import OwLoreBank
from hf_cod.training.owlore.bank_increment import BankIncrement
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.methods import set_up
from tests.fresh_processes import run_fresh
from tests.tiny_models import MIXTURE_TYPES, build_mixture
from tests.training.adapters.test_adapters import IDS, logits, train

FAST = ("mixtral", "gpt_oss", "jetmoe", "llama4_text")
BANK = "base_model.model.model.layers.1.mlp.experts"
# Adapters on banks of experts stacked in two dimensions are refused: see test_adapter_targets.py.
KINDS = [pytest.param(k, marks=[] if k in FAST else pytest.mark.families) for k in MIXTURE_TYPES if k != "dbrx"]


def adapted(base, steps=0, r=4, n_active=4, interval=2, **settings):
    model = get_peft_model(copy.deepcopy(base).train(), OwLoreConfig(r=r, **settings))
    train(model, OwLoreAdamW(model, lr=1e-2, n_active=n_active, interval=interval), steps)
    return model


def banks(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BankIncrement)}


@pytest.mark.parametrize("kind", KINDS)
def test_banks_are_adapted_and_exported(kind, tmp_path):
    """For each orientation of a bank; PEFT's LoRA gives the same logits."""
    base = build_mixture(kind)
    before = logits(base)
    model = adapted(base, 5, n_active=2)
    stack = find_decoder_layers(base)
    assert len(banks(model)) == sum(len(stack.expert_matrices(index)) for index in range(4)) > 0
    assert any(m.learnt for m in banks(model).values())
    whole = logits(model.eval())
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own").eval()
    assert torch.equal(logits(again), whole) and not torch.allclose(whole, before, atol=0.1)
    model.save_as_lora(tmp_path / "lora")
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(lora), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model.merge_and_unload()), whole, atol=1e-4, rtol=1e-4)


LOADS = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base, folder = sys.argv[1:]
load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
models = {"lora": PeftModel.from_pretrained(load(), folder + "/lora")}
assert "hf_cod" not in sys.modules
import hf_cod
models["own"] = PeftModel.from_pretrained(load(), folder + "/own")
models["auto"] = AutoPeftModelForCausalLM.from_pretrained(folder + "/own", dtype=torch.float32)
ids = torch.load(folder + "/ids.pt")
with torch.no_grad():
    torch.save({name: model.eval()(input_ids=ids).logits for name, model in models.items()}, folder + "/logits.pt")
"""


@pytest.mark.process
def test_a_real_mixture_in_a_fresh_process(mixture, tmp_path):
    """Bit by bit as an OwLore adapter; as LoRA without this package, up to rounding."""
    base = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    model = adapted(base, 5, r=8)
    model.eval().save_pretrained(tmp_path / "own")
    rank = model.save_as_lora(tmp_path / "lora")
    assert rank == 24 and len(banks(model)) == 14, "two folded updates of rank 8 and the current one"
    torch.save(IDS, tmp_path / "ids.pt")
    done = run_fresh(LOADS, mixture, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "missing adapter keys" not in done.stderr
    found, expected = torch.load(tmp_path / "logits.pt"), logits(model)
    assert torch.equal(found["own"], expected) and torch.equal(found["auto"], expected)
    torch.testing.assert_close(found["lora"], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, logits(base.eval()), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_half_precision(kind, dtype, tmp_path):
    """The adapter is float32; a merge rounds as the sums are rounded, after which a token may be routed otherwise."""
    base = build_mixture(kind).to(dtype)
    model = adapted(base)
    optimizer = OwLoreAdamW(model, lr=1e-2, n_active=4, interval=4)
    losses = [train(model, optimizer, 1, 0)[0] for _ in range(10)]
    assert losses[-1] < losses[0] - 0.05
    assert {t.dtype for m in banks(model).values() for t in (m.N, m.P, m.A, m.B)} == {torch.float32}
    whole = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert whole.dtype == dtype and torch.equal(logits(again), whole)
    sums = {name: m(find_bank(model, name), turned(model, name)) for name, m in banks(model).items()}
    merged = model.merge_and_unload()
    for name, total in sums.items():
        assert torch.equal(merged.get_parameter(name_of(name)), total) and total.dtype == dtype
    assert (logits(merged) - whole).norm() < 0.2 * (whole - logits(base.eval())).norm()


def name_of(increment):
    """Name of the parameter that an increment is added to, in the base model."""
    bank, _, key = increment.removeprefix("base_model.model.").partition(".owlore_increment.default.")
    return f"{bank}.{key}"


def find_bank(model, increment):
    bank, _, key = name_of(increment).rpartition(".")
    return getattr(model.get_submodule(f"base_model.model.{bank}").base_layer, key).detach()


def turned(model, increment):
    bank, _, key = name_of(increment).rpartition(".")
    return model.get_submodule(f"base_model.model.{bank}").turned[key]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
def test_gradients_under_activation_checkpointing(kind):
    """Equal bit by bit, in the step that looks for bases, in one with bases and in one with a folded update."""
    found = []
    for checkpointing in (False, True):
        model = get_peft_model(build_mixture(kind).train(), OwLoreConfig(r=4))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer, steps = OwLoreAdamW(model, lr=1e-2, n_active=3, interval=2), []
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            steps.append({name: m.N.grad.clone() for name, m in banks(model).items() if m.N.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
        found.append(steps)
    for plain, again in zip(*found, strict=True):
        assert len(plain) >= 6 and plain.keys() == again.keys()
        assert all(torch.equal(again[name], G) and G.any() for name, G in plain.items())


def test_several_adapters_on_one_bank(tmp_path):
    """Of other matrices and ranks; each alone, both at once, and what is left when one is deleted."""
    base = build_mixture("mixtral")
    before = logits(base)
    model = adapted(base, 3)
    first = logits(model.eval())
    model.add_adapter("second", OwLoreConfig(r=2, target_parameters=["experts.down_proj"]))
    model.set_adapter("second")
    assert torch.equal(logits(model), before)
    train(model.train(), OwLoreAdamW(model, lr=1e-2, n_active=4, interval=2), 3)
    second = logits(model.eval())
    assert not torch.allclose(second, before, atol=1e-2) and not torch.allclose(second, first, atol=1e-2)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    module = model.get_submodule(BANK)
    assert isinstance(module, OwLoreBank)
    assert [*module.of("default")] == ["gate_up_proj", "down_proj"] and [*module.of("second")] == ["down_proj"]
    W = module.base_layer.down_proj.detach().clone()
    deltas = {name: module.get_delta_weight(name, "down_proj") for name in ("default", "second")}
    assert module.of("second")["down_proj"].rank == 2
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged.model.layers[1].mlp.experts.down_proj, W + deltas["default"] + deltas["second"])
    torch.testing.assert_close(logits(merged), both, atol=1e-4, rtol=1e-4)
    model.merge_adapter(adapter_names=["second"])
    torch.testing.assert_close(module.base_layer.down_proj.detach(), W + deltas["second"])
    model.unmerge_adapter()
    torch.testing.assert_close(module.base_layer.down_proj.detach(), W)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "second", "third")
    model.set_adapter("third")
    torch.testing.assert_close(logits(model), second, atol=1e-5, rtol=1e-5)
    rank = model.save_as_lora(tmp_path / "lora")
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(lora), second, atol=1e-4, rtol=1e-4)
    assert rank == 4 and len(lora.peft_config["default"].target_parameters) == 4 == len(banks(model)) / 2


SIZES = {
    "one expert": {"num_local_experts": 1, "num_experts": 1, "num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 4},
    "experts without tokens": {"num_local_experts": 64, "num_experts": 64, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "jetmoe"])
def test_one_expert_all_experts_and_experts_without_tokens(kind, sizes, tmp_path):
    base = build_mixture(kind, **SIZES[sizes])
    model = adapted(base, 3)
    whole = logits(model.eval())
    model.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own").eval()
    assert torch.equal(logits(again), whole) and whole.isfinite().all()
    moved = [bool(D.any()) for m in banks(model).values() for D in m.dense()]
    assert any(moved) and all(moved) == (sizes != "experts without tokens")
    if (kind, sizes) == ("gpt_oss", "one expert"):
        with pytest.raises(
            ValueError, match=r"^adapter: expected a bank of two experts or more, got one .*\(out, in\)"
        ):
            model.save_as_lora(tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
    else:
        model.save_as_lora(tmp_path / "lora")
        lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
        torch.testing.assert_close(logits(lora), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model.merge_and_unload()), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["owlore", "lisa", "galore", "owlore-peft", "lora"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_banks_are_refused_in_one_line(method, place, tmp_path):
    base = build_mixture("mixtral")
    disk_offload(base, tmp_path) if place == "disk" else cpu_offload(base, torch.device("cpu"))
    before = logits(base)
    how = OwLoreSettings(n_active=2, rank=4 if "owlore" in method else None)
    said = r"^model: expected weights in memory, got offloaded ones in model.layers.0[\w.]+; load the model without off"
    with pytest.raises(ValueError, match=said):
        set_up(method, base, None, how, 1e-2, 4)[1].step()
    assert torch.equal(logits(base), before)
