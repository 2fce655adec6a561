"""What the commands share that train: where results go, and how they are told."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from hf_cod.cli.terminal import print_report
from hf_cod.io.report import RunReport
from hf_cod.training.runs.run_directory import last_steps


@dataclass
class TrainingOutput:
    """What is read beside the model, and where results go."""

    scores: str | None = field(default=None, metadata={"help": "scores.json of hf-cod score, instead of scoring anew"})
    output: str | None = field(
        default=None,
        metadata={
            "help": "directory for checkpoints, report and, in OUTPUT/model, the model; default: hf-cod-COMMAND-MODEL"
        },
    )
    plots: bool = field(default=True, metadata={"help": "draw the pictures (needs matplotlib)"})


def tell(report: RunReport, directory: Path, plots: bool) -> None:
    """Draws, saves and prints the report, says where the model is, and clears the checkpoints, which are done with."""
    if plots:
        report.plot(directory)
    report.save(directory)
    print_report(report)
    for name in ("model", "adapter"):
        if (directory / name).is_dir():
            print(f"\n{name} written to {(directory / name).resolve()}")
    for _, checkpoint in last_steps(directory):
        shutil.rmtree(checkpoint)
