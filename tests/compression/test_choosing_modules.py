"""`include` and `exclude` of factorize, narrow and quantize: what is left, what it costs, and what a journal takes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_cod import (
    OwlBnbConfig,
    RunReport,
    allocate,
    factorize,
    find_decoder_layers,
    narrow,
    plan_bits,
    plan_ranks,
    plan_width,
    quantize,
    score_layers,
)
from hf_cod.models.factors import LowRankLinear
from tests.compression.quantization.matrices import llama
from tests.tiny_models import batch_for, build, two_batches

MLP = ["gate_proj", "up_proj", "down_proj"]


def loaded_again(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model(**batch_for(model)).logits


def same_but(model, original, parts):
    """Every parameter without these parts in its name is that of the original."""
    kept = {n: p for n, p in original.named_parameters() if not any(part in n for part in parts)}
    assert kept and all(torch.equal(model.get_parameter(name), p) for name, p in kept.items())


@pytest.mark.parametrize("planned", ["share", "spectra", "scores"])
@pytest.mark.parametrize("method", ["plain", "whitened"])
def test_excluded_matrices_are_not_factorized_and_the_budget_of_all_is_met(method, planned, tmp_path):
    model, original = build("llama"), build("llama")
    batches, chosen = two_batches(model), {"exclude": ["q_proj", "k_proj", r"down_proj"]}
    plan = 0.75
    if planned == "spectra":
        plan = plan_ranks(model, 0.75, batches=batches, **chosen)
    elif planned == "scores":
        plan = allocate(score_layers(model, method="angular", batches=batches), "parameter_share", 0.75, 0.05)
    report = factorize(model, plan, method, batches=batches, **chosen)
    factors = {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert factors and not [name for name in factors if name.endswith(("q_proj", "k_proj", "down_proj"))]
    same_but(model, original, ["v_proj", "o_proj", "gate_proj", "up_proj"])
    found = report.results["parameters"]
    assert found["factorized"] == sum(p.numel() for p in model.parameters())
    weights = sum(report.layers["parameters"])
    assert report.results["parameter_share"] == 1 - (found["intact"] - found["factorized"]) / weights
    assert report.results["parameter_share"] == pytest.approx(0.75, abs=0.03)
    assert any("12 matrices" in note and "not factorized, by exclude" in note for note in report.notes)
    assert report.settings["exclude"] == chosen["exclude"]
    assert torch.equal(logits(loaded_again(model, tmp_path)), logits(model))


def test_a_plan_of_ranks_that_names_an_excluded_matrix_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match=r"ranks: expected matrices .*, got 'model\.layers\.0\.self_attn\.q_proj'"):
        factorize(model, plan_ranks(model, 0.5), "plain", exclude=["q_proj"])


@pytest.mark.parametrize("part, kind", [("o_proj", "channels"), ("up_proj", "heads")])
def test_heads_or_channels_with_an_excluded_matrix_are_left(part, kind, tmp_path):
    model, original = build("llama"), build("llama")
    batches = two_batches(model)
    report = narrow(model, 0.8, batches=batches, exclude=[part], channel_multiple=8)
    narrowed = MLP if kind == "channels" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    same_but(model, original, narrowed)
    left = "heads" if kind == "channels" else "channels"
    assert report.results[left] == [None] * 4 and None not in report.results[kind]
    assert f"share_of_{left}" not in report.layers
    assert report.results["parameters"]["narrowed"] == sum(p.numel() for p in model.parameters())
    whole = sum(
        original.get_parameter(n).numel() for n, _ in original.named_parameters() if "layers" in n and "proj" in n
    )
    removed = report.results["parameters"]["intact"] - report.results["parameters"]["narrowed"]
    assert report.results["parameter_share"] == pytest.approx(1 - removed / whole)
    assert any("4 matrices" in note and f".{part} (" in note for note in report.notes)
    assert any(f"{left} are not removed: they are rows or columns of {part}" in note for note in report.notes)
    assert torch.equal(logits(loaded_again(model, tmp_path)), logits(model))
    plan = plan_width(original, 0.8, 8, exclude=[part])
    assert getattr(plan, kind) == report.results[kind]


def test_nothing_to_narrow_says_what_was_excluded():
    with pytest.raises(ValueError, match=r"heads are not removed: .* k_proj, v_proj, o_proj, excluded by name"):
        narrow(build("llama"), 0.8, "magnitude", "none", include=["q_proj"])


@pytest.mark.parametrize("function", [factorize, narrow])
def test_a_journal_of_another_choice_is_not_taken(function, tmp_path):
    batches = two_batches(build("llama"))
    more = {"channel_multiple": 8} if function is narrow else {}

    def run(folder, **chosen):
        model = build("llama")
        report = function(model, 0.8, batches=batches, journal=tmp_path / folder, **chosen, **more)
        return model, report

    first, report = run("one", exclude=["o_proj"])
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "one").glob("*.safetensors")}
    again, resumed = run("one", exclude=r".*\.o_proj")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "one").glob("*.safetensors")} == files
    assert resumed.layers == report.layers and resumed.results == report.results
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    other, _ = run("one", exclude=["up_proj"])
    whole, _ = run("two", exclude=["up_proj"])
    assert len([*(tmp_path / "one").glob("*.safetensors")]) == 2 * len(files)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), whole.parameters(), strict=True))


def test_a_report_reads_again_with_its_choice(tmp_path):
    report = factorize(build("llama"), 0.8, "plain", include=MLP)
    report.save(tmp_path)
    assert RunReport.load(tmp_path).settings["include"] == MLP


def test_the_choice_is_of_the_layers_alone():
    model = build("llama")
    with pytest.raises(ValueError, match=r"exclude: .*got 'lm_head', which matches none"):
        factorize(model, 0.8, "plain", exclude=["lm_head"])
    assert find_decoder_layers(model).count_weights(0)


@pytest.mark.parametrize("calibrated", [True, False])
def test_excluded_matrices_are_not_quantized_and_sizes_are_kept(calibrated, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, original = llama(), llama()
    chosen = {"include": r".*\.[123]\..*", "exclude": ["down_proj"]}
    batches = two_batches(model) if calibrated else None
    report = quantize(model, bits=3.6, batches=batches, journal=tmp_path / "journal", **chosen)
    wanted = [n for n, m in original.named_modules() if ".layers." in n and n.endswith("proj")]
    wanted = {n for n in wanted if ".0." not in n and not n.endswith("down_proj")}
    assert report.results["module_bits"].keys() == wanted
    stored = {n: m for n, m in model.named_modules() if n in wanted}
    same_but(model, original, wanted)
    size = sum(t.untyped_storage().nbytes() for m in stored.values() for t in m.parameters())
    assert size == pytest.approx(report.results["planned_bytes"], rel=0.01)
    (note,) = (note for note in report.notes if "are not quantized, by include" in note)
    assert "down_proj (layers 0 to 3)" in note and report.settings["exclude"] == ["down_proj"]
    assert torch.equal(logits(loaded_again(model, tmp_path / "model")), logits(model))
    files = [*(tmp_path / "journal").glob("*.safetensors")]
    quantize(llama(), bits=3.6, batches=batches, journal=tmp_path / "journal", exclude=["q_proj"])
    assert len([*(tmp_path / "journal").glob("*.safetensors")]) == 2 * len(files), "other work"
    dense = model.dequantize()
    same_but(dense, original, wanted)
    plan = plan_bits(original, 3.6, **chosen)
    assert plan.bits == report.results["module_bits"] and plan.stored == report.results["bits"]


def test_a_stored_config_has_no_choice_beside_its_modules():
    with pytest.raises(ValueError, match="exclude: expected none with modules"):
        OwlBnbConfig(modules={"a": 3}, exclude=["q_proj"])
