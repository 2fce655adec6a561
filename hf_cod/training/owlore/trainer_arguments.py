"""`owlore`: OwLoreAdamW in the form in which Trainer and TRL's trainers take an optimizer."""

from __future__ import annotations

import logging
import sys
from dataclasses import fields
from typing import Any, Unpack

from torch import nn

from hf_cod.io.arguments import checked
from hf_cod.io.settings import Default, resolve
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.owlore.optimizer import OwLoreAdamW
from hf_cod.training.owlore.settings import DEFAULT_LR, OwLoreFields, OwLoreSettings, check_hyperparameters

logger = logging.getLogger(__name__)

# Argument of OwLoreAdamW -> the fields of TrainingArguments that mean the same.
TRAINERS = {
    "lr": ("learning_rate",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "weight_decay": ("weight_decay",),
}
DEFAULTS = {"lr": DEFAULT_LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


class OwLoreFactory:
    """Creates an OwLoreAdamW for the model that Trainer trains; see `owlore`."""

    def __call__(self, model: nn.Module, **arguments: Any) -> OwLoreAdamW:
        """Creates the optimizer; called by Trainer."""
        args = _arguments_of_trainer()
        return OwLoreAdamW(model, **(arguments if args is None else _completed(arguments, args)))


@checked
def owlore(
    scores: LayerScores | LayerAllocation | None = None,
    *,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    settings: OwLoreSettings | None = None,
    **given: Unpack[OwLoreFields],
) -> tuple[type, dict[str, Any]]:
    """The argument `optimizer_cls_and_kwargs` of Trainer and TRL's trainers; takes the arguments of `OwLoreAdamW`.

        Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=owlore(scores, n_active=5, lr=1e-3))

    Arguments that are not given here are taken from the trainer's: `lr` from `learning_rate` if that is not the default
    of its class, `betas` from `adam_beta1` and `adam_beta2`, `eps` from `adam_epsilon`, and `weight_decay`. If both set
    a value, the one given here is used, and a log line says so.

    Args:
        scores: see `OwLoreAdamW`.
        lr: learning rate; default: the trainer's, or 3e-4.
        betas: Adam's; default: the trainer's.
        eps: Adam's; default: the trainer's.
        weight_decay: decoupled; default: the trainer's.
        settings: `OwLoreSettings`, instead of single fields.
        **given: fields of `OwLoreSettings` by name: n_active, interval, rank, ...

    Raises:
        ValueError: an unknown name, or a value that `OwLoreAdamW` refuses for any model.
    """
    how = resolve(owlore, OwLoreSettings, settings, given)
    common = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    common = {name: value for name, value in common.items() if value is not None}
    numbers: dict[str, Any] = {**DEFAULTS, **common}
    check_hyperparameters(**numbers)
    lowered = isinstance(how.n_active, Default)  # by `fitted`, which knows the model
    if scores is not None and how.n_active > len(scores.values) and not lowered:
        layers = len(scores.values)
        raise ValueError(f"n_active: expected between 1 and the {layers} layers of the scores, got {how.n_active}")
    return OwLoreFactory, {"scores": scores, "settings": how, **common}


def _arguments_of_trainer() -> Any:
    """The arguments of the Trainer that is making its optimizer; None outside of one.

    Trainer hands a factory the model alone, so that they are found where it calls from.
    """
    module = sys.modules.get("transformers.trainer")
    frame = sys._getframe(1)
    while module is not None and frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, module.Trainer):
            return owner.args
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _completed(arguments: dict[str, Any], args: Any) -> dict[str, Any]:
    """With the trainer's values for what was not given; says which are used where both sides have one."""
    defaults = {f.name: f.default for f in fields(args)}
    found: dict[str, Any] = {}
    for name, theirs in TRAINERS.items():
        values = [float(getattr(args, one)) for one in theirs]
        set_there = values != [defaults.get(one) for one in theirs]
        value: Any = values[0] if len(values) == 1 else tuple(values)
        title = f"{' and '.join(theirs)} of {type(args).__name__}"
        if name in arguments:
            if set_there and _plain(arguments[name]) != value:
                logger.warning(f"{name}: owlore's {arguments[name]} is used, not {value}, the {title}")
        elif set_there or name != "lr":
            found[name] = value
        else:  # a default of theirs is for AdamW of all weights
            logger.warning(f"{name}: OwLore's default {DEFAULT_LR} is used; {value} is only the default {title}")
    return {**arguments, **found}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
