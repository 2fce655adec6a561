"""Runs every command once in the working directory, with tiny models; `test_same_bytes.py` compares two such runs.

What the process drew before differs with its first argument: nothing that a command writes may follow from it.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy
import torch

from hf_cod import RunReport, TrainingHistory
from hf_cod.cli.main import COMMANDS, main
from hf_cod.io.models import embedded_model, load_model
from tests.earlier_files.checkpoints import SIZES, SOURCE, TEXT_SIZES, WIDE, WIDE_SIZES, model_of, text, tokenizer

MIXTURE = "models/mixture"
LOADING = "--text text.txt --dtype float32 --device cpu"
SAMPLES = f"{LOADING} --sequence-length 8 --max-samples 4 --batch-size 2"
MEASURED = f"{SAMPLES} --eval-samples 4"
IN_FILES = "--device cpu --max-memory 100GB"
TRAINED = f"{LOADING} --sequence-length 8 --steps 4 --batch-size 4 --micro-batch-size 2 --eval-samples 4"
TRAINED += " --save-every 2 --log-every 1 --learning-rate 1e-2"
# Fine-tuning method -> its own options.
OF_METHOD = {
    **dict.fromkeys(("owlore", "owlore-peft"), "--n-active 2 --interval 2 --rank 4"),
    "lisa": "--n-active 2 --interval 2",
    "galore": "--interval 2 --rank 4",
    "lora": "--lora-rank 2",
    "full": "",
}
# Name -> a command that writes to the directory of that name; `{}` stands for it where it is no option.
RUNS = {
    "diagnose": f"diagnose {SOURCE} {SAMPLES}",
    "score": f"score {SOURCE} {SAMPLES}",
    "score-auto": f"score {SOURCE} {SAMPLES} --method auto",
    "prune": f"prune {SOURCE} {MEASURED} --method sparsegpt --sparsity 0.6 --recover-steps 2",
    "prune-pattern": f"prune {SOURCE} {MEASURED} --pattern N:4 --score random",
    "quantize": f"quantize {WIDE} {MEASURED} --bits 3.8 --block 32",
    "quantize-weighted": f"quantize {WIDE} {MEASURED} --bits 4 --block 32 --rounding weighted",
    "prune-in-files": f"prune {SOURCE} {MEASURED} --sparsity 0.6 {IN_FILES}",
    "quantize-in-files": f"quantize {WIDE} {MEASURED} --bits 3.8 --block 32 {IN_FILES}",
    "factorize": f"factorize {SOURCE} {MEASURED} --parameter-share 0.7 --no-speed",
    "factorize-oats": f"factorize {SOURCE} {MEASURED} --parameter-share 0.7 --method oats --no-speed",
    "narrow": f"narrow {SOURCE} {MEASURED} --parameter-share 0.7 --channel-multiple 8 --no-speed",
    "narrow-taylor": (
        f"narrow {SOURCE} {MEASURED} --parameter-share 0.7 --channel-multiple 8 --method taylor --no-speed"
    ),
    "drop-layers": f"drop-layers {SOURCE} {MEASURED} --n-removed 2 --no-protect --no-speed",
    "repeat-layers": f"repeat-layers {SOURCE} {MEASURED} --search --length 1 2 --force --no-speed",
    "drop-experts": f"drop-experts {MIXTURE} {MEASURED} --share 0.5 --merge --no-speed",
    "export": f"export {WIDE} {SAMPLES} --bits 4.6",
    "export-llama.cpp": f"export {WIDE} {SAMPLES} --bits 5 --to llama.cpp",
    "fit": f"fit {WIDE} {MEASURED} --bits 6 --knobs rank bits --tuning-samples 4 --n-verified 1 --no-speed",
    "pack": "pack prune {}",
    "heal": f"heal factorize --teacher {SOURCE} {TRAINED} {OF_METHOD['owlore']} --deselected keep --no-speed",
    "heal-lora": f"heal prune --teacher {SOURCE} {TRAINED} --method lora {OF_METHOD['lora']} --no-speed",
    **{
        f"finetune-{method}": f"finetune {SOURCE} {TRAINED} --method {method} {options}"
        for method, options in OF_METHOD.items()
    },
    "demo": "demo",
    "compare": "compare diagnose demo/lns",
    "report": "report diagnose demo/lns --space me/layers",
    "card": "card trained {}",
    "convert": f"convert lns {SOURCE} {{}}",
    "history": "history trained/layer_diagnostics",
}
DEPTH = {
    "effective_depth": {"value": 4.5, "low": 4.4, "high": 4.6, "confidence": 0.95},
    "late_share": 0.25,
}
WITHOUT_FILES = {"env"}


def prepare() -> None:
    """What the commands read."""
    Path("text.txt").write_text(text(), encoding="utf-8")
    mixture = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    for folder, kind, sizes in (
        (SOURCE, "llama", SIZES),
        (WIDE, "llama", WIDE_SIZES),
        (MIXTURE, "mixtral", mixture),
    ):
        model_of(kind, **sizes, **TEXT_SIZES).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    model, cutter = load_model(embedded_model("lns"))
    model.save_pretrained("trained/model")
    cutter.save_pretrained("trained/model")
    settings = {"norm_placement": "lns", "steps": 7, "batch_size": 8, "sequence_length": 256, "learning_rate": 2e-3}
    results = {
        "curve": [[1, 8.0], [7, 4.0]],
        "validation": [[7, 4.5]],
        "tokens": 3_000_000,
        "parameters": {"trained": 3_386_496},
        "validation_perplexity": 64.8,
        "validation_tokens": 65_536,
    }
    settings |= {"precision": "bf16", "seed": 0}
    layers = {"variance": [1.0, 3.25]}
    RunReport("pretrain", "lns", settings, {"torch": "2"}, layers, {**DEPTH, **results}, ["It learned."]).save(
        "trained"
    )
    file = Path("trained", "layer_diagnostics", "history.jsonl")
    history = TrainingHistory({"model": "m", "layers": 2, "settings": {}}, file)
    history.start()
    history.add({"step": 1, "variance": [1.0, 2.0], "effective_depth": 2.0})
    history.add({"step": 7, "variance": [1.0, 3.0], "effective_depth": 1.5})


def run_all(seed: int) -> None:
    """Prepares, runs them all, and fails with the first that fails."""
    assert {command.split()[0] for command in RUNS.values()} | WITHOUT_FILES == set(COMMANDS)
    prepare()
    for name, command in RUNS.items():
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        words = [name if word == "{}" else word for word in command.split()]
        status = main(words if "{}" in command else [*words, "--output", name])
        assert status == 0, f"{name} ended with status {status}"


if __name__ == "__main__":
    run_all(int(sys.argv[1]))
