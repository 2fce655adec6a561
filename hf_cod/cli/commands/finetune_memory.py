"""Memory of hf-cod finetune: estimated by --estimate, chosen for by --memory, and compared with the memory used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_cod.cli.sizes import in_gigabytes, parse_bytes
from hf_cod.io.display import say
from hf_cod.io.settings import ModelSettings, check_effect
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.training_settings import TrainingSettings

if TYPE_CHECKING:
    from hf_cod.training.runs.memory import Memory
    from hf_cod.training.runs.within_memory import Fit

IN_PYTHON = "hf_cod.owlore with Trainer"  # for other models than those of the command


@dataclass
class EstimateSettings:
    """Settings of the memory estimate."""

    estimate: bool = field(
        default=False,
        metadata={
            "help": "only print the estimated memory of each method (weights, gradients, optimizer state, ...); no "
            "weights are loaded"
        },
    )
    memory: str | None = field(
        default=None,
        metadata={
            "help": "memory of the device, such as 24GB or 80GiB, in which the training has to fit: chooses the method "
            "if you do not, then fewer samples per forward pass, checkpointing, and fewer layers at a time; default: "
            "nothing is chosen, and --estimate and --plan-only take the free memory",
            "also": "device-memory",
        },
    )
    plan_only: bool = field(
        default=False, metadata={"help": "print what is chosen for the memory and why, and do not train"}
    )

    def __post_init__(self) -> None:
        if self.memory is not None:
            self.bytes_of_device()
        if self.estimate:
            check_effect(self, ["plan_only"], "estimate, which prints all methods and chooses none")

    @property
    def chooses(self) -> bool:
        """Whether settings are chosen for the memory."""
        return not self.estimate and (self.plan_only or self.memory is not None)

    def bytes_of_device(self) -> int | None:
        """The value of `memory` in bytes; None if not set."""
        return None if self.memory is None else parse_bytes(self.memory, "memory")


def print_estimates(
    source: str, loading: ModelSettings, settings: TrainingSettings, sampling: OwLoreSettings, told: EstimateSettings
) -> None:
    """Prints a table of all methods, and which of them fit.

    Raises:
        ValueError: a model that the training refuses, see `check_task`.
    """
    from rich import box
    from rich.table import Table

    from hf_cod.cli.terminal import make_console
    from hf_cod.io.display import terminal_text
    from hf_cod.io.models import best_device, load_config
    from hf_cod.layers.running import progress
    from hf_cod.training.runs.memory import PARTS
    from hf_cod.training.runs.methods import METHODS

    config = load_config(source, loading)
    _check_kind(config)
    device = loading.device or best_device()
    room = told.bytes_of_device() or free_memory(device)
    table = Table("method", *PARTS, "total", "fits", box=box.SIMPLE_HEAD, padding=0)
    refused = []
    for method in progress(METHODS, "estimating", show=True):
        try:
            found = estimate(config, method, settings, sampling, loading.trust_remote_code)
        except (ImportError, ValueError) as error:  # settings that this method does not support
            refused.append(f"{method}: {error}")
            continue
        cells = [in_gigabytes(value) for value in (*found.parts().values(), found.total)]
        table.add_row(method, *cells, "yes" if found.total <= room else "no")
    console = make_console()
    console.print(table)
    where = told.memory or f"{in_gigabytes(room)} GB free on {device}"
    console.print(
        f"GB (10^9 bytes) at the peak of a step of {settings.micro_batch_size} x {settings.sequence_length} tokens, "
        f"checkpointing {'on' if settings.checkpointing else 'off'}; available: {where}. Not included: workspace of "
        "kernels, and the context of the device.",
        highlight=False,
    )
    for reason in refused:
        console.print(f"not estimated, {terminal_text(reason)}", style="dim", highlight=False)


def choose(
    source: str,
    loading: ModelSettings,
    settings: TrainingSettings,
    sampling: OwLoreSettings,
    told: EstimateSettings,
    scores_file: str | None,
) -> Fit:
    """Method and steps that fit the memory, which are printed; no weights are loaded.

    Raises:
        ValueError: nothing fits, the training refuses the model (see `check_task`), or the model is quantized, whose
            memory is not estimated; gives the reason.
    """
    from hf_cod.io.models import best_device, load_config
    from hf_cod.training.runs.within_memory import choose_within

    config = load_config(source, loading)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"memory: expected a model that is not quantized, whose memory can be estimated, got {source}; use "
            "--micro-batch-size and --checkpointing instead"
        )
    _check_kind(config)
    device = loading.device or best_device()
    room = told.bytes_of_device() or free_memory(device)

    def estimated(tried: TrainingSettings, drawn: OwLoreSettings) -> Memory:
        return estimate(config, tried.method, tried, drawn, loading.trust_remote_code)

    say(f"choosing for {told.memory or f'{in_gigabytes(room)} GB free on {device}'} ...")
    found = choose_within(room, settings, sampling, scores_file, estimated)
    say(
        f"{found.settings.micro_batch_size} x {found.settings.sequence_length} tokens per forward pass, checkpointing "
        f"{'on' if found.settings.checkpointing else 'off'}: {in_gigabytes(found.memory.total)} GB are estimated at "
        "the peak"
    )
    for reason in found.why:
        say(f"- {reason}")
    return found


def estimate(
    config: Any, method: str, settings: TrainingSettings, sampling: OwLoreSettings, trust_remote_code: bool = False
) -> Memory:
    """Estimated memory of a training with these settings."""
    import torch

    from hf_cod.training.runs.estimate import estimate_memory

    return estimate_memory(
        config,
        method,
        sampling,
        micro_batch_size=settings.micro_batch_size,
        sequence_length=settings.sequence_length,
        dtype=config.dtype or torch.float32,
        checkpointing=settings.checkpointing,
        autocast=settings.bf16,
        accumulation=settings.batch_size // settings.micro_batch_size,
        max_grad_norm=settings.max_grad_norm,
        lora_rank=settings.lora_rank,
        trust_remote_code=trust_remote_code,
    )


def _check_kind(config: Any) -> None:
    """Checks that the class named by a config, which the training would load, is one that it trains.

    Many types of encoders also have a causal class, whose memory is that of another model.

    Raises:
        ValueError: it is another one, see `check_task`.
    """
    import torch
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    model_class = getattr(transformers, named, None)
    if model_class is not None:  # else a class with code of its own
        with torch.device("meta"):
            check_task(model_class(config))


def check_task(model: Any) -> None:
    """Checks that a model is of the kind that learns to continue text.

    Raises:
        ValueError: it is another one; says which, and what trains it.
    """
    from hf_cod.layers.task import task_of

    kinds = {"seq2seq_lm": "an encoder-decoder", "masked_lm": "a masked language model", "headless": "without a head"}
    task = task_of(model)
    if task != "causal_lm":
        got = f"{type(model).__name__}, {kinds.get(task, 'with a head for labels')}"
        raise ValueError(
            f"model: expected a causal language model, which finetune trains on text, got {got}; use {IN_PYTHON} and a "
            "data collator that makes its labels"
        )


def free_memory(device: str) -> int:
    """Free memory of a device in bytes."""
    import psutil
    import torch

    if torch.device("cuda" if device == "auto" else device).type == "cuda":
        return torch.cuda.mem_get_info(None if device == "auto" else device)[0]
    return psutil.virtual_memory().available
