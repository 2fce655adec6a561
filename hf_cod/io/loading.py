"""Strict loading of checkpoints: missing, unexpected and mismatched weights are errors.

transformers initialises missing weights at random and ignores unexpected ones, with a warning at most.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.io.display import first_line
from hf_cod.io.model_config import building
from hf_cod.io.reading import open_tensors
from hf_cod.io.unread_weights import is_promised

logger = logging.getLogger(__name__)

# Number of names that an error lists for each kind of wrong key.
NAMED = 3
POOLER = "pooler"
# quant_method of the checkpoints whose files have the dtypes of the model.
OWN_QUANTIZATIONS = ("owl_bnb", "hf_cod_sparse")


def load_exactly(model_class: Any, source: Any, **options: Any) -> Any:
    """As `from_pretrained`, but missing, unexpected and mismatched weights are errors; see `check_loaded`.

    Raises:
        ValueError: such weights exist; states their number and the first names.
    """
    model, info = read(model_class, source, **options)
    check_loaded(model, info)
    return model


def read(model_class: Any, source: Any, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """A model, and the loading info of transformers (missing, unexpected and mismatched keys).

    Raises:
        ValueError: a config or weights from which transformers cannot build the model.
    """
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that mismatched keys are listed, too
    try:
        wanted = f"a config and weights that {model_class.__name__} can be built from"
        with building(wanted, source), advice_silenced():  # of bitsandbytes, for a model that it quantized
            model, info = model_class.from_pretrained(source, **options, **told)
        _check_kinds(model, source, options)
        return model, info
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = first_line(error)
        if "above report" in first:  # which is not shown at the default verbosity
            first = "they cannot be converted; TRANSFORMERS_VERBOSITY=warning lists them"
        raise ValueError(f"model: expected weights of {model_class.__name__}, got others: {first}") from error


def _check_kinds(model: Any, source: Any, options: Mapping[str, Any]) -> None:
    """Checks that weights are floating-point numbers in the files where they are in the model, else not.

    transformers converts them without a word: 0.3 that somebody stored as a whole number is then 0. Weights that
    another package has quantized are not compared, since their files differ from the model.

    Raises:
        ValueError: a tensor of the other kind; names it.
    """
    if _quantization_of(model) not in (None, *OWN_QUANTIZATIONS):
        return
    expected = {key: tensor.is_floating_point() for key, tensor in model.state_dict().items()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for path in weight_files(source, options):
        with open_tensors(path, "model", "a whole safetensors file") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                floating = expected.get(key, expected.get(key.removeprefix(prefix), expected.get(prefix + key)))
                stored = file.get_slice(key).get_dtype()
                if floating is not None and floating != stored.startswith(("F", "BF")):
                    wanted = "floating-point numbers" if floating else "whole numbers"
                    raise ValueError(f"model: expected {wanted} as {key}, got {stored} in {str(source)!r}")


def _quantization_of(model: Any) -> str | None:
    """The quant_method of a model's config; None without quantization."""
    config = getattr(model.config, "quantization_config", None)
    return config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)


def weight_files(source: Any, options: Mapping[str, Any], local: bool = True) -> list[str]:
    """The safetensors files of a checkpoint; none for other formats.

    Args:
        source: the directory or Hub id.
        options: what it is loaded with; `revision` and `gguf_file` are used.
        local: whether it was loaded before, so that nothing is downloaded.
    """
    if "gguf_file" in options:
        return []
    place: dict[str, Any] = {"revision": options.get("revision"), "local_files_only": local}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    whole = cached_file(source, SAFE_WEIGHTS_NAME, **place, **quiet)
    if whole is not None:
        return [whole]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **place, **quiet)
    return [] if index is None else get_checkpoint_shard_files(source, index, **place)[0]


def check_loaded(model: Any, info: Mapping[str, Any]) -> None:
    """Checks that each weight of the model was loaded, and each weight of the checkpoint was used.

    The lists of transformers do not contain weights that are tied, computed, or ignored by the model's class. Three
    more cases are allowed: heads of other tasks in the checkpoint (a warning names them); a missing pooler of a
    model without head (it is removed from the model); and a missing bias of a head (it is 0). Layers for multi-token
    prediction, which transformers loads in no model, are not counted, whether or not its list names them.

    Args:
        model: the loaded model; an unused pooler is removed.
        info: the loading info of transformers.

    Raises:
        ValueError: any other weight is missing, unexpected or of another shape.
    """
    missing = {key for key in info["missing_keys"] if not _is_zero_bias_of_head(model, key)}
    missing -= _without_pooler(model, missing)
    unexpected = {key for key in info["unexpected_keys"] if not is_promised(model.config, key)}
    others = {key for key in unexpected if _is_of_another_head(model, key)}
    told = [
        _told("missing", sorted(missing)),
        _told("unexpected", sorted(unexpected - others)),
        _told("of another shape", [_misfit(*entry) for entry in sorted(info["mismatched_keys"])]),
    ]
    if any(told):
        raise ValueError(
            f"model: expected a checkpoint of all weights of {type(model).__name__} and no others, got "
            + "; ".join(filter(None, told))
        )
    if others:
        told_others = _told("tensors", sorted(others))
        logger.warning("%s ignores weights of other heads in the checkpoint: %s", type(model).__name__, told_others)


def in_head(model: Any, key: str) -> bool:
    """Whether a weight belongs to a head, that is, lies outside of the base model. A base model has no head."""
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and model.base_model is not model and not key.startswith(f"{prefix}.")


def _is_zero_bias_of_head(model: Any, key: str) -> bool:
    if not in_head(model, key) or key.rpartition(".")[2] != "bias":
        return False
    bias = dict(model.named_parameters(remove_duplicate=False)).get(key)
    return bias is not None and not bias.is_meta and not bool(bias.any())


def _without_pooler(model: Any, missing: set[str]) -> set[str]:
    """Removes the pooler of a base model if all its weights are missing; returns their names, else an empty set."""
    pooler = getattr(model, POOLER, None)
    if model.base_model is not model or not isinstance(pooler, nn.Module):
        return set()
    names = {f"{POOLER}.{name}" for name in pooler.state_dict()}
    if not names or not names <= missing:
        return set()
    model.pooler = None
    return names


def _is_of_another_head(model: Any, key: str) -> bool:
    """Whether a weight belongs to a head or a pooler that this model class does not have."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    headless, inside = model.base_model is model, key.startswith(prefix)
    path = key.removeprefix(prefix).split(".")
    if path[0] == POOLER and (inside or headless):
        return getattr(model.base_model, POOLER, None) is None
    own = inside or (not headless and isinstance(getattr(model.base_model, path[0], None), nn.Module))
    if own:  # a tied model may be saved without its head, and so without the prefix
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
