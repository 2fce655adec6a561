"""Plans export themselves."""

import json

import pytest

from hf_cod import LayerAllocation, allocate, export, plan_bits
from tests.compression.export.models import llama, scores


@pytest.mark.parametrize("make", [lambda s: allocate(s, "bits", 3.5), None], ids=["LayerAllocation", "BitPlan"])
def test_a_plan_exports_itself(make, tmp_path):
    model = llama()
    found = scores(model, [1.0, 3.0, 2.0])
    plan = plan_bits(model, 3.9, scores=found) if make is None else make(found)
    mine = plan.export(model, tmp_path / "mine", "gptqmodel", group_size=32)
    report = export(model, tmp_path / "theirs", plan=plan, to="gptqmodel", group_size=32)
    config, same = (json.loads((tmp_path / n / "quantize_config.json").read_text()) for n in ("mine", "theirs"))
    assert config == same and config["group_size"] == 32 and len({*report.results["module_bits"].values()}) == 2
    assert mine.results == report.results


def test_a_plan_of_sparsities_is_refused(tmp_path):
    plan = LayerAllocation("sparsity", 0.5, [0.5] * 3, [1] * 3, "uniform")
    with pytest.raises(ValueError, match="plan: expected bits of each layer, got sparsity"):
        plan.export(llama(), tmp_path / "out", "mlx")
