"""Teaches transformers to load what this room writes: quantized and packed checkpoints."""

from __future__ import annotations

from typing import Any


def register(*_: Any) -> None:
    """Imports what registers itself with transformers' table of quantizers."""
    import hf_cod.compression.quantization.quantizer
    import hf_cod.compression.sparse.quantizer  # noqa: F401
