"""Benchmarks and tables that README and the documentation name run to their end, on an embedded model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_cod.io.models import embedded_model

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = EXAMPLES.parent / "hf_cod" / "assets" / "persuasion.txt"
MODEL = ["--model", str(embedded_model("pre"))]
SAMPLES = ["--sequence-length", "32", "--calibration-samples", "4"]
QUICK = {
    "benchmarks/bank_bases.py": "--warm-up 2 --steps 2 --widths 32 --ranks 4",
    "benchmarks/callback.py": "--batch 2 --tokens 16 --steps 4 --every 2 --rounds 1",
    "benchmarks/diagnose.py": "--batch-size 2 --sequence-length 16 --rounds 1 --slow-rounds 1",
    "benchmarks/experts.py": "--experts 2 --top-k 1 --hidden 64 --intermediate 64 --tokens 1 4 --rounds 1",
    "benchmarks/few_tokens.py": f"--layers 1 --rows 4 --samples 12 --text {TEXT}",
    "benchmarks/owl.py": "--samples 4 --sequence-length 16 --batch-size 2 --rounds 1",
    "benchmarks/placements.py": "--batch 1 --tokens 8 --rounds 1 --placements pre lns pre+gpas",
    "benchmarks/plans.py": "--passes 60 --search-samples 4 --report-samples 2 --minutes 0.3",
    "benchmarks/quantization.py": "--parts loading --width 64 --layers 2 --rounds 1",
    "benchmarks/reading.py": "--layers 2 --hidden 8 --intermediate 8 --rounds 2",
    "benchmarks/smaller.py": "--prompt 8 --new-tokens 2 --rounds 1 --layers 2",
    "owl_table.py": "--methods wanda --scores uniform owl --sparsities 0.5 --tuning-samples 2 --report-samples 2",
    "quantization_table.py": "--scores uniform --roundings nearest --seeds 1 --report-samples 2",
    "rank_table.py": "--methods plain --scores uniform owl --removed 0.2 --tuning-samples 2 --report-samples 2",
    "width_table.py": "--methods magnitude --scores uniform --removed 0.2 --tuning-samples 2 --report-samples 2",
    "generation_table.py": "--tasks gym:chain_sum@0 --steps 1 --every 1 --batch 2 --prompts 8 --max-new-tokens 2",
    "measures_table.py": "--samples 4 --sequence-length 32 --batch-size 2",
    "swap_table.py": "--samples 4 --sequence-length 32 --batch-size 2 --steps 1",
    "depth_table.py": "--criteria angular --layers 1 --tuning-samples 2 --report-samples 2",
}
OWN_SAMPLES = ("generation_table.py", "measures_table.py", "swap_table.py")
ON_A_MODEL = ("benchmarks/diagnose.py", "benchmarks/few_tokens.py", "benchmarks/owl.py", "benchmarks/smaller.py")


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("script", QUICK)
def test_a_script_runs_to_its_end(script, tmp_path):
    table = script.endswith(("_table.py", "plans.py"))
    words = [
        *QUICK[script].split(),
        *(SAMPLES if table and script not in OWN_SAMPLES else ()),
        *(MODEL if table or script in ON_A_MODEL else ()),
    ]
    output = tmp_path / ("table" if table else "figures.json")
    command = [sys.executable, "-W", "error::DeprecationWarning:hf_cod", str(EXAMPLES / script), *words]
    ended = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Deprecat" not in ended.stderr
    assert json.loads((output / "table.json" if table else output).read_text(encoding="utf-8"))
