"""Tutorial: compresses a model to a budget, recovers part of the loss by healing, and loads the result.

python examples/tutorials/compress.py                                      # the embedded model and its text: minutes
python examples/tutorials/compress.py --model Qwen/Qwen2.5-0.5B --text my.txt --share 0.6
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_cod import (
    Applying,
    HealSettings,
    SampleSettings,
    apply_steps,
    heal,
    load_texts,
    perplexity,
    plan_fit,
    split_samples,
    token_batches,
)
from hf_cod.io.models import EMBEDDED, best_device, embedded_model


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Compresses a model; returns perplexity on held-out samples: intact, compressed, healed, loaded again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=embedded_model("pre"), help="Hub id or directory; default: an embedded one")
    held_out = str(EMBEDDED / "held_out.txt")  # similar to the training text of the embedded model
    parser.add_argument("--text", default=held_out, help="text file or dataset; default: embedded text")
    parser.add_argument("--share", type=float, default=0.5, help="share of the layers' weights to keep")
    parser.add_argument("--samples", type=int, default=16, help="samples each for calibration, tuning, evaluation")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sample")
    parser.add_argument("--steps", type=int, default=40, help="steps of healing")
    parser.add_argument("--output", default="hf-cod-compress", help="directory for the model")
    a = parser.parse_args(arguments)

    # [start:samples]
    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(a.model).to(best_device())

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    texts = list(load_texts(text=a.text))
    settings = SampleSettings(max_samples=3 * a.samples, sequence_length=a.length)
    calibration, rest = split_samples(token_batches(tokenizer, texts, settings), a.samples)
    tuning, report_on = split_samples(rest, a.samples)
    # [end:samples]

    # [start:fit]
    plan = plan_fit(load, "parameter_share", a.share, calibration, tuning, knobs=["width", "rank"], n_verified=1)
    print(plan.steps)
    model = load()
    found = {"intact": perplexity(model, report_on)}
    apply_steps(model, plan.steps, Applying(calibration))
    found["compressed"] = perplexity(model, report_on)
    # [end:fit]

    # [start:heal]
    healing = HealSettings(steps=a.steps, sequence_length=a.length, eval_samples=a.samples)
    heal(model, load(), texts, healing, tokenizer=tokenizer, output=f"{a.output}/healing")
    found["healed"] = perplexity(model, report_on)
    # [end:heal]

    # [start:load]
    model.save_pretrained(f"{a.output}/model")
    tokenizer.save_pretrained(f"{a.output}/model")
    again = AutoModelForCausalLM.from_pretrained(f"{a.output}/model")
    found["loaded"] = perplexity(again, report_on)
    print(", ".join(f"{name}: {value:.2f}" for name, value in found.items()))
    # [end:load]
    return found


if __name__ == "__main__":
    main()
