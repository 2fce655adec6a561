"""hf-cod heal STUDENT --teacher ORIGINAL: train a compressed model to match the original model (distillation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cod.cli.parser import SettingsParser, default_directory, model_title
from hf_cod.cli.settings import CompressionSettings, SpeedSettings, TrainingOutput
from hf_cod.io.settings import DTYPES, ModelSettings, TextSettings, as_in
from hf_cod.training.healing.settings import HealSettings, warn_of_few_steps
from hf_cod.training.owlore.settings import OwLoreSettings

if TYPE_CHECKING:
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.report import RunReport
    from hf_cod.io.whole_checkpoint import WholeCheckpoint


@dataclass
class TeacherSettings:
    """Settings of the teacher, and of evaluation."""

    teacher: str = field(metadata={"help": "original model of the student: Hub id, directory, or GGUF file"})
    teacher_dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the teacher's weights; bfloat16 halves the memory of float32", "choices": DTYPES},
    )
    teacher_revision: str = field(default="main", metadata={"help": "branch, tag or commit of the teacher on the Hub"})
    eval_text: str | None = as_in(CompressionSettings, "eval_text")
    speed: bool = as_in(SpeedSettings, "speed")

    def __post_init__(self) -> None:
        ModelSettings(dtype=self.teacher_dtype)


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, TextSettings, TeacherSettings, HealSettings, OwLoreSettings, TrainingOutput],
        prog="hf-cod heal",
        description="Trains a pruned, factorized, narrowed or shortened model (the student) on text to match the "
        "outputs of the original model (the teacher), and writes a model that loads in the same way as the student. "
        "Zeros, ranks and widths do not change. After an interruption the same command resumes.",
    )
    parser.add_model("student")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, text, source, settings, sampling, files, rest = make_parser().parse(arguments)
    from hf_cod.cli.training import check_training, train_into

    check_training(settings, sampling, files, text, source.eval_text)
    warn_of_few_steps(settings)
    directory = Path(files.output or default_directory("heal", rest.student))
    told = {**asdict(loading), **asdict(text), **asdict(source), **settings.resolved()}
    told |= asdict(sampling)
    del told["speed"]  # does not affect the training
    if settings.follows_samples:
        del told["steps"]
    work = partial(run, rest.student, loading, text, source, settings, sampling, files.scores)
    train_into(directory, {"student": rest.student, **told}, rest.student, files, work)
    return 0


def run(
    student: str,
    loading: ModelSettings,
    text: TextSettings,
    source: TeacherSettings,
    settings: HealSettings,
    sampling: OwLoreSettings,
    scores_file: str | None,
    output: OutputDirectory,
) -> RunReport:
    """Loads both models, heals the student, saves it, and measures the speed of both in turns."""
    from hf_cod.cli.closing import describe_speed
    from hf_cod.cli.recorded import with_inputs
    from hf_cod.io.packing import pack
    from hf_cod.io.text import load_texts
    from hf_cod.layers.size import bytes_of
    from hf_cod.layers.speed import speeds_of
    from hf_cod.layers.stack import find_decoder_layers
    from hf_cod.scoring.layer_scores import LayerScores
    from hf_cod.training.healing.healer import heal

    model, tokenizer, teacher, whole = load_both(student, loading, source)
    output.require(bytes_of(model))
    held_out = None
    if source.eval_text is not None:
        texts = load_texts(replace(text, text=source.eval_text))
        held_out = pack(tokenizer, texts, settings.sequence_length, most=settings.eval_samples)
    told: dict[str, Any] = {"sampling": sampling, "scores": scores_file, "held_out": held_out, "output": output.path}
    told["name"] = model_title(student)
    report = heal(model, teacher, load_texts(text), settings, tokenizer=tokenizer, **told)
    notes = whole.save(model, output.results)
    speed = {}
    if source.speed:
        stacks = {"teacher": find_decoder_layers(teacher), "healed": find_decoder_layers(model)}
        prompt = pack(tokenizer, load_texts(text), settings.sequence_length, most=1).long()
        speed = speeds_of(stacks, [{"input_ids": prompt}])
    results = {**report.results, "speed": speed}
    drawn = {} if scores_file is None else {"score": LayerScores.load(scores_file).method, "scores": scores_file}
    report = replace(
        report,
        settings={"student": student, "teacher": source.teacher, **report.settings, **drawn},
        results=results,
        notes=[*report.notes, *notes],
        summary=[*report.summary, *describe_speed(results, "healed", "teacher")],
    )
    return with_inputs(report, source, loading, text)


def load_both(student: str, loading: ModelSettings, source: TeacherSettings) -> tuple[Any, Any, Any, WholeCheckpoint]:
    """Loads student, tokenizer and teacher, and everything that came with the student.

    Raises:
        ValueError: a model cannot be loaded, the student is quantized or packed, or the tokenizers differ.
    """
    from hf_cod.cli.samples import load_with_tokenizer
    from hf_cod.io.quantized import check_unquantized
    from hf_cod.io.whole_checkpoint import WholeCheckpoint

    model, tokenizer = load_with_tokenizer(student, loading)
    check_unquantized(model, student, "student")
    teacher = load_teacher(source, loading, tokenizer)
    return model, tokenizer, teacher, WholeCheckpoint(student, loading, model, tokenizer)


def load_teacher(source: TeacherSettings, loading: ModelSettings, tokenizer: Any) -> Any:
    """Loads the teacher and checks that its tokenizer is that of the student.

    Raises:
        ValueError: the teacher cannot be loaded, or has another tokenizer.
    """
    from hf_cod.cli.samples import load_with_tokenizer
    from hf_cod.training.healing.pair import check_tokenizers

    its_loading = replace(loading, dtype=source.teacher_dtype, revision=source.teacher_revision)
    try:
        teacher, its_tokenizer = load_with_tokenizer(source.teacher, its_loading, adapters=True)
    except ValueError as error:
        raise ValueError(f"teacher: {str(error).removeprefix('model: ')}") from error
    check_tokenizers(tokenizer, its_tokenizer)
    return teacher
