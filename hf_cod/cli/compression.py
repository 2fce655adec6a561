"""The one pipeline of all commands that compress a model.

Load, split the text, measure, plan, apply, save, reload, measure, report.

A command brings its settings and a `Step`. Report keys mean the same for every command: of `results`, "perplexity",
"memory_bytes" and "speed" hold "intact", what the step made of it and, for perplexity, what it is compared with;
"disk_bytes" is the size of the saved weights, "evaluation" the samples that perplexity was measured on, "score" what
the layers were scored with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_cod.analysis.evaluation.choice import held_out_perplexity
from hf_cod.cli.findings import closing
from hf_cod.cli.output import JOURNAL, check_output, finish, require_plots, results_of
from hf_cod.cli.parser import default_directory, model_title
from hf_cod.cli.samples import load_with_tokenizer, split_text
from hf_cod.cli.settings import ResultsOutput
from hf_cod.cli.step import Step
from hf_cod.cli.terminal import print_report
from hf_cod.io.models import load_model
from hf_cod.io.report import RunReport
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.io.text import Batch, describe_batches
from hf_cod.layers.size import bytes_of
from hf_cod.layers.speed import Speeds, speeds_of
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import LANGUAGE_MODELS, task_of
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers


class Work:
    """One model that is being compressed; memory never holds two.

    Attributes:
        model: the model as it is now; any class of transformers.
        tokenizer: its tokenizer.
        calibration, evaluation: samples to work on, and others to measure on.
        scores: of the layers, given or found; None as long as there are none.
        options: keyword arguments that every method takes: journal, layers_path, show_progress.
        name: what reports call the model.
    """

    model: Any
    calibration: Sequence[Batch]
    evaluation: Sequence[Batch]

    def __init__(
        self, source: str, loading: ModelSettings, settings: Any, journal: Path, scores_file: str | None = None
    ) -> None:
        self.scores = None if scores_file is None else LayerScores.load(scores_file)
        self._source, self._loading, self.settings = source, loading, settings
        self.model, self.tokenizer = load_with_tokenizer(source, loading)
        self.name = model_title(source)
        self.options: dict[str, Any] = {
            "journal": journal,
            "layers_path": settings.layers_path,
            "show_progress": True,
        }
        if self.scores is not None:
            self.scores.check(self.stack)

    @property
    def stack(self) -> DecoderLayers:
        """The layers of the model as it is now."""
        return find_decoder_layers(self.model, self.settings.layers_path)

    def renew(self) -> None:
        """Loads the intact model in the place of a changed one."""
        self.model = None
        self.model = self.load()

    def load(self) -> Any:
        """The intact model, loaded anew."""
        return load_model(self._source, self._loading)[0]

    def reload(self, directory: Path) -> None:
        """Loads what was saved in the place of what was changed."""
        self.model = None
        self.model = load_model(str(directory), replace(self._loading, revision="main"))[0]

    def score(self, method: str, **chosen: Any) -> LayerScores:
        """The scores that were given, or those that are found by a method, with the command's settings of it."""
        if self.scores is None:
            own = {name: getattr(self.settings, name) for name in ("threshold", "per_module", "seed", "layers_path")}
            more = {**own, **chosen, "batches": self.calibration, "show_progress": True}
            self.scores = score_layers(self.model, method=method, **more)
        return self.scores

    def perplexity(self) -> float | None:
        """On the samples to measure on; None for a model that is no language model."""
        if task_of(self.model) not in LANGUAGE_MODELS:
            return None
        return held_out_perplexity(self.model, self.evaluation, self.settings.layers_path)

    def speed(self, name: str) -> Speeds:
        """Of the model as it is now, under that name; empty where it is not asked for.

        With one model in memory at a time, the intact one is timed before it is changed and what was saved afterwards:
        what else the machine does in between is in the figures.
        """
        if not getattr(self.settings, "speed", False):
            return {}
        return speeds_of({name: self.stack}, self.evaluation)


def compress(
    step: Step,
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    files: ResultsOutput,
) -> int:
    """Runs a step on a model, into a directory that is complete afterwards or not there.

    Args:
        step: the command's.
        source: Hub id, directory or GGUF file.
        loading, text, files: how the model is loaded, which text it is measured on, and where results go.

    Returns:
        The exit status.
    """
    directory = Path(files.output or default_directory(step.command, source))
    check_output(directory, source)
    if files.plots:
        require_plots()
    results = results_of(directory)
    report = run(step, source, loading, text, directory / JOURNAL, results, getattr(files, "scores", None))
    if report is None:
        print(f"\nnothing was made; what was measured is kept in {directory.resolve()}")
        return 0
    if files.plots:
        report.plot(results)
    report.save(results)
    finish(directory, results)
    print_report(report)
    print(f"\nwritten to {directory.resolve()}")
    return 0


def run(
    step: Step,
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    journal: Path,
    output: Path,
    scores_file: str | None = None,
) -> RunReport | None:
    """The pipeline itself; a directory for a journal, one for the model and what it followed.

    Returns:
        The report of it, which is not saved yet; None where the step's plan is to do nothing.
    """
    work = Work(source, loading, step.settings, journal, scores_file)
    step.check(work)
    work.calibration, work.evaluation = split_text(work.model, work.tokenizer, text, step.samples())
    perplexity, memory = {"intact": work.perplexity()}, {"intact": bytes_of(work.model)}
    speed = work.speed("intact")
    plan = step.plan(work)
    if plan is None:
        return None
    for name, other in step.baselines(work, plan).items():
        step.apply(work, other)
        perplexity[name] = work.perplexity()
        work.renew()
    report = step.apply(work, plan)
    made = step.done
    if step.trained is not None:
        perplexity[made] = work.perplexity()
        step.train(work)
    _save(output, work, step.files(plan))
    work.reload(output)
    perplexity[step.trained or made] = work.perplexity()
    memory[made] = bytes_of(work.model)
    speed |= work.speed(made)
    layers, counted = step.measure(work.stack)
    results = {
        **report.results,
        **counted,
        "perplexity": perplexity,
        "memory_bytes": memory,
        "disk_bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")),
        "speed": speed,
        "evaluation": describe_batches(work.evaluation),
        **({} if work.scores is None else {"score": work.scores.settings}),
    }
    told = {**asdict(step.settings), "text": text.text, **describe_batches(work.calibration)}
    found = {} if work.scores is None else {"score": work.scores.values}
    remarks = [] if work.scores is None else work.scores.remarks
    report = replace(
        report,
        settings={**told, "scores": scores_file, **step.told(plan)},
        layers={**report.layers, **layers, **found},
        results=results,
    )
    return replace(report, summary=[*step.sentences(report, work.model), *closing(results, made), *remarks])


def _save(directory: Path, work: Work, files: dict[str, Any]) -> None:
    """What a command made, beside what it followed."""
    work.model.save_pretrained(directory)
    work.tokenizer.save_pretrained(directory)
    if work.scores is not None:
        work.scores.save(directory / "scores.json")
    for name, record in files.items():
        record.save(directory / name)
