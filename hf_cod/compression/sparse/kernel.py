"""Loads the compiled kernel of sparse layers."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch

from hf_cod.io.native_kernel import load_native

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).with_name("csrc")
_WITHOUT = "they are made dense in memory and run at the speed of dense layers"


@functools.cache
def load_kernel() -> Any:
    """`torch.ops.hf_cod_sparse` with `product`, `rows` and `instructions`; None, with one warning, if it is missing."""
    kernel = load_native("hf_cod_sparse", _SOURCES, "sparse layers", _WITHOUT)
    if kernel is not None and kernel.instructions(torch.float32) == ["portable"]:
        logger.warning(
            "sparse layers are slow here: this processor has neither AVX-512 nor AVX2, or the compiler is not g++ or "
            "clang. Packed layers take less memory, but several times the time of dense layers (model.dequantize())"
        )
    return kernel
