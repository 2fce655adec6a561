"""The example of vision transformers, on scikit-learn's digits in the form of its images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

SCRIPT = Path(__file__).parents[2] / "examples" / "vision_depth.py"
QUICK = "--arms pre lns_output layer_scale --seeds 1 --steps 3 --layers 2 --width 32 --patch 14 --train-images 200"


@pytest.mark.process
def test_arms_are_trained_measured_and_kept(tmp_path):
    digits = load_digits()
    images = torch.nn.functional.interpolate(torch.tensor(digits.images)[:, None] * 15, size=(28, 28)).flatten(1).int()
    for label in range(10):
        rows = images[torch.tensor(digits.target) == label].repeat(2, 1)
        (tmp_path / f"{label}.json").write_text(json.dumps({"data": rows.tolist()}))
    command = [
        sys.executable,
        str(SCRIPT),
        *QUICK.split(),
        "--images",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
    ]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    made = json.loads((tmp_path / "out" / "pre-seed0.json").read_text())
    assert 0 <= made["accuracy"] <= 1 and len(made["layers"]["replaced"]) == 2
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.stdout == first.stdout and "| `layer_scale` |" in again.stdout
    assert "training" not in again.stderr, "finished runs are not repeated"
