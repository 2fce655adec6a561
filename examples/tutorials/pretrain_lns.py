"""Tutorial: pre-trains the same small model with Pre-LN and with LayerNorm Scaling, and compares their layers.

python examples/tutorials/pretrain_lns.py                                  # a tiny model on an embedded novel
python examples/tutorials/pretrain_lns.py --text my.txt --steps 1000       # more text, clearer differences
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_cod import (
    LayerDiagnosticsCallback,
    SampleSettings,
    TrainingHistory,
    fold_lns,
    load_texts,
    perplexity,
    split_samples,
    token_batches,
)
from hf_cod.io.models import embedded_model


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains both models; returns perplexity, output variance of the last layer and effective depth of each."""
    a = _arguments(arguments)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model("pre"))
    settings = SampleSettings(max_samples=a.samples, sequence_length=a.length, batch_size=8)
    held_out, train = split_samples(token_batches(tokenizer, load_texts(text=a.text), settings), a.samples // 10)
    rows = [{"input_ids": ids, "labels": ids} for batch in train for ids in batch["input_ids"]]

    found = {}
    for placement in ("pre", "lns"):
        model = build(placement, a.layers, tokenizer)
        output = f"{a.output}/{placement}"
        train_model(model, rows, held_out, output, a.steps)
        found[placement] = measure(model, held_out, output)
        print(placement, {name: round(value, 3) for name, value in found[placement].items()})
    found["lns"]["difference after folding"] = fold(model, held_out, a.output)
    return found


def build(placement: str, layers: int, tokenizer: Any) -> Any:
    """A small model with this norm placement; with the same seed, all of them start from the same weights."""
    # [start:model]
    config = AutoConfig.for_model(
        "cod_llama",
        norm_placement=placement,
        num_hidden_layers=layers,
        hidden_size=64,
        intermediate_size=176,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    # [end:model]
    return model


def train_model(
    model: Any, rows: list[dict[str, Tensor]], held_out: list[dict[str, Tensor]], output: str, steps: int
) -> None:
    """Trains a model on rows of tokens, and measures its layers on the held-out batches meanwhile."""
    # [start:train]
    arguments = TrainingArguments(
        output,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        warmup_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
    )
    watch = LayerDiagnosticsCallback(every=20, probe=held_out)
    Trainer(model, arguments, train_dataset=rows, callbacks=[watch]).train()
    # [end:train]


def measure(model: Any, held_out: list[dict[str, Tensor]], output: str) -> dict[str, float]:
    """Perplexity, and what the callback measured last."""
    # [start:compare]
    last = TrainingHistory.load(f"{output}/layer_diagnostics").lines[-1]
    model.eval()
    found = {
        "perplexity": perplexity(model, held_out),
        "variance of the last layer": last["variance"][-1],
        "effective depth": last["effective_depth"],
    }
    # [end:compare]
    return found


def fold(model: Any, held_out: list[dict[str, Tensor]], output: str) -> float:
    """Saves the model with LNS as an ordinary Llama; returns the largest difference of logits."""
    # [start:fold]
    model.cpu().save_pretrained(f"{output}/lns")
    stock = fold_lns(f"{output}/lns", f"{output}/as-llama")  # an ordinary Llama
    ids = held_out[0]["input_ids"]
    with torch.no_grad():
        difference = (model(ids).logits - stock(ids).logits).abs().max().item()
    print("largest difference of logits after folding:", difference)
    # [end:fold]
    return difference


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="text file or dataset; default: an embedded novel")
    parser.add_argument("--samples", type=int, default=320, help="number of samples, of which a tenth is held out")
    parser.add_argument("--length", type=int, default=64, help="tokens in a sample")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each model")
    parser.add_argument("--output", default="hf-cod-pretrain-lns", help="directory for models, histories and plots")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
