"""Channels of experts: fewer equal zeroed ones, each expert chooses its own, and a reload is equal."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, SwitchTransformersConfig

from hf_cod import WidthPlan, find_decoder_layers, narrow, plan_width
from hf_cod.layers.unit_discovery import find_all_units
from hf_cod.layers.units import EXPERTS
from tests.fresh_processes import run_fresh
from tests.tiny_models import MIXTURE_TYPES, batch_for, build_mixture, outputs

FAST = ("mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "dbrx", "jetmoe", "deepseek_v3")


def experts_of(model):
    """(layer, units) of each layer with experts."""
    stack = find_decoder_layers(model)
    return [(i, layer[EXPERTS]) for i, layer in enumerate(find_all_units(stack)) if layer[EXPERTS]]


def zeroed(model, plan):
    """A copy of the naive kind: the columns of the channels with the least norm are zero."""
    for index, units in experts_of(model):
        for expert in range(units.experts):
            W = units.weights_of(model, expert)
            energy = sum(
                torch.stack([R[(owners == c)].square().sum() for c in range(units.count)])
                for R, owners in ((W[name], owners) for name, owners in units.readers.items())
            )
            energy = energy + W[units.writer].square().sum(0)
            gone = energy.argsort(descending=True, stable=True)[plan.expert_channels[index] :]
            changed = W[units.writer].clone()
            changed[:, gone] = 0
            units.matrix(model, units.writer).write(expert, changed)
    return model


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.families) for kind in MIXTURE_TYPES]
)
def test_fewer_channels_equal_zeroed_ones_after_a_reload(kind, tmp_path):
    model, intact = build_mixture(kind), build_mixture(kind)
    found = experts_of(model)
    experts = [None] * 4
    for index, units in found:
        experts[index] = units.count // 2 // 8 * 8
    plan = WidthPlan(0.7, [None] * 4, [None] * 4, "mine", expert_channels=experts)
    report = narrow(model, plan, "magnitude", "none")
    torch.testing.assert_close(outputs(model), outputs(zeroed(intact, plan)), rtol=1e-4, atol=1e-4)
    lost = sum(p.numel() for p in intact.parameters()) - sum(p.numel() for p in model.parameters())
    assert lost >= sum(units.weights * (units.count - experts[index]) for index, units in found) > 0
    assert report.results["expert_channels"] == experts
    # A number of the config also counts the channels of a shared expert, or is in a config inside.
    assert report.results["stock"] == (kind not in ("dbrx", "deepseek_v3", "glm4_moe", "llama4_text"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again), outputs(model))
    batch = batch_for(model)["input_ids"]
    assert torch.equal(again.generate(batch, max_new_tokens=3), model.generate(batch, max_new_tokens=3))


@pytest.mark.parametrize("method, compensation", [("fluctuation", "least_squares"), ("taylor", "bias")])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_expert_chooses_by_its_own_tokens(kind, method, compensation, tmp_path):
    model = build_mixture(kind)
    batch = batch_for(model)
    plan = plan_width(model, 0.7, 8)
    assert all(number % 8 == 0 and number < 96 for number in plan.expert_channels)
    writer = experts_of(model)[0][1]
    before = writer.matrix(model, writer.writer).weights().clone()
    report = narrow(model, plan, method, compensation, batches=[batch], journal=tmp_path)
    assert abs(report.results["parameter_share"] - 0.7) < 8 / 96 / 2
    shares = report.layers["share_of_expert_channels"]
    assert shares == [number / 96 for number in plan.expert_channels] and "share_of_channels" not in report.layers
    assert report.results["stock"] == (compensation != "bias" or kind == "gpt_oss")  # which has biases
    assert all(0 < error < 1 for error in report.layers["error"])
    if compensation == "bias":  # the kept columns are those of the intact model
        after = writer.matrix(model, writer.writer).weights()
        kept = [
            {c for c in range(96) if (before[e][:, c, None] == after[e]).all(0).any()} for e in range(writer.experts)
        ]
        assert all(len(one) == after.shape[2] for one in kept)
        assert len({frozenset(one) for one in kept}) > 1
    again = build_mixture(kind)
    narrow(again, plan, method, compensation, batches=[batch], journal=tmp_path)
    assert torch.equal(outputs(again), outputs(model))


def test_numbers_that_kernels_do_not_take_are_refused():
    model = build_mixture("mixtral")
    with pytest.raises(ValueError, match=r"expert_channels: expected a multiple of 8, .* in 8\.\.96 in layer 0"):
        narrow(model, WidthPlan(0.7, [None] * 4, [None] * 4, "mine", expert_channels=[12] * 4), "magnitude", "none")


def test_small_experts_have_small_steps(mixture):
    """By default; with steps of 32, three quarters of the 128 channels would be as far from 0.9 as all of them."""
    load = lambda: AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)  # noqa: E731
    report = narrow(load(), 0.9, "magnitude", "none")
    assert report.results["expert_channels"] == [112] * 7 and abs(report.results["parameter_share"] - 0.9) < 8 / 128 / 2
    assert plan_width(load(), 0.8, 32).expert_channels == [96] * 7
    with pytest.raises(ValueError, match=r"all of them; keep less, or lower channel_multiple$"):
        narrow(load(), 0.9, "magnitude", "none", channel_multiple=32)
    with pytest.raises(ValueError, match=r"at least 0.\d+ in layer 0 \(one group of heads and 8 channels"):
        plan_width(load(), 0.01)
    wide = build_mixture("mixtral", intermediate_size=512)
    assert plan_width(wide, 0.7).expert_channels == [352] * 4  # in steps of 32


@pytest.mark.parametrize("compensation", ["least_squares", "bias"])
def test_experts_in_a_list_of_modules(compensation, tmp_path):
    """Switch Transformers has a dict of MLPs without biases; each gets one of its own."""
    sparse = {"num_layers": 2, "num_decoder_layers": 1, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1}
    config = SwitchTransformersConfig(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_experts=4, decoder_start_token_id=0, **sparse
    )
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    ids = torch.randint(3, 99, (3, 40), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    plan = WidthPlan(0.5, [None] * 2, [None] * 2, "mine", expert_channels=[24, 40])
    options = {"batches": [batch], "layers_path": "encoder.block", "journal": tmp_path / "journal"}
    again = deepcopy(model)
    intact = {name: p.clone() for name, p in model.named_parameters()}
    report = narrow(model, plan, "fluctuation", compensation, **options)
    assert not any("their compensation is none" in note for note in report.notes)
    for layer, number in enumerate((24, 40)):
        chosen = set()
        for expert in range(4):
            name = f"encoder.block.{layer}.layer.1.mlp.experts.expert_{expert}"
            wi, wo = model.get_submodule(f"{name}.wi"), model.get_submodule(f"{name}.wo")
            assert (wi.out_features, wo.in_features) == (number, number)
            rows = [(intact[f"{name}.wi.weight"] == row).all(1).nonzero().item() for row in wi.weight]
            chosen.add(tuple(rows))
            if compensation == "bias":
                assert torch.equal(wo.weight, intact[f"{name}.wo.weight"][:, rows]) and wo.bias.abs().sum() > 0
            else:
                assert wo.bias is None
        assert len(chosen) == 4
    narrow(again, plan, "fluctuation", compensation, **options)  # from the journal
    model.save_pretrained(tmp_path)
    for other in (again, AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            torch.testing.assert_close(other(**batch).logits, model(**batch).logits)
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in other.named_parameters())
        assert len([*other.parameters()]) == len([*model.parameters()])


def test_what_is_left_is_named():
    model = build_mixture("mixtral")
    plan = WidthPlan(0.7, [2] * 4, [None] * 4, "mine", expert_channels=[96, 48, 48, 48])
    notes = narrow(model, plan, "fluctuation", "bias", batches=[batch_for(model)]).notes
    assert "layer 0: experts keep all channels, whose number is rounded to a multiple of 8 or more" in notes
    assert "layers 1 to 3: banks of experts have no biases: their compensation is none instead of bias" in notes
    model = build_mixture("jetmoe")  # attention has a bank of its own
    plan = WidthPlan(0.7, [None] * 4, [None] * 4, "mine", expert_channels=[48] * 4)
    notes = narrow(model, plan, "magnitude", "none").notes
    assert "layers 0 to 3: self_attention.experts: not narrowed, beside a larger set of experts" in notes


FRESH = """
import sys
path, own = sys.argv[1:]
if own == "cod":
    import hf_cod
