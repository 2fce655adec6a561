"""Saving of a model whose weights stay in files: the same files as of `save_pretrained`, with one tensor in memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_cod.io.files import write_text
from hf_cod.io.offloaded import OffloadedWeights, offloaded_weights, view_of
from hf_cod.io.tensors import save_tensors

# Of transformers, in which models are saved without another size.
SHARD_SIZE = "50GB"


def save_offloaded(model: Any, directory: Path) -> None:
    """Writes the files that `save_pretrained` of the model would write, one tensor at a time.

    Args:
        model: a model with `offloaded_weights`.
        directory: of the checkpoint.
    """
    own, metadata = _state(model)
    names_of = {id(tensor): name for name, tensor in own.items()}
    # transformers sorts tensors, and may give them other names in files; those that it converts cannot stay in files.
    tensors = revert_weight_conversion(model, dict(own))
    read = _reader(model, {name: names_of[id(tensor)] for name, tensor in tensors.items()}, own)
    _save_config(model, directory)
    shards = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
    )
    for file, names in shards.filename_to_tensors.items():
        save_tensors(directory / file, {name: tensors[name] for name in names}, metadata, read=read)
    if shards.is_sharded:
        told = {"total_parameters": sum(tensor.numel() for tensor in tensors.values()), **shards.metadata}
        index = {"metadata": told, "weight_map": shards.tensor_to_filename}
        write_text(directory / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _state(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the checkpoint, those in files on the meta device, each of tied weights once; and the metadata."""
    quantizer = getattr(model, "hf_quantizer", None)
    tensors, metadata = (model.state_dict(), {}) if quantizer is None else quantizer.get_state_dict_and_metadata(model)
    weights = offloaded_weights(model)
    assert isinstance(weights, OffloadedWeights)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    again = [n for n, one in tied.items() if {n, one} <= tensors.keys() and weights.place(n) == weights.place(one)]
    ignored = {*again, *(getattr(model, "_keys_to_ignore_on_save", None) or ())}
    return {n: tensor for n, tensor in tensors.items() if n not in ignored}, {**metadata, "format": "pt"}


def _save_config(model: Any, directory: Path) -> None:
    """Writes everything but the weights: a quantizer would add them."""
    quantizer, model.hf_quantizer = getattr(model, "hf_quantizer", None), None
    try:
        with warnings.catch_warnings():  # that shards must fit in memory; none is written here
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(directory, state_dict={})
    finally:
        if quantizer is None:
            del model.hf_quantizer
        else:
            model.hf_quantizer = quantizer


def _reader(model: Any, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """Reads a tensor by its name in files; `names` has that in the model."""

    def read(name: str) -> Tensor:
        tensor = tensors[names[name]]
        if not tensor.is_meta:
            return tensor
        owner, _, key = names[name].rpartition(".")
        view = view_of(model.get_submodule(owner))
        assert view is not None
        found: Tensor = view[key]
        return found

    return read
