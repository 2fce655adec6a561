"""Factors of banks of experts in three and four bits: what they are rounded by, stored as, and compute."""

import copy
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_cod import (
    LayerAllocation,
    OwlBnbConfig,
    collect_statistics,
    factorize,
    find_decoder_layers,
    plan_bits,
    quantize,
    score_experts,
)
from hf_cod.analysis.statistics.input_products import ProductsRecorder
from hf_cod.compression.quantization import bnb_decoding
from hf_cod.compression.quantization.experts import QuantizedExperts
from hf_cod.compression.quantization.factor_inputs import inputs_of
from hf_cod.models.factors import LowRankExperts
from tests.compression.quantization import references
from tests.compression.quantization.test_experts import BANK, DISK, banks, logits, mixture, tokens
from tests.compression.quantization.test_quantizer import equal_files
from tests.tiny_models import MIXTURE_TYPES, unmapped_outputs

DOWN = f"{BANK}.down_proj"
FAST = ("mixtral", "gpt_oss", "dbrx")  # (out, in); (in, out) with biases; stacks of 2-D parameters
KINDS = [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.families) for kind in MIXTURE_TYPES]


def factored(kind="mixtral", basis="own", **sizes):
    model = mixture(kind, **sizes)
    factorize(model, 0.6, "plain", expert_basis=basis)
    return model


def parts_of(model, index=3):
    return {part.name: part for matrix in find_decoder_layers(model).expert_matrices(index) for part in matrix.parts()}


