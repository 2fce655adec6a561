"""Weights of a checkpoint that transformers does not load into the model, such as layers for multi-token prediction.

Multi-token prediction (MTP) drafts tokens for speculative decoding; vLLM, SGLang and `generate(use_mtp=True)` read its
weights from the checkpoint. `save_pretrained` writes what is in the model, so these weights would be lost, while the
config still promises them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_cod.io.files import write_text
from hf_cod.io.reading import open_tensors, read_json

# A config field that counts layers for multi-token prediction: num_nextn_predict_layers, mtp_num_hidden_layers, ...
_PROMISE = re.compile(r"(?=.*num)(?=.*(mtp|nextn))")
_NUMBERED = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def promises(config: Any) -> dict[str, int]:
    """Fields of a model's text config that count layers for multi-token prediction, and their values above 0."""
    entries = vars(config.get_text_config())
    return {name: value for name, value in entries.items() if _PROMISE.match(name) and type(value) is int and value > 0}


def withdraw(config: Any) -> list[str]:
    """Sets the fields of `promises` to 0; returns their names, without those that the config class refuses to set."""
    text, done = config.get_text_config(), []
    for name in promises(config):
        before = getattr(text, name)
        try:
            setattr(text, name, 0)
            type(config).from_dict(config.to_dict())
            done.append(name)
        except Exception:  # whatever a config class raises
            setattr(text, name, before)
    return done


def is_promised(config: Any, key: str) -> bool:
    """Whether a weight belongs to a layer for multi-token prediction that is numbered after the model's own layers."""
    count = max(promises(config).values(), default=0)
    match = _NUMBERED.search(key)
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    return bool(count and match and depth) and depth <= int(match[1]) < depth + count  # type: ignore[index,operator]


def unread_weights(model: Any, files: Iterable[str]) -> dict[str, str]:
    """Name -> file of the weights that transformers ignores when it loads this model, outside of the model's layers.

    What it ignores inside of a layer are obsolete buffers, such as causal masks.

    Args:
        model: the loaded model.
        files: the safetensors files of its checkpoint.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {name for name, _ in model.named_modules()}
    loaded = model.state_dict().keys()
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    ignored = re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None
    found = {}
    for path in files:
        with open_tensors(path, "model", "a whole safetensors file") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                names = (key, key.removeprefix(prefix), prefix + key)
                if any(name in loaded for name in names):
                    continue
                unread = is_promised(model.config, key) or (ignored is not None and ignored.search(key))
                if unread and not any(_in_layer(name, modules) for name in names) and 0 not in _shape(file, key):
                    found[key] = path
    return found


def _shape(file: Any, key: str) -> list[int]:
    """The shape of a tensor in a file; those that are empty are messages of this package (`replacement_modules.py`)."""
    shape: list[int] = file.get_slice(key).get_shape()
    return shape


def _in_layer(key: str, modules: set[str]) -> bool:
    """Whether a weight lies inside of a numbered module that the model has."""
    parts = key.split(".")
    return any(part.isdigit() and ".".join(parts[: end + 1]) in modules for end, part in enumerate(parts))


def append_weights(directory: Path, weights: Mapping[str, str]) -> None:
    """Adds weights of other files to the safetensors checkpoint in a directory, as its last shard.

    Args:
        directory: the checkpoint.
        weights: name -> file that holds the weight; weights that the checkpoint has are skipped.
    """
    index = _index(directory)
    new = {key: path for key, path in weights.items() if key not in index["weight_map"]}
    if not new:
        return
    count = len(set(index["weight_map"].values())) + 1
    renamed = {}
    for number, name in enumerate(sorted(set(index["weight_map"].values())), 1):
        renamed[name] = f"model-{number:05}-of-{count:05}.safetensors"
        (directory / name).rename(directory / renamed[name])
    last = f"model-{count:05}-of-{count:05}.safetensors"
    tensors = dict(_read(new))
    save_file(tensors, directory / last, metadata={"format": "pt"})
    index["weight_map"] = {key: renamed[name] for key, name in index["weight_map"].items()} | dict.fromkeys(new, last)
    metadata = index.setdefault("metadata", {})
    metadata["total_size"] = metadata.get("total_size", 0) + sum(tensor.nbytes for tensor in tensors.values())
    write_text(directory / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _index(directory: Path) -> dict[str, Any]:
    """The index of a checkpoint; made for one of a single file."""
    if (directory / SAFE_WEIGHTS_INDEX_NAME).is_file():
        index: dict[str, Any] = read_json(directory / SAFE_WEIGHTS_INDEX_NAME, "model")
        return index
    with open_tensors(directory / SAFE_WEIGHTS_NAME, "model", "a whole safetensors file") as file:
        keys = list(file.keys())
    size = (directory / SAFE_WEIGHTS_NAME).stat().st_size
    return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(keys, SAFE_WEIGHTS_NAME)}


def _read(weights: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for path in sorted(set(weights.values())):
        with open_tensors(path, "model", "a whole safetensors file") as file:
            for key in (name for name, its in weights.items() if its == path):
                yield key, file.get_tensor(key)
