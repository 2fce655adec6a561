"""Tutorial: pre-trains the same small model with Pre-LN and with LayerNorm Scaling, and compares their layers.

python examples/tutorials/pretrain_lns.py                                  # a tiny model on an embedded novel
python examples/tutorials/pretrain_lns.py --text my.txt --steps 1000       # more text, clearer differences
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="text file or dataset; default: an embedded novel")
    parser.add_argument("--samples", type=int, default=320, help="number of samples, of which a tenth is held out")
    parser.add_argument("--length", type=int, default=64, help="tokens in a sample")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each model")
    parser.add_argument("--output", default="hf-cod-pretrain-lns", help="directory for models, histories and plots")
    a = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(embedded_model("pre"))
    settings = SampleSettings(max_samples=a.samples, sequence_length=a.length, batch_size=8)
    held_out, train = split_samples(token_batches(tokenizer, load_texts(text=a.text), settings), a.samples // 10)
    rows = [{"input_ids": ids, "labels": ids} for batch in train for ids in batch["input_ids"]]

    found = {}
    for placement in ("pre", "lns"):
        # [start:model]
        config = AutoConfig.for_model(
            "cod_llama",
            norm_placement=placement,
            num_hidden_layers=a.layers,
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

        # [start:train]
        output = f"{a.output}/{placement}"
        arguments_of_trainer = TrainingArguments(
            output,
            max_steps=a.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            warmup_steps=max(1, a.steps // 10),
            save_strategy="no",
            report_to=[],
        )
        watch = LayerDiagnosticsCallback(every=20, probe=held_out)
        Trainer(model, arguments_of_trainer, train_dataset=rows, callbacks=[watch]).train()
        # [end:train]

        # [start:compare]
        last = TrainingHistory.load(f"{output}/layer_diagnostics").lines[-1]
        model.eval()
        found[placement] = {
            "perplexity": perplexity(model, held_out),
            "variance of the last layer": last["variance"][-1],
            "effective depth": last["effective_depth"],
        }
        print(placement, {name: round(value, 3) for name, value in found[placement].items()})
        # [end:compare]

    # [start:fold]
    model.cpu().save_pretrained(f"{a.output}/lns")
    stock = fold_lns(f"{a.output}/lns", f"{a.output}/as-llama")  # an ordinary Llama
    ids = held_out[0]["input_ids"]
    with torch.no_grad():
        found["lns"]["difference after folding"] = (model(ids).logits - stock(ids).logits).abs().max().item()
    print("largest difference of logits after folding:", found["lns"]["difference after folding"])
    # [end:fold]
    return found


if __name__ == "__main__":
    main()
