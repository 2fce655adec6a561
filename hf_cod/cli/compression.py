"""The one pipeline of all commands that compress a model.

Load, split the text, measure, plan, apply, save, reload, measure, report.

A command provides its settings and a `Step`. Report keys have the same meaning for all commands. In `results`,
"perplexity", "memory_bytes" and "speed" have values for "intact" and for the result of the step; "perplexity" also for
the baselines. "disk_bytes" is the size of the saved weights, "evaluation" describes the samples for perplexity,
"score_settings" has the settings of the scores. "fallback" has the scores and the compared perplexities if a baseline
replaced the plan by score.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_cod.cli.closing import closing, does_harm, harm_notes
from hf_cod.cli.output import require_plots, say_written, write_model
from hf_cod.cli.parser import default_directory
from hf_cod.cli.recorded import with_inputs
from hf_cod.cli.samples import check_texts, split_text, trained_on
from hf_cod.cli.settings import LimitedModelSettings, ResultsOutput
from hf_cod.cli.step import BASELINES, Step
from hf_cod.cli.work import Work
from hf_cod.io.display import say
from hf_cod.io.module_names import without_unset
from hf_cod.io.output_checks import check_unused
from hf_cod.io.output_directory import OutputDirectory
from hf_cod.io.report import RunReport
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.io.text import describe_batches
from hf_cod.layers.memory_limit import above_limit
from hf_cod.layers.size import bytes_of, disk_bytes


def compress(
    step: Step,
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    files: ResultsOutput,
) -> int:
    """Runs a step on a model and writes the results to a directory, completely or not at all.

    Args:
        step: the step of the command.
        source: Hub id, directory or GGUF file.
        loading, text, files: settings of model loading, of the text, and of the output.

    Returns:
        The exit status.
    """
    directory = Path(files.output or default_directory(step.command, source))
    if files.plots:
        require_plots()
    check_texts(text, step.samples().eval_text)
    scores = getattr(files, "scores", None)
    limit = None
    if isinstance(loading, LimitedModelSettings):  # the results do not depend on it
        limit, loading = loading.limit(), loading.without_limit()
    if limit is not None and step.in_memory() is not None:
        raise ValueError(f"max_memory: expected none with {step.in_memory()}, which needs all weights in memory")
    told = [step.command, source, asdict(loading), without_unset(asdict(text)), step.identity(), scores]
    output = OutputDirectory(directory, told, check=check_unused, source=source)
    work = partial(run, step, source, loading, text, scores_file=scores, limit=limit)
    if write_model(output, work, files, spent=OutputDirectory.journaled) is None:
        say(f"\nno model was written; measurements are kept in {directory.resolve()}")
    else:
        say_written(directory)
    return 0


def run(
    step: Step,
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    output: OutputDirectory,
    scores_file: str | None = None,
    limit: int | None = None,
) -> RunReport | None:
    """Runs the pipeline; saves the model, its scores and the files of the step in the results of `output`.

    Returns:
        The report, which is not saved yet; None if the step has no plan to apply.
    """
    work = Work(source, loading, step.settings, output.journal, scores_file, limit)
    output.require(int(step.disk_share() * bytes_of(work.model)))
    step.check(work)
    work.calibration, work.evaluation = split_text(work.model, work.tokenizer, text, step.samples())
    work.check_limit(step.copies())
    perplexity, memory = {"intact": work.perplexity()}, {"intact": bytes_of(work.model)}
    speed = work.speed("intact")
    plan = step.plan(work)
    if plan is None:
        return None
    baselines, untold = _comparable(step.baselines(work, plan), work, perplexity["intact"])
    for name, other in baselines.items():
        say(f"for comparison: {BASELINES[name]} (omitted with --no-baseline)")
        step.apply(work, other)
        perplexity[name] = work.perplexity()
        work.renew()
    if baselines:
        say("now the plan by score")
    report, made = step.apply(work, plan), step.done
    fallback = _harm(step, work, plan, perplexity.get(step.rival))
    if fallback:
        plan = baselines[step.rival]
        work.renew()
        report = step.apply(work, plan)
    if step.trained is not None:
        perplexity[made] = work.perplexity()
        step.train(work)
    notes = [*trained_on(source, text, step.samples().eval_text), *_save(output.results, work, step.files(plan))]
    report = replace(report, notes=[*report.notes, *untold, *notes])
    work.reload(output.results)
    perplexity[step.trained or made] = work.perplexity()
    memory[made] = bytes_of(work.model)
    speed |= work.speed(made)
    disk = disk_bytes(output.results)
    measured: dict[str, Any] = {"perplexity": perplexity, "memory_bytes": memory, "disk_bytes": disk, "speed": speed}
    if fallback:
        measured["fallback"] = fallback
    measured |= work.limit.results()
    return with_inputs(_complete(report, step, work, plan, measured, scores_file), loading, text)


def _comparable(baselines: dict[str, Any], work: Work, intact: float | None) -> tuple[dict[str, Any], list[str]]:
    """The baselines, none where no perplexity compares them with the plan; and a note on that."""
    if intact is not None:
        return baselines, []
    told = f"perplexity is not measured, because {type(work.stack.model).__name__} is no language model"
    compared = "; the plan by score was not compared with " + " and ".join(BASELINES[name] for name in baselines)
    return {}, [told + (compared if baselines else "")]


def _complete(
    report: RunReport,
    step: Step,
    work: Work,
    plan: Any,
    measured: dict[str, Any],
    scores_file: str | None,
) -> RunReport:
    """Adds measurements before and after the step, and the settings, to the report of a step."""
    layers, counted = step.measure(work.stack)
    results = {
        **report.results,
        **counted,
        **measured,
        "evaluation": describe_batches(work.evaluation),
        **({} if work.scores is None else {"score_settings": work.scores.settings}),
    }
    told = {"model": work.source, **asdict(step.settings), **describe_batches(work.calibration)}
    given = {} if scores_file is None or work.scores is None else {"score": work.scores.method}
    scored = {} if work.scores is None else {"score": work.scores.values}
    fallback = measured.get("fallback", {})
    decided = {"score": fallback["score"]} if fallback else {}
    remarks = [] if work.scores is None else work.scores.remarks
    report = replace(
        report,
        settings={**told, "scores": scores_file, **given, **step.told(plan), **decided},
        layers={**report.layers, **layers, **scored},
        results=results,
    )
    found = [*step.sentences(report, work.model), *closing(results, step.done), *remarks, *step.last_words()]
    notes = [*above_limit(measured), *harm_notes(fallback, step.rival)]
    return replace(report, summary=found, notes=[*report.notes, *notes])


def _harm(step: Step, work: Work, plan: Any, alike: float | None) -> dict[str, Any]:
    """Scores and perplexities of the current model and of the rival of its plan, if the rival is better.

    Empty if it is not better, if it was not measured, or with `force`.
    """
    if alike is None or step.settings.force:
        return {}
    by_score = work.perplexity()
    if not does_harm(alike, by_score):
        return {}
    score = getattr(plan, "method", None) or (work.scores.method if work.scores else "")
    return {"score": score, **step.further_scores(), "perplexity": by_score, "uniform": alike}


def _save(directory: Path, work: Work, files: dict[str, Any]) -> list[str]:
    """Saves the model with everything that came with it, scores and the files of the step; returns notes."""
    notes = work.whole.save(work.model, directory)
    if work.scores is not None:
        work.scores.save(directory / "scores.json")
    for name, record in files.items():
        record.save(directory / name)
    return notes
