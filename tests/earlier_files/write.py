"""Writes a file of every kind that this version of hf_cod writes, for tests/test_earlier_*.py to read for ever.

    python -m tests.earlier_files.write        # into tests/earlier_files/VERSION, which must not be there yet

Run it with the version whose files are to be kept, once, before what it writes is changed. It goes through the public
names and the command line alone, so that it runs with later versions as well, and everything is named by paths
relative to that folder, so that nothing of the machine gets into a file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

# Before torch: results are the same on any number of cores then.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
import transformers
from peft import get_peft_model
from safetensors.torch import save_file

import hf_cod
from hf_cod import (
    LayerMonitor,
    OwLoreAdamW,
    OwLoreConfig,
    WidthPlan,
    allocate,
    collect_statistics,
    plan_depth,
    plan_ranks,
    score_layers,
)
from hf_cod.cli import main
from tests.earlier_files.checkpoints import (
    SIZES,
    SOURCE,
    TEXT_SIZES,
    WIDE,
    WIDE_SIZES,
    input_ids,
    load,
    model_of,
    outputs,
    pixel_values,
    save,
    text,
    token_batches,
    tokenizer,
    without_code,
    write_compressed,
    write_families,
)
from tests.earlier_files.runs import RUNS, keep_report, write_run, write_score


def write(folder: Path) -> None:
    """Writes everything into a new folder, which is the working directory meanwhile."""
    folder.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        _write()
    finally:
        os.chdir(before)


def _write() -> None:
    logits: dict[str, torch.Tensor] = {}
    Path("text.txt").write_text(text())
    for path, sizes in ((SOURCE, SIZES), (WIDE, WIDE_SIZES)):
        save(path, model_of("llama", **sizes, **TEXT_SIZES), logits)
        tokenizer().save_pretrained(path)
    found = {"scores": _scores(), "plans": _plans(), "history": _history()}
    write_compressed(logits)
    write_families(logits)
    _adapter(logits)
    found["runs"] = {name: write_run(name, *how, logits) for name, how in RUNS.items()}
    found["score"] = write_score()
    save_file({"input_ids": input_ids(), "pixel_values": pixel_values(), **logits}, "expected.safetensors")
    versions = {"hf_cod": hf_cod.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    Path("expected.json").write_text(json.dumps({"versions": versions, **found}, indent=1) + "\n")


def _scores() -> dict[str, Any]:
    """Statistics, scores of several methods, an allocation of each kind."""
    model, batches = load(), token_batches()
    statistics = collect_statistics(model, batches, name="source")
    statistics.save("statistics.safetensors")
    found: dict[str, Any] = {}
    for method in ("owl", "angular", "fisher", "layer_drop", "sensitivity", "auto", "uniform"):
        given = statistics if method == "owl" else None
        scores = score_layers(model, given, method=method, batches=batches, threshold=3.0)
        scores.save(f"scores/{method}.json")
        found[method] = scores.values
    owl = score_layers(model, statistics, method="owl", threshold=3.0)
    budgets = {"sparsity": 0.6, "bits": 3.5, "rank": 0.6, "parameter_share": 0.7, "probability": 0.5}
    for kind, budget in budgets.items():
        allocate(owl, kind, budget).save(f"allocations/{kind}.json")
    allocate(owl, "sparsity", 0.5, group=8).save("allocations/pattern.json")
    return found


def _plans() -> dict[str, Any]:
    """Of ranks, of depth, and of width; the one of `fit` comes from its run."""
    model, batches = load(), token_batches()
    ranks, depth = plan_ranks(model, 0.7, batches=batches), plan_depth(model, 2, batches=batches)
    width = WidthPlan(0.7, [2, 4, 2, 4], [16, 32, 24, 32], "given", "source")
    for name, plan in (("rank", ranks), ("depth", depth), ("width", width)):
        plan.save(f"plans/{name}.json")
    return {"rank": ranks.ranks, "depth": depth.layers, "width": width.channels}


def _history() -> dict[str, Any]:
    model = load()
    optimizer = OwLoreAdamW(model, score_layers(model, method="uniform"), n_active=2, rank=4, lr=1e-2, interval=2)
    monitor = LayerMonitor(model, token_batches(), every=2, history="history.jsonl")
    for step in range(1, 5):
        model(**token_batches()[step % 2], labels=token_batches()[step % 2]["input_ids"]).loss.backward()
        monitor.read_gradients(step)
        optimizer.step()
        optimizer.zero_grad()
        monitor.measure(step)
    assert main(["history", "history.jsonl", "--no-plots", "--output", "drawn"]) == 0
    keep_report("history", Path("drawn"))
    shutil.rmtree("drawn")
    return {"steps": [line["step"] for line in monitor.history.lines]}


def _adapter(logits: dict[str, torch.Tensor]) -> None:
    """OwLore's, trained until it has folded once."""
    model = load()
    torch.manual_seed(0)
    adapted = get_peft_model(model, OwLoreConfig(r=4))
    scores = score_layers(load(), method="uniform")
    optimizer = OwLoreAdamW(adapted, scores, n_active=2, lr=1e-2, interval=2)
    for step in range(5):
        batch = token_batches()[step % 2]
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    logits["adapter"] = outputs(adapted)
    adapted.save_pretrained("adapter")
    without_code(Path("adapter"))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target = Path(__file__).parent / ".".join(hf_cod.__version__.split(".")[:2])
    if target.exists():
        sys.exit(f"{target}: expected a version that has no files yet")
    write(target.resolve())
