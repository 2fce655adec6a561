"""Makes the two embedded models of the package: trains, rounds to bfloat16, writes cards and held-out text.

    python examples/pretraining_text.py --output corpus
    python examples/build_pair.py --corpus corpus --runs hf-cod-pair

The models differ only in the placement of their norms. Training takes hours on two CPU cores, and the same command
resumes it; with both runs finished the script takes seconds. Models are written to hf_cod/assets/pair, cards to
model_cards.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from pretrain import pretrain
from shipped_models import ship

from hf_cod.io.files import write_text
from hf_cod.io.models import EMBEDDED, EMBEDDED_PLACEMENTS
from hf_cod.io.report import RunReport
from hf_cod.reporting.model_card import CardSettings, release
from hf_cod.training.pretraining.preparation import claim
from hf_cod.training.pretraining.recipes import PretrainSettings

# The package contains the weights without the code that the Hub requires: these lines write both.
WHERE = """The weights are part of the package hf_cod. These lines write them, with the code that loads them, into a
directory that can be uploaded to the Hub:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cod.io.models import embedded_model

AutoModelForCausalLM.from_pretrained(embedded_model("{placement}")).save_pretrained("{name}")
AutoTokenizer.from_pretrained(embedded_model("{placement}")).save_pretrained("{name}")
```
"""
# Only held-out texts in the public domain, so that the package contains no texts with other licences.
PUBLIC_DOMAIN = ("austen", "shakespeare", "jargon", "factbook")
HELD_OUT_CHARACTERS = 80_000


def held_out(corpus: Path) -> str:
    """Pieces of the validation text, in its shuffled order."""
    pieces: list[str] = []
    for line in (corpus / "validation.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["source"] in PUBLIC_DOMAIN and sum(map(len, pieces)) < HELD_OUT_CHARACTERS:
            pieces.append(row["text"])
    return "\n\n".join(pieces) + "\n"


def settings_of(placement: str, chosen: argparse.Namespace) -> PretrainSettings:
    """Directory of the run of one model."""
    return PretrainSettings(
        text=str(chosen.corpus / "train.jsonl"),
        validation_text=str(chosen.corpus / "validation.jsonl"),
        norm_placement=placement,
        steps=chosen.steps,
        learning_rate=chosen.learning_rate,
        compile=True,
        save_every=100,
        evaluate_every=250,
        diagnose_every=50,
        output=str(chosen.runs / placement),
    )


def main() -> None:
    """Trains missing models, then writes the files of the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="output of pretraining_text.py")
    parser.add_argument("--runs", type=Path, default=Path("hf-cod-pair"), help="directory of both runs")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: the preset's")
    parser.add_argument("--learning-rate", type=float, help="peak learning rate of both; default: the preset's")
    parser.add_argument("--comparison", help="comparison.md of compare_placements.py, for the cards")
    parser.add_argument("--license", default="cc-by-sa-4.0", help="licence of the weights")
    chosen = parser.parse_args()
    for placement in EMBEDDED_PLACEMENTS:
        settings, name = settings_of(placement, chosen), f"hf-cod-tiny-{placement}"
        claim(settings)
        if not (chosen.runs / placement / "report.json").is_file():
            pretrain(settings)
        card = CardSettings(
            name,
            chosen.license,
            sources=str(chosen.corpus / "sources.json"),
            language="en",
            where=WHERE.format(placement=placement, name=name),
            comparison=chosen.comparison,
        )
        released = release(chosen.runs / placement, chosen.runs / "release" / name, card).parent
        ship(released, EMBEDDED / placement)
        tokens = RunReport.load(chosen.runs / placement).results["tokens"] / 1e6
        print(f"{name}: {tokens:.3g} million tokens")
    shutil.copy2(chosen.corpus / "sources.json", EMBEDDED)
    write_text(EMBEDDED / "held_out.txt", held_out(chosen.corpus))


if __name__ == "__main__":
    main()
