"""hf-cod finetune MODEL --text TEXT: fine-tune a model, a few layers at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cod.cli.commands.finetune_memory import (
    IN_PYTHON,
    EstimateSettings,
    check_task,
    choose,
    estimate,
    print_estimates,
)
from hf_cod.cli.commands.finetune_trl import TrlSettings, script
from hf_cod.cli.parser import SettingsParser, default_directory, model_title
from hf_cod.cli.settings import TrainingOutput
from hf_cod.cli.sizes import in_gigabytes
from hf_cod.io.display import first_line, say
from hf_cod.io.module_names import ModuleSettings, Names
from hf_cod.io.settings import ModelSettings, TextSettings
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.training_settings import TrainingSettings, for_samples, warn_of_one_draw

if TYPE_CHECKING:
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.report import RunReport
    from hf_cod.io.whole_checkpoint import WholeCheckpoint
    from hf_cod.scoring.layer_scores import LayerScores
    from hf_cod.training.runs.memory import Memory
    from hf_cod.training.runs.trainer import Training


logger = logging.getLogger(__name__)

_NO_ADAPTER = (
    "the adapter is part of the model alone: in a file of its own it would be loaded onto the base of the input, which "
    "is an adapter, too, and lack that one; for such a file, merge the input first (merge_and_unload of PEFT)"
)


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, TrainingSettings, OwLoreSettings, EstimateSettings, TrlSettings, TrainingOutput],
        prog="hf-cod finetune",
        description="Fine-tunes a model on text, by default a few layers at a time (OwLore), and writes a model that "
        "from_pretrained loads. After an interruption the same command resumes.",
    )
    parser.add_model()
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, settings, sampling, asked, trl, files, rest = make_parser().parse(arguments)
    from hf_cod.cli.training import check_training, train_into

    if asked.estimate:
        print_estimates(rest.model, loading, settings, sampling, asked)
        return 0
    why: list[str] = []
    if asked.chooses:
        fit = choose(rest.model, loading, settings, sampling, asked, files.scores)
        settings, sampling = fit.settings, fit.sampling
        why = [f"chosen for {asked.memory}: {reason}" for reason in fit.why]
    if asked.plan_only:
        return 0
    check_training(settings, sampling, files, text)
    directory = Path(files.output or default_directory("finetune", rest.model))
    if trl.print_trl:
        say(script(rest.model, loading, text, settings, sampling, str(directory), files.scores))
        return 0
    told = {"model": rest.model, **asdict(loading), **asdict(text), **settings.resolved()}
    told |= asdict(sampling)
    if settings.follows_samples:
        del told["steps"]
    work = partial(run, rest.model, loading, text, settings, sampling, files.scores, notes=why)
    train_into(directory, told, rest.model, files, work)
    return 0


def run(
    source: str,
    loading: ModelSettings,
    text: TextSettings,
    settings: TrainingSettings,
    sampling: OwLoreSettings,
    scores_file: str | None,
    output: OutputDirectory,
    notes: Sequence[str] = (),
) -> RunReport:
    """Measures perplexity, trains, saves, and measures perplexity again."""
    from hf_cod.analysis.evaluation.choice import held_out_perplexity
    from hf_cod.cli.recorded import with_inputs
    from hf_cod.io.text import load_texts
    from hf_cod.layers.running import progress
    from hf_cod.layers.size import bytes_of
    from hf_cod.layers.stack import find_decoder_layers
    from hf_cod.training.runs.memory import training_memory
    from hf_cod.training.runs.methods import METHODS, adapter_notes
    from hf_cod.training.runs.run_directory import begun_steps, claim
    from hf_cod.training.runs.trainer import scores_to_draw_by, train
    from hf_cod.training.runs.training_data import training_data

    model, tokenizer, whole = _loaded(source, loading, text, settings, sampling)
    # Adapters of a quantized model are saved without the model.
    output.require(0 if getattr(model, "is_quantized", False) else bytes_of(model))
    data = training_data(model, tokenizer, load_texts(text), settings)
    settings = for_samples(settings, len(data.windows), begun_steps(output.path))
    warn_of_one_draw(settings, sampling, len(find_decoder_layers(model)))
    claim(output.path, {"steps": settings.total_steps, **data.identity()})
    before = held_out_perplexity(model, progress(data.held_out, "perplexity", show=True))
    scores = scores_to_draw_by(model, data.windows, settings, scores_file, output.path)
    chosen: Any = METHODS[settings.method]
    adapted = adapter_notes(settings.method, find_decoder_layers(model), sampling)
    trained, optimizer = chosen.setup(model, scores, sampling, settings.rate, settings.lora_rank)
    needed = _expected(model, settings, sampling, loading)
    training = train(trained, optimizer, data.windows, settings, sampling.seed, output.path)
    lost = _lost_energy(trained)
    merged, saved = _saved(trained, whole, chosen.adapters, output.results)
    after = held_out_perplexity(merged, progress(data.held_out, "perplexity", show=True))
    given = {} if scores is None else {"score": scores.method, "scores": scores_file}
    told = {"model": source, **settings.resolved(), **asdict(sampling), **given}
    figures = {
        "perplexity": {"before": before, "after": after},
        "seconds_a_step": training.seconds,
        "training_memory": training_memory(training.memory, needed),
        **({} if lost is None else {"lost_energy": lost}),
    }
    report = _report(merged, training, told, scores, figures, model_title(source))
    return with_inputs(replace(report, notes=[*notes, *data.notes, *report.notes, *adapted, *saved]), loading, text)


def _loaded(
    source: str, loading: ModelSettings, text: TextSettings, settings: TrainingSettings, sampling: OwLoreSettings
) -> tuple[Any, Any, WholeCheckpoint]:
    """The model, its tokenizer and everything that came with it; it can be trained with these settings.

    The tokenizer gets the chat template of the text, which is saved with the model.

    Raises:
        ValueError: they cannot; gives the reason.
    """
    from hf_cod.cli.samples import load_with_tokenizer
    from hf_cod.io.reading import read_text
    from hf_cod.io.whole_checkpoint import WholeCheckpoint
    from hf_cod.layers.checks import check_length
    from hf_cod.training.runs.methods import check_weights

    model, tokenizer = load_with_tokenizer(source, loading, IN_PYTHON)
    check_task(model)
    if text.chat_template is not None:
        tokenizer.chat_template = read_text(text.chat_template, "chat_template")
    check_length(model, settings.sequence_length)
    check_weights(model, settings.method, sampling)
    _excluded(model, sampling.include, sampling.exclude)  # here, because names that match nothing are an error
    return model, tokenizer, WholeCheckpoint(source, loading, model, tokenizer)


def _excluded(model: Any, include: Names, exclude: Names) -> list[str]:
    """A note that names the matrices that do not train, if any were excluded.

    Raises:
        ValueError: a name matches no matrix.
    """
    from hf_cod.layers.module_choice import choose_modules
    from hf_cod.layers.stack import find_decoder_layers

    return choose_modules(find_decoder_layers(model), ModuleSettings(include, exclude)).notes("trained")


def _expected(
    model: Any, settings: TrainingSettings, sampling: OwLoreSettings, loading: ModelSettings
) -> Memory | None:
    """Estimated memory of a step; None, with a warning, if the estimate fails (training continues)."""
    try:
        return estimate(model.config, settings.method, settings, sampling, loading.trust_remote_code)
    except Exception as error:
        logger.warning("memory is not estimated: %s", first_line(error))
        return None


def _saved(trained: Any, whole: WholeCheckpoint, adapters: bool, results: Path) -> tuple[Any, list[str]]:
    """Saves the trained model; for adapters, saves the adapters and the merged model.

    Adapters on a model that was itself an adapter are not saved apart: they would be loaded onto its base alone.

    Adapters cannot be merged into a quantized base model. They are then saved instead of the model, as Trainer does;
    transformers loads them with the base model that they name.

    Returns:
        The saved model, and notes for the report.
    """
    if adapters and not getattr(trained.get_base_model(), "is_quantized", False):
        if whole.base is None:
            trained.save_pretrained(results / "adapter")
        trained = trained.merge_and_unload()
    return trained, [*whole.save(trained, results), *([] if whole.base is None or not adapters else [_NO_ADAPTER])]


def _report(
    model: Any,
    training: Training,
    told: dict[str, Any],
    scores: LayerScores | None,
    figures: dict[str, Any],
    name: str,
) -> RunReport:
    from hf_cod.io.report import RunReport, environment, format_number
    from hf_cod.training.runs.harm import harm_of_training

    results = {"curve": training.curve, **figures}
    layers: dict[str, list[Any]] = {} if scores is None else {"score": scores.values}
    if training.trained is not None:
        layers["trained"] = training.trained
    before, after = (figures["perplexity"][key] for key in ("before", "after"))
    parameter = next(model.parameters())
    return RunReport(
        kind="finetune",
        model=name,
        settings=told,
        environment=environment(parameter.device, parameter.dtype),
        layers=layers,
        results=results,
        summary=[
            f"Perplexity goes from {format_number(before)} to {format_number(after)} on {told['eval_samples']} "
            f"held-out samples, after {told['steps']} steps by {told['method']} (learning rate "
            f"{told['learning_rate']:g}{_told_time(figures['seconds_a_step'])}).",
            _told_memory(figures["training_memory"]),
            *([_told_lost(figures["lost_energy"])] if "lost_energy" in figures else []),
        ],
        notes=_excluded(model, told["include"], told["exclude"])
        + harm_of_training(before, after, told["learning_rate"]),
    )


def _told_time(seconds: float | None) -> str:
    from hf_cod.io.report import format_number

    return "" if seconds is None else f", {format_number(seconds)} s per step"


def _lost_energy(trained: Any) -> dict[str, float] | None:
    """For OwLore's adapters, the share of squares that folding cut off: mean and maximum over matrices."""
    ask = getattr(trained, "lost_energy", None)
    if ask is None:
        return None
    found = [*ask().values()]
    return {"mean": sum(found) / len(found), "largest": max(found)}


def _told_lost(lost: dict[str, float]) -> str:
    return (
        f"Folding cut off {lost['mean']:.2%} of the squares of the adapters' updates on average, {lost['largest']:.2%} "
        "in the worst matrix."
    )


def _told_memory(memory: dict[str, Any]) -> str:
    expected = "there was no estimate"
    if memory["estimate_bytes"] is not None:
        expected = f"the estimate was at most {in_gigabytes(memory['estimate_bytes'])} GB"
    if memory["used_bytes"] is None:
        return f"Memory was not measured, which takes at least two steps; {expected}."
    return f"A step used {in_gigabytes(memory['used_bytes'])} GB of memory at its peak; {expected}."
