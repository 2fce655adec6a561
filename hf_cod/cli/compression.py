"""The one pipeline of all commands that compress a model.

Load, split the text, measure, plan, apply, save, reload, measure, report.

A command brings its settings and a `Step`. Report keys mean the same for every command: of `results`, "perplexity",
"memory_bytes" and "speed" hold "intact", what the step made of it and, for perplexity, what it is compared with;
"disk_bytes" is the size of the saved weights, "evaluation" the samples that perplexity was measured on, "score" what
the layers were scored with.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_cod.cli.closing import closing
from hf_cod.cli.output import JOURNAL, check_output, finish, require_plots, results_of
from hf_cod.cli.parser import default_directory
from hf_cod.cli.recorded import card_outputs
from hf_cod.cli.samples import split_text
from hf_cod.cli.settings import ResultsOutput
from hf_cod.cli.step import Step
from hf_cod.cli.terminal import print_report
from hf_cod.cli.work import Work
from hf_cod.io.report import RunReport
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.io.text import describe_batches
from hf_cod.layers.size import bytes_of


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
        report.plot(results, files.plot_format)
    report.save(results)
    card_outputs(results, report, directory.resolve().name)
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
    disk = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    measured = {"perplexity": perplexity, "memory_bytes": memory, "disk_bytes": disk, "speed": speed}
    return _complete(report, step, work, plan, measured, text, scores_file)


def _complete(
    report: RunReport,
    step: Step,
    work: Work,
    plan: Any,
    measured: dict[str, Any],
    text: TextSettings,
    scores_file: str | None,
) -> RunReport:
    """A step's report, with what was measured before and after it, and what the user chose."""
    layers, counted = step.measure(work.stack)
    results = {
        **report.results,
        **counted,
        **measured,
        "evaluation": describe_batches(work.evaluation),
        **({} if work.scores is None else {"score": work.scores.settings}),
    }
    told = {"model": work.source, **asdict(step.settings), "text": text.text, **describe_batches(work.calibration)}
    given = {} if scores_file is None or work.scores is None else {"score": work.scores.method}
    scored = {} if work.scores is None else {"score": work.scores.values}
    remarks = [] if work.scores is None else work.scores.remarks
    report = replace(
        report,
        settings={**told, "scores": scores_file, **given, **step.told(plan)},
        layers={**report.layers, **layers, **scored},
        results=results,
    )
    found = [*step.sentences(report, work.model), *closing(results, step.done), *remarks, *step.last_words()]
    return replace(report, summary=found)


def _save(directory: Path, work: Work, files: dict[str, Any]) -> None:
    """What a command made, beside what it followed."""
    work.model.save_pretrained(directory)
    work.tokenizer.save_pretrained(directory)
    if work.scores is not None:
        work.scores.save(directory / "scores.json")
    for name, record in files.items():
        record.save(directory / name)
