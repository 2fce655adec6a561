"""Supervised fine-tuning with OwLore under TRL's SFTTrainer, on pairs of a prompt and its completion.

    python examples/sft_owlore_trl.py                                          # the embedded model and novel: a minute
    python examples/sft_owlore_trl.py --model Qwen/Qwen2.5-0.5B --data pairs.jsonl --n-active 4 --rank 64 --steps 300

`--data` is a JSON-lines file with "prompt" and "completion" in each line; by default the model is trained to continue
passages of the embedded novel. The loss is computed on completions only, the default of SFTTrainer for such data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer

from hf_cod import owlore, score_layers
from hf_cod.io.models import ModelSettings, embedded_model, load_model
from hf_cod.io.text import embedded_text

HELD_OUT = 32  # pairs
SCORED = 16  # pairs
PROMPT, COMPLETION = 120, 240  # characters of the embedded novel


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=embedded_model("pre"), help="Hub id or directory; default: an embedded one")
    parser.add_argument("--data", help="JSON lines with prompt and completion; default: passages of an embedded novel")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of prompt and completion")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--n-active", type=int, default=4, help="number of layers that are trained at a time")
    parser.add_argument("--interval", type=int, default=10, help="steps between samplings of layers")
    parser.add_argument("--rank", type=int, default=32, help="rank of projected gradients")
    parser.add_argument("--output", default="hf-cod-sft-owlore", help="directory for the model")
    return parser.parse_args(arguments)


def passages() -> Dataset:
    """The embedded novel as prompts and completions."""
    text, size = embedded_text(), PROMPT + COMPLETION
    parts = [text[start : start + size] for start in range(0, len(text) - size, size)]
    return Dataset.from_list([{"prompt": part[:PROMPT], "completion": part[PROMPT:]} for part in parts])


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Trains and saves; returns the loss on held-out completions before and after training."""
    a = parse(arguments)
    model, tokenizer = load_model(a.model, ModelSettings(dtype="float32"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_dataset("json", data_files=a.data, split="train") if a.data else passages()
    split = data.train_test_split(test_size=HELD_OUT, seed=0)
    texts = [row["prompt"] + row["completion"] for row in split["train"].select(range(SCORED))]
    batches = [tokenizer(text, return_tensors="pt").to(model.device) for text in texts]
    scores = score_layers(model, batches=[{"input_ids": b["input_ids"]} for b in batches], threshold=13.0)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            a.output,
            max_steps=a.steps,
            per_device_train_batch_size=a.batch_size,
            max_length=a.max_length,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, a.steps // 10),
            bf16=False,
            save_strategy="no",
            report_to=[],
            use_cpu=model.device.type == "cpu",
        ),
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=owlore(
            scores, lr=a.learning_rate, n_active=a.n_active, interval=a.interval, rank=a.rank
        ),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(a.output)
    print(f"loss of held-out completions {before:.3f} -> {after:.3f}; model in {a.output}")
    return before, after


if __name__ == "__main__":
    main()