else:
    sys.modules["hf_cod"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
found = torch.load(f"{path}/found.pt")
with torch.no_grad():
    torch.testing.assert_close(model(found["ids"]).logits, found["logits"])
cached, uncached = (model.generate(found["ids"], max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
assert torch.equal(cached, uncached) and torch.equal(cached, found["generated"])
"""


@pytest.mark.process
def test_a_real_mixture_in_a_process_of_its_own(mixture, tmp_path):
    ids = torch.randint(5, 4000, (2, 12), generator=torch.Generator().manual_seed(0))
    for own, numbers in (("stock", [96] * 7), ("cod", [64, 72, 80, 88, 96, 104, None])):
        model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
        plan = WidthPlan(0.8, [None] * 7, [None] * 7, "mine", expert_channels=numbers)
        report = narrow(model, plan, batches=[{"input_ids": ids}])
        assert report.results["stock"] == (own == "stock")
        folder = tmp_path / own
        model.save_pretrained(folder)
        generated = model.generate(ids, max_new_tokens=6, do_sample=False)
        with torch.no_grad():
            torch.save({"ids": ids, "logits": model(ids).logits, "generated": generated}, folder / "found.pt")
        done = run_fresh(FRESH, folder, own)
        assert done.returncode == 0, done.stderr[-2000:]
