"""Loading without silence: each weight of a checkpoint finds its place, and each place its weight.

transformers initialises what a checkpoint lacks at random and ignores what it has too much, with a warning at most.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

# Names that are told of a kind of wrong keys.
NAMED = 3
POOLER = "pooler"


def load_exactly(model_class: Any, source: Any, **options: Any) -> Any:
    """`from_pretrained`, but a weight that is missing, unexpected or of another shape is an error; see `check_loaded`.

    Raises:
        ValueError: there is one; says how many, and the names of the first.
    """
    model, info = read(model_class, source, **options)
    check_loaded(model, info)
    return model


def read(model_class: Any, source: Any, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """A model, and transformers' lists of what did not find its place.

    Raises:
        ValueError: weights that transformers cannot convert.
    """
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that these are listed, too
    try:
        model, info = model_class.from_pretrained(source, **options, **told)
        return model, info
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "above report" in first:  # which nobody sees
            first = "they do not go together; TRANSFORMERS_VERBOSITY=warning shows which"
        raise ValueError(f"model: expected weights of {model_class.__name__}, got others: {first}") from error


def check_loaded(model: Any, info: Mapping[str, Any]) -> None:
    """Makes sure that nothing of a model is left to chance, and nothing of a checkpoint is lost.

    transformers leaves out of its lists what is tied, computed, or ignored by the model's class. Harmless, too, are
    heads of other tasks that a checkpoint has beside this one's, which a warning names; a pooler that a checkpoint
    without head lacks, which is taken off the model; and a missing bias of a head, which is 0.

    Args:
        model: as it was loaded; an unused pooler is removed.
        info: transformers' loading info.

    Raises:
        ValueError: something else is missing, unexpected or of another shape.
    """
    missing = {key for key in info["missing_keys"] if not _is_zero_bias_of_head(model, key)}
    missing -= _without_pooler(model, missing)
    others = {key for key in info["unexpected_keys"] if _is_of_another_head(model, key)}
    told = [
        _told("missing", sorted(missing)),
        _told("unexpected", sorted(set(info["unexpected_keys"]) - others)),
        _told("of another shape", [_misfit(*entry) for entry in sorted(info["mismatched_keys"])]),
    ]
    if any(told):
        raise ValueError(
            f"model: expected a checkpoint of all weights of {type(model).__name__} and no others, got "
            + "; ".join(filter(None, told))
        )
    if others:
        told_others = _told("tensors", sorted(others))
        logger.warning("%s ignores what the checkpoint has of other heads: %s", type(model).__name__, told_others)


def in_head(model: Any, key: str) -> bool:
    """Whether a name of a weight is that of a head: outside of the base model. A base model has none."""
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and model.base_model is not model and not key.startswith(f"{prefix}.")


def _is_zero_bias_of_head(model: Any, key: str) -> bool:
    if not in_head(model, key) or key.rpartition(".")[2] != "bias":
        return False
    bias = dict(model.named_parameters(remove_duplicate=False)).get(key)
    return bias is not None and not bias.is_meta and not bool(bias.any())


def _without_pooler(model: Any, missing: set[str]) -> set[str]:
    """Names of a base model's whole pooler, once it is off the model; none where a part of it is there."""
    pooler = getattr(model, POOLER, None)
    if model.base_model is not model or not isinstance(pooler, nn.Module):
        return set()
    names = {f"{POOLER}.{name}" for name in pooler.state_dict()}
    if not names or not names <= missing:
        return set()
    model.pooler = None
    return names


def _is_of_another_head(model: Any, key: str) -> bool:
    """Whether a name leads out of the base model to a module that this class lacks, or to a pooler that it lacks."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    headless, inside = model.base_model is model, key.startswith(prefix)
    path = key.removeprefix(prefix).split(".")
    if path[0] == POOLER and (inside or headless):
        return getattr(model.base_model, POOLER, None) is None
    if inside:
        return False
    module: Any = model
    for depth, name in enumerate(path[:-1]):
        module = getattr(module, name, None)
        if not isinstance(module, nn.Module):
            return depth == 0 or not headless
    return False


def _told(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} {what}: {', '.join(names[:NAMED])}{more}"


def _misfit(name: str, found: Any, expected: Any) -> str:
    return f"{name} {tuple(found)} for {tuple(expected)}"
