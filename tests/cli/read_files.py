"""All kinds of files that commands read, whole, and the commands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hf_cod import (
    LayerScores,
    OwLoreConfig,
    RankPlan,
    RunReport,
    TrainingHistory,
    factorize,
    pack_sparse,
    plan_experts,
    quantize,
    to_lns,
)
from hf_cod.analysis.statistics.layer_statistics import collect_statistics
from hf_cod.cli import compression
from hf_cod.cli.main import main
from hf_cod.io.files import write_json
from hf_cod.io.output_manifest import Manifest
from hf_cod.training.runs import trainer
from tests.earlier_files.read import FILES
from tests.reporting.reports import report
from tests.tiny_models import build, two_batches
from tests.tiny_tokenizers import gpt_like

TEXT = "one two three four five six seven eight nine ten " * 40
QUICK = "--text text.txt --sequence-length 8 --max-samples 4 --batch-size 2 --no-plots"
MEASURED = f"{QUICK} --eval-samples 2"
TRAINED = (
    "--text text.txt --sequence-length 8 --passes 0.15 --batch-size 2 --micro-batch-size 2 --eval-samples 2 "
    "--save-every 2 --n-active 2 --interval 2 --rank 4 --no-plots"
)
SCORE = f"{QUICK} --method angular --output out"
FINETUNE, CONVERT = f"finetune model {TRAINED} --output run", "convert lns model half"
PRUNE, DIAGNOSE = f"prune model {MEASURED} --method wanda --output pruned", f"diagnose model {QUICK} --output measured"


@dataclass(frozen=True)
class Kind:
    """A kind of file that a command reads.

    Attributes:
        file: the file, or a pattern that it matches, in the directory from which the command is called.
        command: what reads it.
        entry: the entry of the file that is changed; None: the whole file.
        results: what the command writes without a word on the file, or the same as with the whole file.
        few: examples by default.
    """

    file: str
    command: str
    entry: str | None = None
    results: tuple[str, ...] = ()
    few: int = 3


KINDS = {
    "3-bit quantization_config": Kind(
        "quantized/config.json", f"score quantized {SCORE}", "quantization_config", ("out/scores.json",)
    ),
    "packed quantization_config": Kind(
        "packed/config.json", f"score packed {SCORE}", "quantization_config", ("out/scores.json",)
    ),
    "config of a model": Kind("model/config.json", f"score model {SCORE}"),
    "module_shapes": Kind("factorized/config.json", f"score factorized {SCORE}", "module_shapes", ("out/scores.json",)),
    "config of LoRA": Kind("lora/adapter_config.json", f"score lora {SCORE}"),
    "config of OwLore's adapter": Kind("owlore/adapter_config.json", f"score owlore {SCORE}"),
    "settings of a run": Kind("run/settings.json", FINETUNE, None, ("run/model.safetensors", "run/report.json"), few=2),
    "scores of a run": Kind("run/scores.json", FINETUNE, None, ("run/model.safetensors",), few=1),
    "checksums of a checkpoint": Kind(
        "run/checkpoint-4/checksums.json", FINETUNE, None, ("run/model.safetensors",), few=1
    ),
    "state of a checkpoint": Kind(
        "run/checkpoint-4/trainer_state.json", FINETUNE, None, ("run/model.safetensors",), few=1
    ),
    "manifest": Kind("half/journal/manifest.json", CONVERT, None, ("half/model.safetensors", "half/report.json")),
    "journal": Kind("measured/journal.jsonl", DIAGNOSE, None, ("measured/report.json",)),
    "journal of an earlier version": Kind("earlier/journal.jsonl", DIAGNOSE.replace("measured", "earlier")),
    "layer in a journal": Kind("pruned/journal/*-00001.safetensors", PRUNE, None, ("pruned/model.safetensors",)),
    "sources": Kind("sources.json", "card trained card --sources sources.json", few=1),
    "scores": Kind("scores.json", f"prune model {MEASURED} --scores scores.json --method magnitude --output out"),
    "statistics": Kind("sums.safetensors", f"score model {QUICK} --statistics sums.safetensors --output out"),
    "plan": Kind("plan.json", f"drop-layers model {MEASURED} --plan plan.json --output out --no-speed"),
    "plan of experts": Kind(
        "expert_plan.json", f"drop-experts mixture {MEASURED} --plan expert_plan.json --output out --no-speed", few=1
    ),
    "report to compare": Kind("one/report.json", "compare one two --output out --no-plots"),
    "report to show": Kind("one/report.json", "report one --html --output out.html"),
    "report of a result": Kind("result/report.json", "card result"),
    "report of pre-training": Kind("trained/report.json", "card trained card", few=2),
    "history": Kind("history.jsonl", "history history.jsonl --output out --no-plots"),
    "report to plot": Kind("one/report.json", "compare one two --output out", few=1),
    "history to plot": Kind("history.jsonl", "history history.jsonl --output out", few=1),
}


def call(command: str) -> int:
    """The status of a command, called from the directory of its files."""
    return main(command.split())


def make(folder: Path) -> None:
    """All files, whole, in a directory, from which commands are called."""
    (folder / "text.txt").write_text(TEXT)
    before = Path.cwd()
    os.chdir(folder)
    try:
        _make_models()
        _make_records()
        _make_runs()
    finally:
        os.chdir(before)


def _make_models() -> None:
    from peft import LoraConfig, get_peft_model

    for name in ("model", "factorized", "packed", "quantized", "trained", "mixture"):
        gpt_like().save_pretrained(name)
    build("llama").save_pretrained("model")
    build("mixtral").save_pretrained("mixture")
    model = build("llama")
    factorize(model, RankPlan("parameter_share", 0.9, {"model.layers.0.mlp.up_proj": 3}, "given"), "plain")
    model.save_pretrained("factorized")
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[:, ::2] = 0
    pack_sparse(model, 0.4)
    model.save_pretrained("packed")
    model = build("llama", intermediate_size=64, hidden_size=64)
    quantize(model, bits=3)
    model.save_pretrained("quantized")
    to_lns(build("llama")).save_pretrained("trained")
    for name, config in {
        "lora": LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
        "owlore": OwLoreConfig(r=4, max_rank=6),
    }.items():
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained("model"), config)
        adapted.save_pretrained(name)


def _make_records() -> None:
    model = AutoModelForCausalLM.from_pretrained("model")
    weights = [sum(p.numel() for p in layer.parameters() if p.dim() == 2) for layer in model.model.layers]
    LayerScores("m", "owl", [0.4, 0.3, 0.2, 0.1], weights, {"threshold": 3.0}).save("scores.json")
    collect_statistics(model, two_batches(model)).save("sums.safetensors")
    content = json.loads((FILES / "0.1" / "plans" / "depth.json").read_text())
    write_json("plan.json", {**content, "parameters": weights})
    mixture = AutoModelForCausalLM.from_pretrained("mixture")
    plan_experts(mixture, 0.25, batches=two_batches(mixture)).save("expert_plan.json")
    for name in ("one", "two"):
        report().save(name)
    text = {"package": "p", "characters": 9, "license": "public domain", "evidence": "old"}
    write_json("sources.json", {"sources": {"novel": text}})
    told = {"norm_placement": "lns", "steps": 7, "batch_size": 8, "sequence_length": 256, "learning_rate": 2e-3}
    told |= {"precision": "bf16", "seed": 0}
    results = {"curve": [[1, 8.0], [7, 4.0]], "validation": [[7, 4.5]], "tokens": 30, "late_share": 0.25}
    results |= {"parameters": {"trained": 9}, "validation_perplexity": 64.8, "validation_tokens": 65}
    results["effective_depth"] = {"value": 4.5, "low": 4.4, "high": 4.6, "confidence": 0.95}
    RunReport("pretrain", "lns", told, {"torch": "2"}, {"variance": [1.0, 3.0]}, results, ["Well."]).save("trained")
    history = TrainingHistory({"model": "m", "layers": 2, "settings": {"every": 10}, "probe": "abc"}, "history.jsonl")
    history.start()
    for step in (10, 20, 30, 40):
        history.add({"step": step, "variance": [1.0, 2.0 * step], "late_share": 0.4, "gradient_norm": [None, 0.5]})
    _as_earlier(Path("history.jsonl"), lambda line: line.pop("checksum"))


def _make_runs() -> None:
    """One that is finished, and others that were interrupted: in training, before and while results were moved."""

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    assert call(f"prune model {MEASURED} --method magnitude --sparsity 0.5 --output result") == 0
    assert call(DIAGNOSE) == 0
    shutil.copytree("measured", "earlier")
    _as_earlier(Path("earlier", "journal.jsonl"), lambda line: line.pop(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "check_trained", fails)
        patch.setattr(Manifest, "complete", fails)
        assert call(FINETUNE) == call(CONVERT) == 130
        patch.setattr(compression, "_save", fails)
        assert call(PRUNE) == 130


def _as_earlier(file: Path, change: Callable[[Any], object]) -> None:
    """Changes each line of a file; what was written without checksums is not refused for them."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        change(line)
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
