"""hf-cod finetune --print-trl: the same training as a script with TRL."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_cod.io.inputs import FILE_READERS
from hf_cod.io.module_names import FIELDS
from hf_cod.io.settings import ModelSettings, TextSettings, check_effect, given
from hf_cod.scoring.settings import options_of
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.training_settings import FIXED, TrainingSettings

# Methods that TRL makes with our optimizer, and how.
WITH_OWLORE = ("owlore", "lisa")


@dataclass
class TrlSettings:
    """Settings of the script."""

    print_trl: bool = field(
        default=False, metadata={"help": "only print a script that trains with TRL's SFTTrainer on the same text"}
    )


def script(
    model: str,
    loading: ModelSettings,
    text: TextSettings,
    settings: TrainingSettings,
    sampling: OwLoreSettings,
    output: str,
    scores_file: str | None,
) -> str:
    """A Python script: imports, the data, and the trainer.

    Layers are sampled by the scores of the file, else by those in `output`, which `hf-cod score` writes.

    Raises:
        ValueError: the embedded text or a file of plain text, which TRL does not read; a format or a method that TRL
            has no words for; or a setting that the script would leave out.
    """
    _check_complete(loading, settings, sampling)
    from hf_cod.io.rows import read_rows

    reader = FILE_READERS.get(Path(text.text or "").suffix)
    if text.text is None or (Path(text.text).is_file() and reader is None):
        raise ValueError("print_trl: expected a file of rows or a dataset as text, got plain text")
    chosen = read_rows(text)[1]
    if chosen.name == "instructions" or (chosen.name == "text" and chosen.left_out):
        raise ValueError(f"print_trl: expected messages, prompts with completions or texts, got {chosen.name}")
    loss: dict[str, dict[str, Any]] = {
        "conversations": {"assistant_only_loss": True},
        "prompts and completions": {"completion_only_loss": True},
        "text": {"dataset_text_field": chosen.columns[0]},
    }
    arguments = {**_arguments(loading, settings), **loss[chosen.name], "seed": sampling.seed}
    arguments |= {} if text.chat_template is None else {"chat_template_path": text.chat_template}
    imports, last = _method(settings, sampling, scores_file or str(Path(output) / "scores.json"))
    rows = f"load_dataset({text.text!r}, {text.text_config!r}, split={text.text_split!r})"
    if reader is not None:
        rows = f"load_dataset({reader!r}, data_files={text.text!r}, split='train')"
    words = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return "\n".join(
        [
            *("from datasets import load_dataset", "from trl import SFTConfig, SFTTrainer", *imports, ""),
            f"dataset = {rows}",
            f"arguments = SFTConfig({output!r}, {words})",
            f"SFTTrainer({model!r}, arguments, train_dataset=dataset{last}).train()",
        ]
    )


def _arguments(loading: ModelSettings, settings: TrainingSettings) -> dict[str, Any]:
    """The arguments of `SFTConfig` that do not depend on the text."""
    return {
        "max_length": settings.sequence_length,
        "max_steps": settings.total_steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // settings.micro_batch_size,
        "learning_rate": settings.rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, settings.total_steps // 10),
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.checkpointing,
        "model_init_kwargs": {"dtype": loading.dtype},
        "save_steps": settings.save_every,
        "logging_steps": settings.log_every,
    }


def _check_complete(loading: ModelSettings, settings: TrainingSettings, sampling: OwLoreSettings) -> None:
    """Checks that nothing is set that the script would leave out.

    Raises:
        ValueError: a setting of it.
    """
    others = [each.name for each in fields(loading) if each.name != "dtype"]
    check_effect(loading, others, "print_trl, whose script loads the model by its name")
    check_effect(settings, ("score", *options_of(settings)), "print_trl, whose script reads scores")
    check_effect(settings, ["eval_samples", "passes"], "print_trl, whose script trains on all records for --steps")
    if settings.method not in WITH_OWLORE:
        check_effect(sampling, FIELDS, f"print_trl and {settings.method}")


def _method(settings: TrainingSettings, sampling: OwLoreSettings, scores_file: str) -> tuple[list[str], str]:
    """Imports, and the argument of the trainer."""
    if settings.method == "full":
        return [], ""
    if settings.method == "lora":
        rank = int(settings.lora_rank)
        told = f"LoraConfig(r={rank}, lora_alpha={2 * rank}, target_modules='all-linear')"
        return ["from peft import LoraConfig"], f", peft_config={told}"
    if settings.method not in WITH_OWLORE:
        raise ValueError(f"print_trl: expected one of the methods owlore, lisa, lora, full, got {settings.method}")
    values = {name: getattr(sampling, name) for name in given(sampling, asdict(sampling))}
    values |= {"lr": settings.rate, "seed": sampling.seed, **FIXED.get(settings.method, {})}
    words = [f"{name}={value!r}" for name, value in values.items()]
    scores = "None" if settings.method == "lisa" else f"LayerScores.load({scores_file!r})"
    imports = ["from hf_cod import owlore" if settings.method == "lisa" else "from hf_cod import LayerScores, owlore"]
    return imports, f", optimizer_cls_and_kwargs=owlore({', '.join([scores, *words])})"
