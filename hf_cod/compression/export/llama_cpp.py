"""Types of tensors and an importance matrix for llama-quantize, which makes such a GGUF from one in 16 bits."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from hf_cod.compression.export.plan import ExportPlan, Size
from hf_cod.compression.export.request import Request, Written
from hf_cod.io.display import named
from hf_cod.io.files import write_text
from hf_cod.layers.gguf_names import gguf_names
from hf_cod.layers.stack import DecoderLayers

TYPES, IMATRIX = "tensor-types.txt", "imatrix.gguf"
# Type -> (weights in a block, bytes of a block). llama.cpp: ggml-common.h.
BLOCKS = {
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "iq4_nl": (32, 18),
    "q5_0": (32, 22),
    "q8_0": (32, 34),
}
# Width -> types, the first of which has a block that divides the rows. K-types have blocks of 256 weights, which rows
# of many small models are no multiple of; of 32 weights there is no type of less than 4.5 bits, and none of 6.
LADDER = {
    2: ("q2_k", "iq4_nl"),
    3: ("q3_k", "iq4_nl"),
    4: ("q4_k", "iq4_nl"),
    5: ("q5_k", "q5_0"),
    6: ("q6_k", "q8_0"),
    8: ("q8_0",),
}
WIDTHS = tuple(LADDER)
# Of the embedding and the head, and the base type of the command line.
OTHERS, BASE = "q8_0", "Q8_0"
_BITS = 32  # of a norm or a bias, which llama.cpp stores in float32
_HALF = 16  # of a matrix whose rows no block divides


def type_of(size: Size, width: int) -> str:
    """The type of a matrix (out, in) with this width."""
    return next(kind for kind in LADDER[width] if size[1] % BLOCKS[kind][0] == 0)


def stored(size: Size, width: int, group: int | None, scale_bits: int) -> int:
    """The number of bits of a matrix in a GGUF."""
    block, size_of_block = BLOCKS[type_of(size, width)]
    return size[0] * size[1] // block * size_of_block * 8


def reason(size: Size, group: int | None) -> str | None:
    """Why a matrix cannot be quantized; None if it can."""
    return f"its rows of {size[1]} are no multiple of 32" if size[1] % 32 else None


def write(request: Request) -> Written:
    """Writes the types and, with statistics, an importance matrix.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: GGUF has no architecture for the model, or no names for any of its matrices.
    """
    names = gguf_names(request.stack)
    widths, sizes = request.plan.widths, request.plan.sizes
    unknown = [name for name in widths if not names[name]]
    kinds = {t: type_of(sizes[name], width) for name, width in widths.items() for t, _ in names[name]}
    if not kinds:
        raise ValueError(f"model: expected matrices with names in GGUF, got none: {named(unknown)}")
    write_text(request.output / TYPES, "".join(f"{line}\n" for line in lines(kinds)))
    options = [f"--tensor-type-file {TYPES}", f"--token-embedding-type {OTHERS}", f"--output-tensor-type {OTHERS}"]
    notes = [f"{len(unknown)} matrices have no name in GGUF and get {BASE}: {named(unknown)}"] if unknown else []
    if request.statistics is None:
        notes.append("no calibration dataset: no importance matrix, without which few bits cost much quality")
    else:
        request.statistics.save(request.output / IMATRIX, model=request.stack.model)
        options.insert(0, f"--imatrix {IMATRIX}")
    planned = planned_bytes(request.stack, request.plan)
    return Written(
        [
            "With a GGUF of the model in 16 bits (convert_hf_to_gguf.py MODEL --outtype bf16 --outfile "
            "model-bf16.gguf), in this directory: "
            f"llama-quantize {' '.join(options)} model-bf16.gguf model.gguf {BASE}",
            f"The tensors of the GGUF will have {planned:,} bytes; its metadata and the tokenizer come on top.",
        ],
        notes,
    )


def lines(kinds: dict[str, str]) -> list[str]:
    """Lines "expression=type": one for all layers in which a tensor has the same type."""
    places: dict[tuple[str, str], list[int]] = {}
    for tensor, kind in kinds.items():
        _, index, rest = tensor.split(".", 2)
        places.setdefault((rest, kind), []).append(int(index))
    return [
        rf"^blk\.({'|'.join(map(str, layers))})\.{re.escape(rest)}\.weight$={kind}"
        for (rest, kind), layers in places.items()
    ]


def planned_bytes(stack: DecoderLayers, plan: ExportPlan) -> int:
    """Bytes of all tensors of the GGUF."""
    model: Any = stack.model
    bits = sum(stored(plan.sizes[name], width, None, 0) for name, width in plan.widths.items())
    matrices = {id(model.get_submodule(name).weight) for name in plan.widths}
    for parameter in model.parameters():
        if id(parameter) not in matrices:
            bits += parameter.numel() * _BITS if parameter.dim() < 2 else _of_other(parameter)
    return bits // 8


def _of_other(parameter: nn.Parameter) -> int:
    block, size = BLOCKS[OTHERS]
    if parameter.shape[-1] % block:
        return parameter.numel() * _HALF
    return parameter.numel() // block * size * 8
