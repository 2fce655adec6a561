"""The commands whose runs are kept, interrupted and finished."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_cod import OwLoreAdamW
from hf_cod.cli import main
from tests.earlier_files.checkpoints import SOURCE, WIDE, load, outputs, without_code

SCORES = "scores/owl.json"
LOADING = "--text text.txt --dtype float32 --device cpu --no-plots"
SAMPLES = f"{LOADING} --sequence-length 8 --max-samples 4 --batch-size 2"
MEASURED = f"{SAMPLES} --eval-samples 4"
TRAINED = f"{LOADING} --sequence-length 8 --steps 6 --batch-size 4 --micro-batch-size 2 --eval-samples 4 --n-active 2"
TRAINED += " --interval 4 --rank 4 --save-every 2 --log-every 1 --learning-rate 1e-2"
# Name of a run -> its command, and behind how many files or lines that reached the disk it is interrupted; of a
# training: behind which checkpoint. Scores come from a file, which is the same on every processor.
RUNS = {
    "diagnose": (f"diagnose {SOURCE} {SAMPLES}", 7),
    "prune": (f"prune {SOURCE} {MEASURED} --method sparsegpt --sparsity 0.6 --scores {SCORES} --no-baseline", 2),
    "quantize": (f"quantize {WIDE} {MEASURED} --bits 3.8 --block 32 --no-baseline", 2),
    "factorize": (f"factorize {SOURCE} {MEASURED} --parameter-share 0.7 --no-baseline --no-speed", 6),
    "narrow": (
        f"narrow {SOURCE} {MEASURED} --parameter-share 0.7 --channel-multiple 8 --scores {SCORES} --no-baseline "
        "--no-speed",
        2,
    ),
    "drop-layers": (f"drop-layers {SOURCE} {MEASURED} --layers 2 --no-protect --no-speed", 9),
    "fit": (f"fit {WIDE} {MEASURED} --bits 6 --knobs rank bits --tuning-samples 4 --verify 1 --no-speed", 4),
    "finetune": (f"finetune {SOURCE} {TRAINED}", 2),
    "finetune-peft": (f"finetune {SOURCE} {TRAINED} --method owlore-peft", 2),
    "heal": (f"heal models/factorized --teacher {SOURCE} {TRAINED} --deselected keep --no-speed", 2),
}
TRAININGS = ("finetune", "finetune-peft", "heal")


def write_run(name: str, command: str, interrupted: int, logits: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A run that is interrupted, and the report and the outputs of one that is not."""
    words = command.split()
    whole = Path("whole", name)
    assert main([*words, "--output", str(whole)]) == 0, name
    keep_report(name, whole)
    found: dict[str, Any] = {"command": [*words, "--output", f"runs/{name}"]}
    if name == "prune":
        assert main(["pack", str(whole), "whole/pack"]) == 0
        keep_report("pack", Path("whole/pack"))
    if name == "fit":
        shutil.copy(whole / "fit_plan.json", "plans/fit.json")
    if name != "diagnose":
        saved = whole / "model" if name in TRAININGS else whole
        logits[f"runs/{name}"] = outputs(load(str(saved)))
    checkpoint = Path("runs", name, f"checkpoint-{interrupted}", "trainer_state.json")
    with _interrupted(checkpoint if name in TRAININGS else interrupted):
        assert main(found["command"]) == 130, name
    shutil.rmtree("whole")
    run = Path("runs", name)
    shutil.rmtree(run / "journal" / "_result", ignore_errors=True)
    without_code(run)
    return found


def write_score() -> dict[str, Any]:
    """Of `score`, whose directory of a finished run serves the next one."""
    command = ["score", SOURCE, *SAMPLES.split(), "--threshold", "3", "--output", "runs/score"]
    assert main(command) == 0
    keep_report("score", Path("runs/score"))
    Path("runs/score/report.md").unlink()
    return {"command": command}


def keep_report(name: str, run: Path) -> None:
    Path("reports", name).mkdir(parents=True)
    shutil.copy(run / "report.json", Path("reports", name))


@contextmanager
def _interrupted(when: int | Path) -> Iterator[None]:
    """Ctrl-C once so many files or lines have reached the disk, or in the first step of a training behind a file."""
    owner, name = (os, "fsync") if isinstance(when, int) else (OwLoreAdamW, "step")
    original, done = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        done[0] += 1
        if when.exists() if isinstance(when, Path) else done[0] > when:  # the one that is cut off does not count
            raise KeyboardInterrupt
        return found

    setattr(owner, name, counted)
    try:
        yield
    finally:
        setattr(owner, name, original)
