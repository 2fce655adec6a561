"""What the tests of earlier files have in common."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

FILES = Path(__file__).parent
VERSIONS = sorted(path.name for path in FILES.iterdir() if path.name[0].isdigit())
EXPECTED = {version: json.loads((FILES / version / "expected.json").read_text()) for version in VERSIONS}
TENSORS = {version: load_file(FILES / version / "expected.safetensors") for version in VERSIONS}


def cases(names_of):
    return [(version, name) for version in VERSIONS for name in names_of(version)]


def files(version, folder):
    return sorted(path.name for path in (FILES / version / folder).iterdir())


def same_libraries(version):
    """A journal is known by the model's config, in which transformers puts its own version."""
    return EXPECTED[version]["versions"]["transformers"] == transformers.__version__


def source(version):
    return AutoModelForCausalLM.from_pretrained(FILES / version / "models" / "source")


@torch.no_grad()
def check_logits(version, name, model, close=1e-4):
    expected = TENSORS[version]
    given = "pixel_values" if model.main_input_name == "pixel_values" else "input_ids"
    torch.testing.assert_close(model.eval()(**{given: expected[given]}).logits, expected[name], rtol=close, atol=close)


def copy_to(folder, version):
    """Copies a version's folder: its commands name everything by paths relative to it, and work there."""
    return Path(shutil.copytree(FILES / version, folder / version))
