"""Compares the contribution of layers in a Post-LN and a Pre-LN model.

    python examples/post_ln_against_pre_ln.py --output pictures
    python examples/post_ln_against_pre_ln.py --post-ln google-bert/bert-large-uncased --pre-ln Qwen/Qwen2.5-0.5B

Takes about two minutes on two CPU cores. Without arguments both models come from the Hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_cod import compare, diagnose
from hf_cod.io.models import load_model
from hf_cod.io.text import TextSettings, load_texts


def main() -> None:
    """Diagnoses both models on the same text and plots them in one figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--post-ln", default="sentence-transformers/all-mpnet-base-v2", help="Hub id or directory")
    parser.add_argument("--pre-ln", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or directory")
    parser.add_argument("--text", help="text file or dataset; default: the embedded novel")
    parser.add_argument("--output", default="hf-cod-post-ln-pre-ln", help="directory for reports and the plot")
    chosen = parser.parse_args()
    reports = []
    for name in (chosen.post_ln, chosen.pre_ln):
        model, tokenizer = load_model(name)
        texts = load_texts(TextSettings(text=chosen.text))
        directory = Path(chosen.output) / Path(name).name
        options = {"max_samples": 8, "sequence_length": 128, "token": "all"}
        reports.append(diagnose(model, tokenizer, texts, output=directory, name=Path(name).name, **options))
    comparison = compare(reports)
    comparison.plot(chosen.output)
    print(comparison.to_markdown(picture=False))


if __name__ == "__main__":
    main()
