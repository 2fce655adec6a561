"""hf-cod finetune --print-trl: the same training as a script with TRL."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_cod.io.inputs import FILE_READERS
from hf_cod.io.settings import TextSettings
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


def script(model: str, text: TextSettings, settings: TrainingSettings, sampling: OwLoreSettings, output: str) -> str:
    """A Python script: imports, the data, and the trainer.

    Layers are sampled by the scores in `output`, which `hf-cod score` writes.

    Raises:
        ValueError: the embedded text or a file of plain text, which TRL does not read; a format or a method that TRL
            has no words for.
    """
    from hf_cod.io.rows import read_rows

    reader = FILE_READERS.get(Path(text.text or "").suffix)
    if text.text is None or (Path(text.text).is_file() and reader is None):
        raise ValueError("print_trl: expected a file of rows or a dataset as text, got plain text")
    chosen = read_rows(text)[1]
    if chosen.name == "instructions" or (chosen.name == "text" and chosen.left_out):
        raise ValueError(f"print_trl: expected messages, prompts with completions or texts, got {chosen.name}")
    given: dict[str, Any] = {
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
    }
    loss: dict[str, dict[str, Any]] = {
        "conversations": {"assistant_only_loss": True},
        "prompts and completions": {"completion_only_loss": True},
        "text": {"dataset_text_field": chosen.columns[0]},
    }
    given |= {**loss[chosen.name], "seed": sampling.seed}
    given |= {} if text.chat_template is None else {"chat_template_path": text.chat_template}
    imports, last = _method(settings, sampling, output)
    rows = f"load_dataset({text.text!r}, {text.text_config!r}, split={text.text_split!r})"
    if reader is not None:
        rows = f"load_dataset({reader!r}, data_files={text.text!r}, split='train')"
    words = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return "\n".join(
        [
            *("from datasets import load_dataset", "from trl import SFTConfig, SFTTrainer", *imports, ""),
            f"dataset = {rows}",
            f"arguments = SFTConfig({output!r}, {words})",
            f"SFTTrainer({model!r}, arguments, train_dataset=dataset{last}).train()",
        ]
    )


def _method(settings: TrainingSettings, sampling: OwLoreSettings, output: str) -> tuple[list[str], str]:
    """Imports, and the argument of the trainer."""
    if settings.method == "full":
        return [], ""
    if settings.method == "lora":
        rank = int(settings.lora_rank)
        told = f"LoraConfig(r={rank}, lora_alpha={2 * rank}, target_modules='all-linear')"
        return ["from peft import LoraConfig"], f", peft_config={told}"
    if settings.method not in WITH_OWLORE:
        raise ValueError(f"print_trl: expected one of the methods owlore, lisa, lora, full, got {settings.method}")
    values = {name: getattr(sampling, name) for name in ("n_active", "interval", "rank", "floor", "train_embeddings")}
    values |= {"lr": settings.rate, "seed": sampling.seed, **FIXED.get(settings.method, {})}
    # Defaults that the optimizer lowers for a small model are left out.
    from hf_cod.io.settings import Default

    words = [f"{name}={value!r}" for name, value in values.items() if not isinstance(value, Default)]
    scores = "None" if settings.method == "lisa" else f"LayerScores.load({str(Path(output) / 'scores.json')!r})"
    imports = ["from hf_cod import owlore" if settings.method == "lisa" else "from hf_cod import LayerScores, owlore"]
    return imports, f", optimizer_cls_and_kwargs=owlore({', '.join([scores, *words])})"
