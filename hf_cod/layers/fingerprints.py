"""Fingerprints that identify earlier results of the same model, batches and settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.io.files import fingerprint
from hf_cod.io.journal import Journal
from hf_cod.io.offloaded import stored_parameters
from hf_cod.io.text import Batch
from hf_cod.layers.stack import unwrap
from hf_cod.layers.stock_four_bit import unpacked

# Enough entries of each weight to notice any training step; reading all of a 7B model would take longer than measuring.
WEIGHT_SAMPLE = 16
# Attributes of PEFT's layers that say which adapters are active.
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters")


class Journals:
    """The journals of a run's measures, all in one file. Each measure resumes if its own settings are the same.

    Args:
        output: the run's directory, or None to keep everything in memory.
        model: the measured model.
        batches: the batches that it is measured on.
    """

    def __init__(self, output: str | Path | None, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.path = None if output is None else Path(output) / "journal.jsonl"
        self.inputs = ""
        if output is not None:
            with unpacked(model):
                self.inputs = fingerprint(_digest_model(unwrap(model)), digest_batches(batches))

    def of(self, measure: str, *settings: Any) -> Journal:
        """The journal of one measure with these settings."""
        return Journal(self.path, fingerprint(self.inputs, measure, settings))


def _digest_model(model: nn.Module) -> str:
    """A hash of config, adapters and a few entries of each weight, buffers that hold weights included.

    Of weights that accelerate offloads in its own way only names are included: do not reuse a directory for two such
    models of one config.
    """
    config: Any = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    rows: list[Any] = [described, getattr(config, "_attn_implementation", None)]
    for name, module in model.named_modules():
        rows += [[name, key, str(getattr(module, key))] for key in ADAPTER_STATE if hasattr(module, key)]
    rows += [[name, str(p.dtype), _sample(p)] for name, p in stored_parameters(model)]
    rows += [[name, str(b.dtype), _sample(b)] for name, b in _saved_buffers(model)]
    return fingerprint(rows)


def _sample(weight: Tensor) -> list[float]:
    if weight.device.type == "meta" or not weight.numel():
        return []
    flat = weight.flatten()
    found: list[float] = flat[:: max(1, len(flat) // WEIGHT_SAMPLE)].double().cpu().tolist()
    return found


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to a checkpoint, such as the values of packed matrices; others follow from the config."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def digest_batches(batches: Sequence[Batch]) -> str:
    """A hash of the tensors of the batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
