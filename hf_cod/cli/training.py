"""What the commands share that train: how results are shown."""

from __future__ import annotations

import shutil
from pathlib import Path

from hf_cod.cli.recorded import card_outputs
from hf_cod.cli.settings import PlotSettings
from hf_cod.cli.terminal import print_report
from hf_cod.io.report import RunReport
from hf_cod.training.runs.run_directory import last_steps


def tell(report: RunReport, directory: Path, pictures: PlotSettings) -> None:
    """Draws, saves and prints the report, says where the model is, and clears the checkpoints, which are done with."""
    if pictures.plots:
        report.plot(directory, pictures.plot_format)
    report.save(directory)
    card_outputs(directory, report)
    print_report(report)
    for name in ("model", "adapter"):
        if (directory / name).is_dir():
            print(f"\n{name} written to {(directory / name).resolve()}")
    for _, checkpoint in last_steps(directory):
        shutil.rmtree(checkpoint)
