"""Tutorial: fine-tunes a model on one device, a few layers at a time, and loads the result.

python examples/tutorials/fine_tune.py                                     # the embedded model and novel: a minute
python examples/tutorials/fine_tune.py --model Qwen/Qwen2.5-0.5B --text my.txt --steps 300
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_cod import SampleSettings, load_texts, owlore, perplexity, score_layers, split_samples, token_batches
from hf_cod.io.models import best_device, embedded_model


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Fine-tunes a model; returns perplexity on held-out samples before, after, and after loading it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=embedded_model("pre"), help="Hub id or directory; default: an embedded one")
    parser.add_argument("--text", help="text file or dataset; default: an embedded novel")
    parser.add_argument("--samples", type=int, default=160, help="number of samples, of which an eighth is held out")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sample")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--output", default="hf-cod-fine-tune", help="directory for the model")
    a = parser.parse_args(arguments)

    # [start:data]
    model = AutoModelForCausalLM.from_pretrained(a.model).to(best_device())
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    settings = SampleSettings(max_samples=a.samples, sequence_length=a.length, batch_size=4)
    batches = token_batches(tokenizer, load_texts(text=a.text), settings)
    held_out, train = split_samples(batches, a.samples // 8)
    rows = [{"input_ids": ids, "labels": ids} for batch in train for ids in batch["input_ids"]]
    # [end:data]

    # [start:train]
    found = {"before": perplexity(model, held_out)}
    scores = score_layers(model, batches=train[:4], threshold=13.0)
    trainer = Trainer(
        model,
        TrainingArguments(
            a.output,
            max_steps=a.steps,
            per_device_train_batch_size=8,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, a.steps // 10),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=rows,
        optimizer_cls_and_kwargs=owlore(scores, n_active=3, interval=10, rank=32, lr=1e-3),
    )
    trainer.train()
    model.eval()
    found["after"] = perplexity(model, held_out)
    # [end:train]

    # [start:load]
    model.save_pretrained(a.output)
    tokenizer.save_pretrained(a.output)
    again = AutoModelForCausalLM.from_pretrained(a.output)
    found["loaded"] = perplexity(again, held_out)
    print(", ".join(f"{name}: {value:.2f}" for name, value in found.items()))
    # [end:load]
    return found


if __name__ == "__main__":
    main()
