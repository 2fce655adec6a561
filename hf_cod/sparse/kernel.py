"""The kernel of sparse layers, which is built on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_cod.native_kernel import load_native

_SOURCES = Path(__file__).with_name("csrc")
_WITHOUT = "they are made dense in memory and run as fast as dense ones, no faster"


def load_kernel() -> Any:
    """`torch.ops.hf_cod_sparse` with `product`, `rows` and `instructions`, or None, which is said once and why."""
    return load_native("hf_cod_sparse", _SOURCES, "sparse layers", _WITHOUT)
