"""Tutorial: measures the layers of a model, leaves out the least important one, and compares two models.

python examples/tutorials/see_your_layers.py                               # the embedded models: half a minute
python examples/tutorials/see_your_layers.py --model Qwen/Qwen2.5-0.5B --text my.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cod import SampleSettings, compare, diagnose, load_texts, perplexity, skip, token_batches
from hf_cod.io.models import best_device, embedded_model


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Measures a model; returns its perplexity, and that without its least important layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=embedded_model("pre"), help="Hub id or directory; default: an embedded one")
    parser.add_argument("--other", default=embedded_model("lns"), help="a second model; default: an embedded one")
    parser.add_argument("--text", help="text file or dataset; default: an embedded novel")
    parser.add_argument("--samples", type=int, default=16, help="number of samples")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sample")
    parser.add_argument("--output", default="hf-cod-see-your-layers", help="directory for report and plots")
    a = parser.parse_args(arguments)

    # [start:measure]
    model = AutoModelForCausalLM.from_pretrained(a.model).to(best_device())
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    texts = list(load_texts(text=a.text))
    samples = {"max_samples": a.samples, "sequence_length": a.length}

    report = diagnose(model, tokenizer, texts, **samples)
    for finding in report.summary:
        print(finding)
    report.save(a.output)
    report.plot(a.output)
    # [end:measure]

    # [start:skip]
    costs = report.layers["layer_drop"]
    least = min(range(len(costs)), key=lambda layer: costs[layer])
    batches = token_batches(tokenizer, texts, SampleSettings(**samples))
    found = {"intact": perplexity(model, batches)}
    with skip(model, [least]):
        found["without"] = perplexity(model, batches)
    print(f"perplexity {found['intact']:.2f}, without layer {least}: {found['without']:.2f}")
    # [end:skip]

    # [start:compare]
    other = AutoModelForCausalLM.from_pretrained(a.other).to(best_device())
    second = diagnose(other, AutoTokenizer.from_pretrained(a.other), texts, **samples)
    comparison = compare([report, second], labels=["first", "second"])
    print(comparison.to_markdown(picture=False))
    comparison.plot(a.output)
    # [end:compare]
    return found


if __name__ == "__main__":
    main()
