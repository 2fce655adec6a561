"""Layer drop by likelihood and by generation, of a model that is first fine-tuned until it solves the tasks.

    python examples/generation_table.py --model DIRECTORY_OR_HUB_ID --output generation-table

Training problems and test problems have different seeds; small generators have few problems, so both can have the same
one. Training stops at the first measurement at which the accuracy of each task on test problems reaches --accuracy, or
after --steps. The table then has three readings of the removal of each layer, and the rank correlations between them.
An interrupted run resumes: training from its last measurement, the table within a layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from hf_cod.analysis.diagnostics.generation_drop import measure_generation_drop
from hf_cod.analysis.diagnostics.generation_results import generation_figures, generation_summary
from hf_cod.analysis.generation.decoding import Decoder
from hf_cod.analysis.generation.prompts import answer_batches, tokenized
from hf_cod.analysis.generation.settings import READINGS, GenerationSettings
from hf_cod.analysis.generation.sources import load_tasks
from hf_cod.io.files import fingerprint, write_json, write_text
from hf_cod.io.journal import Journal
from hf_cod.io.models import ModelSettings, load_model
from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import find_decoder_layers

TASKS = ["gym:chain_sum,max_terms=2,max_digits=1", "gym:chain_sum,min_terms=3,max_terms=3,max_digits=1"]
# Seeds of test problems are that of --seed; training problems follow from this one, far from it.
TRAINING_SEED = 1_000_003


def accuracy(model: Any, tokenizer: Any, tasks: list[str], settings: GenerationSettings) -> list[float]:
    """Mean score of each task."""
    found = load_tasks(tasks, tokenizer, settings)
    prompts = tokenized(tokenizer, found, None, settings.max_new_tokens)
    stack = find_decoder_layers(model)
    decoder, scores = Decoder(stack, tokenizer, settings), [[] for _ in tasks]  # type: ignore[var-annotated]
    with evaluation_mode(stack, repacking=True):
        for start in range(0, len(prompts.ids), settings.batch_size):
            numbers = [*range(start, min(start + settings.batch_size, len(prompts.ids)))]
            for i, ids in zip(numbers, decoder.answers([prompts.ids[i] for i in numbers], numbers), strict=True):
                task, number = prompts.places[i]
                answer = tokenizer.decode(ids, skip_special_tokens=True)
                scores[task].append(found[task].scored(answer, number))
    return [sum(each) / len(each) for each in scores]


def train(model: Any, tokenizer: Any, arguments: argparse.Namespace, done: int, steps: int) -> None:
    """Trains on answers alone, at a constant rate; the optimizer begins anew at each call."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate)
    model.train()
    for step in range(done, done + steps):
        drawn = GenerationSettings(max_prompts=arguments.batch, seed=TRAINING_SEED + step * arguments.spacing)
        found = tokenized(tokenizer, load_tasks(arguments.tasks, tokenizer, drawn), None, 1)
        everything = [[*range(len(found.ids))]]
        (batch,) = answer_batches(found.ids, found.references, everything, tokenizer.pad_token_id)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)
    model.eval()


def trained(arguments: argparse.Namespace, output: Path, settings: GenerationSettings) -> tuple[Any, Any, list[float]]:
    """The fine-tuned model, its tokenizer, and its accuracy on each task."""
    work = fingerprint(
        {k: getattr(arguments, k) for k in ("model", "tasks", "rate", "batch", "every", "spacing", "seed")}
    )
    journal = Journal(output / "journal.jsonl", work)
    done = max((int(key) for key in journal.entries), default=0)
    saved = output / f"model-{done}"
    model, tokenizer = load_model(str(saved) if done else arguments.model, ModelSettings(dtype="float32"))
    tokenizer.chat_template = None
    if "0" not in journal:
        journal.add("0", accuracy(model, tokenizer, arguments.tasks, settings))
    while min(journal[str(done)]) < arguments.accuracy and done < arguments.steps:
        torch.manual_seed(done)
        train(model, tokenizer, arguments, done, arguments.every)
        done += arguments.every
        model.save_pretrained(output / f"model-{done}")
        tokenizer.save_pretrained(output / f"model-{done}")
        journal.add(str(done), accuracy(model, tokenizer, arguments.tasks, settings))
        print(f"after {done} steps: accuracy {journal[str(done)]}, before {journal['0']}", flush=True)
    return model, tokenizer, journal[str(done)]


def table(layers: dict[str, list[float]], results: dict[str, Any], ends: dict[str, Any]) -> list[str]:
    """Markdown rows: the change by each reading, with its interval, and the accuracy of each task."""
    names = [*(name.replace("_", " ") for name in READINGS), *(f"accuracy of {name}" for name in results["tasks"])]
    rows = [f"| layer | {' | '.join(names)} | prompts |", f"|---:{'|---:' * (len(names) + 1)}|"]
    for i in range(len(layers["task_accuracy"])):
        cells = [f"{layers[n][i]:+.3f} ({ends[n][i][0]:+.3f} to {ends[n][i][1]:+.3f})" for n in READINGS]
        cells += [f"{task['without']['task_accuracy'][i]:.2f}" for task in results["tasks"].values()]
        rows.append(f"| {i} | {' | '.join(cells)} | {results['prompts_by_layer'][i]} |")
    return rows


def main() -> None:
    """Trains, measures, and writes table.md and table.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub id")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="as in hf-cod diagnose")
    parser.add_argument("--table-tasks", nargs="+", help="tasks of the table; default: those of the training")
    parser.add_argument("--accuracy", type=float, default=0.9, help="accuracy of each task at which training stops")
    parser.add_argument("--steps", type=int, default=300, help="largest number of training steps")
    parser.add_argument("--every", type=int, default=25, help="training steps between measurements")
    parser.add_argument("--batch", type=int, default=16, help="training problems of each task in a step")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate of AdamW")
    parser.add_argument(
        "--spacing",
        type=int,
        default=1000,
        help="difference between the seeds of two steps. Problem i + 1 of reasoning-gym's seed s is problem i of seed "
        "s + 1, so below --batch steps share problems",
    )
    parser.add_argument("--prompts", type=int, default=64, help="test problems of each task")
    parser.add_argument("--max-new-tokens", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32, help="test problems at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="generation-table", help="directory of models, journals and the table")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    settings = GenerationSettings(
        max_prompts=arguments.prompts,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    model, tokenizer, _ = trained(arguments, output, settings)
    tasks = arguments.table_tasks or arguments.tasks
    found = measure_generation_drop(model, tokenizer, tasks, journal=output, show_progress=True, settings=settings)
    layers, results, ends = generation_figures(found, arguments.seed)
    write_json(output / "table.json", {"layers": layers, "results": results, "intervals": ends})
    lines = [*table(layers, results, ends), "", *generation_summary(results, layers)]
    write_text(output / "table.md", "\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
