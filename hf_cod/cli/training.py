"""Common part of the training commands: checks before the run, and the output directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cod.cli.output import require_plots, write_model
from hf_cod.cli.samples import check_texts
from hf_cod.cli.settings import PlotSettings, TrainingOutput
from hf_cod.io.display import say
from hf_cod.io.module_names import without_unset
from hf_cod.io.output_directory import OutputDirectory
from hf_cod.io.report import RunReport
from hf_cod.io.settings import TextSettings
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.methods import check_method
from hf_cod.training.runs.run_directory import check_claim, claiming, half_checkpoints, last_steps, lost_checkpoints
from hf_cod.training.runs.trainer import check_one_process
from hf_cod.training.runs.training_settings import TrainingSettings, check_effects, check_fused

# (name in the message, file whose directory is printed).
_WRITTEN = (
    ("model", "config.json"),
    ("adapter", "adapter_config.json"),
    ("adapter", "adapter/adapter_config.json"),
)


def check_training(
    settings: TrainingSettings,
    sampling: OwLoreSettings,
    files: TrainingOutput,
    text: TextSettings,
    eval_text: str | None = None,
) -> None:
    """Checks settings, texts, scores file and installed packages, before a model is loaded.

    Raises:
        ValueError: one of them cannot be used, or this is one of several processes; gives the reason.
        ImportError: a package is missing; the message gives the pip command.
    """
    check_effects(settings, sampling, files.scores)
    check_fused(settings, sampling)
    check_method(settings.method, sampling)
    check_texts(text, eval_text)
    if files.scores is not None:
        LayerScores.load(files.scores)
    check_one_process()
    if files.plots:
        require_plots()


def train_into(
    directory: Path,
    identity: dict[str, Any],
    source: str,
    pictures: PlotSettings,
    run: Callable[[OutputDirectory], RunReport],
) -> None:
    """Trains in the directory of a run and prints the report; a run that was killed at its very end is only completed.

    Args:
        directory: the directory of the run.
        identity: JSON-like identity of the run.
        source: the model's directory or name.
        pictures: settings of plots.
        run: function that trains, and writes the model to the results of the directory.
    """

    def claimed(output: OutputDirectory) -> RunReport:
        with claiming(directory, identity):
            return run(output)

    output = OutputDirectory(
        directory,
        without_unset(identity),
        check=lambda path: check_claim(path, identity),
        source=source,
        half=half_checkpoints,
        lost=lost_checkpoints,
    )
    write_model(output, claimed, pictures, spent=checkpoints_in)
    for what, name in _WRITTEN:
        if (directory / name).is_file():
            say(f"\n{what} written to {(directory / name).resolve().parent}")


def checkpoints_in(output: OutputDirectory) -> list[str]:
    """Names of the training checkpoints in a directory, which are not needed any more once the run is finished."""
    return [path.name for _, path in last_steps(output.path)]
