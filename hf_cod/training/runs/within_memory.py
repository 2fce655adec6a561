"""Chooses method and steps of a fine-tuning that fits the memory of a device, by estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from hf_cod.io.settings import Default, given
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.memory import Memory
from hf_cod.training.runs.methods import check_method
from hf_cod.training.runs.training_settings import SAMPLING_LAYERS, TrainingSettings, check_effects

# Methods that are tried, with the reason for each, by docs/benchmarks/finetuning.md: "Quality" (one model of
# 135M parameters; the rows of owlore were measured with version 0.1) and "Memory of LLaMA2-7B". There the others
# require more memory than LoRA with checkpointing, and none has a lower loss on text. Other models may differ.
TRIED = {
    "lora": "the lowest loss on text of the methods compared in the documentation",
    "owlore": "the lowest estimated memory of the methods without adapters",
}
# Share of the memory that estimates do not count: workspace of kernels, fragmentation, the device's own context.
RESERVE = 0.05


@dataclass(frozen=True)
class Fit:
    """Settings of a training that fits.

    Attributes:
        settings: method, forward passes and checkpointing.
        sampling: number of layers at a time.
        memory: the estimate.
        why: reasons, one sentence each.
    """

    settings: TrainingSettings
    sampling: OwLoreSettings
    memory: Memory
    why: list[str]


Estimate = Callable[[TrainingSettings, OwLoreSettings], Memory]
"""Memory of a training with these settings; raises ValueError or ImportError if the method refuses them."""


def choose_within(
    room: int, settings: TrainingSettings, sampling: OwLoreSettings, scores_file: str | None, estimate: Estimate
) -> Fit:
    """The first training that fits, in the order of what costs least: time is spent before quality.

    A method that the user set stays; otherwise those of `TRIED` are tried in turn. Then fewer samples per forward pass
    (the samples per step stay), then checkpointing, which repeats each forward pass, then fewer layers at a time.

    Args:
        room: memory of the device in bytes, of which `RESERVE` is kept free.
        settings: the user's; `micro_batch_size` is the most that is tried, and checkpointing that is on stays on.
        sampling: the user's; a number of layers that was given stays.
        scores_file: the user's file of scores, which methods without sampling refuse.
        estimate: see `Estimate`.

    Raises:
        ValueError: nothing fits; gives the least memory of each method.
    """
    named = bool(given(settings, ["method"]))
    most = room * (1 - RESERVE)
    refused = []
    for method in [settings.method] if named else TRIED:
        tried = replace(settings, method=method)
        try:
            check_effects(tried, sampling, scores_file)
            check_method(method, sampling)
            ways = [*_ways(tried, sampling)]
            least = estimate(*ways[-1]).total
        except (ImportError, ValueError) as error:
            if named:
                raise
            refused.append(f"{method}: {error}")
            continue
        if least > most:
            refused.append(f"{method} requires {least / 1e9:.3g} GB at least")
            continue
        found, memory = next((way, known) for way in ways if (known := estimate(*way)).total <= most)
        reason = "as you chose" if named else TRIED[method]
        return Fit(*found, memory, [f"method {method}: {reason}", *refused, *_told(ways[0], found)])
    raise ValueError(
        f"memory: expected a training that fits {room / 1e9:.3g} GB, of which {RESERVE:.0%} stay free, got "
        f"{'; '.join(refused)}. Use --dtype bfloat16, a smaller --sequence-length, or a quantized model with adapters"
    )


def _ways(settings: TrainingSettings, sampling: OwLoreSettings) -> Iterator[tuple[TrainingSettings, OwLoreSettings]]:
    """Settings of one method, from those that train fastest to those that require least."""
    sizes = [n for n in range(settings.micro_batch_size, 0, -1) if settings.batch_size % n == 0]
    if sampling.fused:
        sizes = sizes[:1]  # the update inside the backward pass requires all samples in one
    numbers = [sampling.n_active]
    if settings.method in SAMPLING_LAYERS and isinstance(sampling.n_active, Default):
        numbers += [number for number in (2, 1) if number < sampling.n_active]
    shapes = product(sorted({settings.checkpointing, True}), sizes)
    for number, (checkpointing, size) in product(numbers, [*shapes]):
        step = replace(settings, micro_batch_size=size, checkpointing=checkpointing)
        yield step, replace(sampling, n_active=number)


def _told(first: tuple[TrainingSettings, OwLoreSettings], found: tuple[TrainingSettings, OwLoreSettings]) -> list[str]:
    """What was changed to make it fit."""
    (settings, sampling), (chosen, fewer) = first, found
    told = []
    if chosen.micro_batch_size != settings.micro_batch_size:
        told.append(f"{chosen.micro_batch_size} samples per forward pass, since {settings.micro_batch_size} do not fit")
    if chosen.checkpointing and not settings.checkpointing:
        told.append("checkpointing, since the activations do not fit: a step takes about a third longer")
    if fewer.n_active != sampling.n_active:
        told.append(f"{fewer.n_active} layers at a time, since {sampling.n_active} do not fit")
    return told
