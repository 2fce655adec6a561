"""Table of fine-tuning methods: trained parameters and optimizer of each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_cod.io.module_names import FIELDS
from hf_cod.layers.checks import check_separate, pruned_matrices
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.input_gradients import require_input_gradients
from hf_cod.layers.module_choice import choose_modules
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.stock_four_bit import keep_unpacked
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.owlore.active_layers import left_by
from hf_cod.training.owlore.eight_bit import codebook
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.owlore.trained_increments import check_beside_adapters
from hf_cod.training.owlore.trainer_arguments import owlore
from hf_cod.training.runs.adapter_targets import adapter_targets
from hf_cod.training.runs.new_adapters import require_peft, with_adapters
from hf_cod.training.runs.training_settings import DRAW_BY_SCORES, FIXED, LEARNING_RATES

logger = logging.getLogger(__name__)

Setup = Callable[[nn.Module, "LayerScores | None", OwLoreSettings, float, int], "tuple[nn.Module, Any]"]
"""(model, scores, settings, learning rate, LoRA's rank) -> (model to train, Trainer's optimizer_cls_and_kwargs)."""


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Attributes:
        setup: see `Setup`.
        learning_rate: default peak learning rate; the best one depends on model, task and length.
        needs_scores: whether layers are sampled by their scores.
        adapters: whether adapters are trained, which are merged at the end.
    """

    setup: Setup
    learning_rate: float
    needs_scores: bool = False
    adapters: bool = False


def _full(model: nn.Module, scores: Any, settings: OwLoreSettings, lr: float, lora_rank: int) -> tuple[nn.Module, Any]:
    model.requires_grad_(True)
    for parameter in left_by(choose_modules(find_decoder_layers(model), settings)):
        parameter.requires_grad_(False)
    return model, None


def _lora(model: nn.Module, scores: Any, settings: OwLoreSettings, lr: float, lora_rank: int) -> tuple[nn.Module, Any]:
    require_peft("method lora")
    from peft import LoraConfig

    stack = choose_modules(find_decoder_layers(model), settings).stack
    heads = list(stack.task_heads) or None  # a classifier may be new: it trains in full
    config = LoraConfig(
        r=lora_rank, lora_alpha=2 * lora_rank, **adapter_targets(stack).for_lora(), modules_to_save=heads
    )
    keep_unpacked(model)
    require_input_gradients(stack)
    return with_adapters(model, config, settings.seed), None


def _galore(
    model: nn.Module, scores: Any, settings: OwLoreSettings, lr: float, lora_rank: int
) -> tuple[nn.Module, Any]:
    stack = choose_modules(find_decoder_layers(model), settings).stack
    alike = replace(settings, n_active=sum(bool(stack.input_shapes(index)) for index in range(len(stack))))
    return model, owlore(None, lr=lr, **asdict(alike))


def _lisa(model: nn.Module, scores: Any, settings: OwLoreSettings, lr: float, lora_rank: int) -> tuple[nn.Module, Any]:
    whole = replace(settings, **FIXED["lisa"])
    return model, owlore(None, lr=lr, **asdict(whole))


def _owlore(
    model: nn.Module, scores: Any, settings: OwLoreSettings, lr: float, lora_rank: int
) -> tuple[nn.Module, Any]:
    return model, owlore(scores, lr=lr, **asdict(settings))


_NO_RANK = "rank: expected at least 1 for owlore-peft, whose adapters are of low rank, got none"


def _owlore_peft(
    model: nn.Module, scores: Any, settings: OwLoreSettings, lr: float, lora_rank: int
) -> tuple[nn.Module, Any]:
    from hf_cod.training.adapters import OwLoreConfig

    if settings.rank is None:
        raise ValueError(_NO_RANK)
    choice = choose_modules(find_decoder_layers(model), settings)
    heads = list(choice.stack.task_heads) or None  # a classifier may be new: it trains in full
    found = adapter_targets(choice.stack, lora=False) if choice.given else None
    config = OwLoreConfig(r=settings.rank, modules_to_save=heads)
    if found is not None:
        config.target_modules, config.target_parameters = [*found.modules], [*found.banks] or None
    wrapped = with_adapters(model, config, settings.seed)
    others = {key: value for key, value in asdict(settings).items() if key not in ("rank", *FIELDS)}
    return wrapped, owlore(scores, lr=lr, **others)


def check_method(method: str, settings: OwLoreSettings) -> None:
    """Makes sure, before a model is loaded, that a method can train by these settings with what is installed.

    Raises:
        ValueError: settings that its adapters decide themselves, or no rank for them.
        ImportError: a package is missing; says how to add it.
    """
    if METHODS[method].adapters:
        require_peft(f"method {method}")
    if method == "owlore-peft":
        if settings.rank is None:
            raise ValueError(_NO_RANK)
        check_beside_adapters(settings, but=("rank", *FIELDS))
    if settings.moments == "8bit":
        codebook(signed=True)


def check_weights(model: nn.Module, method: str, settings: OwLoreSettings) -> None:
    """Checks that a method can train the weights as they are stored; warns about zeros that training fills.

    Raises:
        ValueError: the weights are quantized or packed, and the method has no adapters; matrices share a weight, and
            it has: adapters of one matrix, merged, would change the others; or the model changes its weights by itself.
    """
    adapters = METHODS[method].adapters
    if getattr(model, "is_quantized", False) and not adapters:
        beside = ", ".join(name for name, known in METHODS.items() if known.adapters)
        raise ValueError(f"method: expected one with adapters ({beside}) for quantized or packed weights, got {method}")
    stack = find_decoder_layers(model)
    if adapters:
        check_separate(choose_modules(stack, settings).stack)
    check_unwritten(stack.model)
    pruned = pruned_matrices(stack)
    if pruned:
        logger.warning(
            "%d matrices have zeros, which this training fills; hf-cod heal and hf-cod prune --recover-steps keep them",
            len(pruned),
        )


METHODS: dict[str, Method] = {
    name: Method(setup, LEARNING_RATES[name], name in DRAW_BY_SCORES, adapters)
    for name, setup, adapters in (
        ("owlore", _owlore, False),
        ("lisa", _lisa, False),
        ("galore", _galore, False),
        ("owlore-peft", _owlore_peft, True),
        ("lora", _lora, True),
        ("full", _full, False),
    )
}


def adapter_notes(method: str, stack: DecoderLayers, settings: OwLoreSettings) -> list[str]:
    """Sentences for a report on the matrices with and without adapters; none for methods without adapters.

    Args:
        method: a name of `METHODS`.
        stack: the layers, before or after the training.
        settings: `include` and `exclude`.
    """
    if not METHODS[method].adapters:
        return []
    return adapter_targets(choose_modules(stack, settings).stack, lora=method == "lora").notes()


def make_optimizer(trained: nn.Module, how: Any, lr: float) -> torch.optim.Optimizer:
    """The optimizer that Trainer would create from the result of a `Setup`, without weight decay."""
    if how is None:
        parameters = [p for p in trained.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    factory, arguments = how
    return factory()(trained, **arguments)


def set_up(
    method: str,
    model: nn.Module,
    scores: LayerScores | None,
    settings: OwLoreSettings,
    lr: float,
    lora_rank: int,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model to train and its optimizer, for a loop without Trainer."""
    trained, how = METHODS[method].setup(model, scores, settings, lr, lora_rank)
    return trained, make_optimizer(trained, how, lr)
