"""Fine-tunes a language model with OwLore under Trainer: a few layers at a time, sampled by their outliers.

    python examples/finetune_owlore.py                                         # the embedded model and novel: a minute
    python examples/finetune_owlore.py --model Qwen/Qwen2.5-0.5B --text my.txt --n-active 4 --rank 64 --steps 300

`hf-cod finetune` does the same with checkpoints to resume from, a report, and other methods in addition to OwLore.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import Trainer, TrainingArguments, default_data_collator

from hf_cod import owlore, perplexity, score_layers
from hf_cod.io.models import ModelSettings, embedded_model, load_model
from hf_cod.io.packing import PackedText, pack
from hf_cod.io.text import TextSettings, load_texts

HELD_OUT = 16  # windows
SCORED = 8  # windows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=embedded_model("pre"), help="Hub id or directory; default: an embedded one")
    parser.add_argument("--text", help="text file or dataset; default: an embedded novel")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--n-active", type=int, default=4, help="number of layers that are trained at a time")
    parser.add_argument("--interval", type=int, default=10, help="steps between samplings of layers")
    parser.add_argument("--rank", type=int, default=32, help="rank of projected gradients")
    parser.add_argument("--output", default="hf-cod-finetune-owlore", help="directory for the model")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Trains and saves; returns perplexity on the held-out end of the text before and after training."""
    a = parse(arguments)
    model, tokenizer = load_model(a.model, ModelSettings(dtype="float32"))
    windows = pack(tokenizer, load_texts(TextSettings(text=a.text)), a.sequence_length).long()
    if len(windows) <= HELD_OUT:
        raise ValueError(
            f"text: expected more than {HELD_OUT} windows of {a.sequence_length} tokens, got {len(windows)}"
        )
    train, held_out = windows[:-HELD_OUT], windows[-HELD_OUT:]

    def held_out_perplexity() -> float:
        model.eval()
        return perplexity(model, [{"input_ids": part.to(model.device)} for part in held_out.split(4)])

    before = held_out_perplexity()
    batches = [{"input_ids": part.to(model.device)} for part in train[:SCORED].split(4)]
    scores = score_layers(model, batches=batches, threshold=13.0)
    trainer = Trainer(
        model,
        TrainingArguments(
            a.output,
            max_steps=a.steps,
            per_device_train_batch_size=a.batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, a.steps // 10),
            save_strategy="no",
            report_to=[],
            use_cpu=model.device.type == "cpu",
        ),
        train_dataset=PackedText(train, a.steps * a.batch_size, seed=0),
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=owlore(
            scores, lr=a.learning_rate, n_active=a.n_active, interval=a.interval, rank=a.rank
        ),
    )
    trainer.train()
    after = held_out_perplexity()
    model.save_pretrained(a.output)
    tokenizer.save_pretrained(a.output)
    print(f"perplexity {before:.2f} -> {after:.2f}; model in {a.output}")
    return before, after


if __name__ == "__main__":
    main()