@pytest.mark.parametrize("basis", ["own", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_what_runs(kind, basis, tmp_path):
    model = factored(kind, basis)
    stack, state = find_decoder_layers(model), model.state_dict()
    total, intact = sum(stack.count_weights(index) for index in range(4)), copy.deepcopy(model)
    report = quantize(model, OwlBnbConfig(bits=3, block=32), batches=[tokens()])
    dense = sum(m.weight.numel() for i in range(4) for m in stack.linears(i).values() if not hasattr(m, "scales"))
    assert sum(report.layers["parameters"]) + dense == total and dense < total / 10
    factors = [m for m in model.modules() if isinstance(m, LowRankExperts)]
    assert len(banks(model)) == 2 * len(factors) > 0
    assert all(isinstance(part, QuantizedExperts) for m in factors for part in (m.reduce, m.expand))
    stored = [m for m in model.modules() if hasattr(m, "scales")]
    sizes = [t.nbytes for m in stored for name, t in m.state_dict().items() if name != "bias"]
    assert sum(sizes) == report.results["planned_bytes"]
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(unmapped_outputs(loaded), unmapped_outputs(model))
    loaded.save_pretrained(tmp_path / "two")
    assert equal_files(tmp_path / "one", tmp_path / "two")
    loaded.dequantize()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in state.items()}
    loaded.save_pretrained(tmp_path / "dense")
    assert torch.equal(
        unmapped_outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), unmapped_outputs(loaded)
    )
    intact.save_pretrained(tmp_path / "intact")
    config = OwlBnbConfig(bits=3, block=32)
    at_once = AutoModelForCausalLM.from_pretrained(tmp_path / "intact", quantization_config=config)
    quantize(intact, config)
    assert {*banks(at_once)} == {*banks(model)}
    torch.testing.assert_close(logits(at_once), logits(intact), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("basis", ["own", "shared"])
@torch.no_grad()
def test_each_factor_by_the_inputs_of_its_own_tokens(basis, monkeypatch):
    """A by those of the experts that read it; B by A x, with A as it is stored."""
    model, intact, batch = factored("mixtral", basis).double(), factored("mixtral", basis).double(), tokens()
    quantize(model, OwlBnbConfig(bits=3, block=32), batches=[batch])
    intact.config._experts_implementation = "eager"  # the others know no float64
    dense, packed = (one.model.layers[0].mlp.experts.gate_up_proj for one in (intact, model))
    inputs, product = {}, LowRankExperts.product

    def noted(self, tensors, x, expert):
        inputs.update({expert: x} if self is dense else {})
        return product(self, tensors, x, expert)

    monkeypatch.setattr(LowRankExperts, "product", noted)
    intact(**batch)
    inputs = [inputs[expert] for expert in range(4)]
    A = [packed.factor("reduce", e, torch.float64) for e in range(4)]
    cases = {"reduce": inputs, "expand": [x @ A[e].T for e, x in enumerate(inputs)]}
    for name, rows in cases.items():
        module, of_all = getattr(packed, name), packed.shared == f"shared_{name}"
        for expert in [0] if of_all else [0, 3]:
            x = torch.cat(rows) if of_all else rows[expert]
            W, found = dense.factor(name, expert, torch.float64), packed.factor(name, expert, torch.float64)
            _, scales = module.matrix_of(module(), expert)
            s = bnb_decoding.dequantize_scales(*scales).double().view(len(W), -1)
            H = x.T @ x
            H += torch.diag(H.diagonal()) * (W.shape[1] / len(x))
            expected = references.compensated(W[:3], s[:3], H, 3, 32, 0.01)
            torch.testing.assert_close(found[:3], expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_products_of_factors():
    model = factored(basis="shared")
    stack = find_decoder_layers(model)
    sums = ProductsRecorder(stack, [3])
    with sums.attached():
        sums.start(tokens())
        model(**tokens())
        sums.finish(0)
    parts = parts_of(model)
    of_all = inputs_of(parts[f"{DOWN}.expand"], sums)
    expected = 0
    for e in range(4):
        A = parts[f"{DOWN}.reduce"].read(e)
        expected = expected + A @ sums.of(DOWN, e) @ A.T
        torch.testing.assert_close(inputs_of(parts[f"{DOWN}.reduce"], sums).of("", e), sums.of(DOWN, e))
    torch.testing.assert_close(of_all.of("", 0), expected)
    assert of_all.count("", 0) == sum(sums.count(DOWN, e) for e in range(4)) == 640
    squares = collect_statistics(model, [tokens()])
    assert inputs_of(parts[f"{DOWN}.expand"], squares).of("", 0) is None
    assert torch.equal(inputs_of(parts[f"{DOWN}.reduce"], squares).of("", 1), squares.of(DOWN, 1))
    assert inputs_of(parts[f"{DOWN}.reduce"], None) is None


def test_compensation_and_statistics_lose_less():
    intact, lost = factored(), {}
    given = {"nearest": {}, "squares": {"statistics": collect_statistics(intact, [tokens()])}, "products": {}}
    for kind, more in given.items():
        model = copy.deepcopy(intact)
        batches = [tokens()] if kind == "products" else None
        report = quantize(model, OwlBnbConfig(bits=3, block=32, **more), batches=batches)
        lost[kind] = float((logits(model, tokens()) - logits(intact, tokens())).norm())
    assert lost["products"] < lost["squares"] < lost["nearest"]
    assert all(0 < error < 0.2 for error in report.layers["error"])


def test_four_bits_by_expert_and_by_matrix():
    model = factored(basis="shared")
    scores = score_experts(model, method="reap", batches=[tokens()])
    plan = plan_bits(model, 5.5, expert_scores=scores, block=32)
    assert plan.stored == pytest.approx(5.5, abs=0.05)  # the codes of one matrix
    best = max((value, name, e) for name, values in scores.values.items() for e, value in enumerate(values))
    own = [plan.widths(f"{best[1]}.{part}")[best[2]] for part in ("gate_up_proj.expand", "down_proj.reduce")]
    shared = [plan.widths(f"{best[1]}.{part}") for part in ("gate_up_proj.reduce", "down_proj.expand")]
    assert own == [4, 4] and shared == [[4], [4]]
    stack = find_decoder_layers(model)
    names = [name for index in range(4) for name in stack.input_shapes(index)]
    values, sizes = dict.fromkeys(names, 3.0) | {DOWN: 4.0}, [stack.count_weights(index) for index in range(4)]
    allocation = LayerAllocation("bits", 3.1, [3.1] * 4, sizes, "given", None, "a", sizes, "module", values)
    bits = quantize(model, OwlBnbConfig(allocation=allocation, block=32)).results["module_bits"]
    assert {name for name, width in bits.items() if width == 4} == {f"{DOWN}.reduce", f"{DOWN}.expand"}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_implementations_dtypes_and_gradients(kind):
    model = factored(kind)
    quantize(model, OwlBnbConfig(bits=4, block=32))
    dense = copy.deepcopy(model).dequantize()
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        torch.testing.assert_close(logits(model), logits(dense), atol=1e-4, rtol=1e-4)
    found = []
    for each in (model, dense):
        each.requires_grad_(False)
        each.get_input_embeddings().weight.requires_grad_(True)
        each(**tokens(40)).logits.square().sum().backward()
        found.append(each.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)
    assert logits(model.bfloat16()).dtype == torch.bfloat16 and logits(model).isfinite().all()


def test_factors_on_disk_and_a_resumed_run(tmp_path):
    model = factored()
    config = OwlBnbConfig(bits=3, block=32)
    report = quantize(model, config, batches=[tokens()], journal=tmp_path / "journal")
    again = factored()
    resumed = quantize(again, config, batches=[tokens()], journal=tmp_path / "journal")
    assert resumed.layers == report.layers and torch.equal(logits(again), logits(model))
    model.save_pretrained(tmp_path / "stored")
    options = {"device_map": DISK, "offload_folder": tmp_path / "offload"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", **options)
    assert banks(loaded)[f"{DOWN}.reduce"].is_meta
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)


def test_few_tokens_are_noted_by_factor():
    model = factored()
    report = quantize(model, OwlBnbConfig(bits=3, block=32), batches=[{"input_ids": torch.tensor([[5, 9, 20]])}])
    for kind in ("no token entered", "matrices of experts rounded to nearest with weighted scales"):
        told = " ".join(note for note in report.notes if kind in note)
        assert all(re.search(rf"experts\.\w+_proj\.{part}\.\d", told) for part in ("reduce", "expand")), kind
