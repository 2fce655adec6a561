"""Types of tensors and an importance matrix for llama-quantize, which makes such a GGUF from one in 16 bits."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from hf_cod.compression.export.deci import Deci, deci_of, write_deci
from hf_cod.compression.export.plan import ExportPlan, Size
from hf_cod.compression.export.request import Request, Written
from hf_cod.io.display import named
from hf_cod.io.files import write_text
from hf_cod.io.gguf_file import read_gguf, write_gguf
from hf_cod.layers.gguf_names import gguf_names
from hf_cod.layers.stack import DecoderLayers
from hf_cod.models.shapes import ShapedModel

TYPES, IMATRIX, SOURCE = "tensor-types.txt", "imatrix.gguf", "model.gguf"
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
# The base type of the command line, as that of a tensor and of a file.
BASE_TYPE, BASE = "q8_0", "Q8_0"
_BITS = 32  # of a norm or a bias, which llama.cpp stores in float32
_HALF = 16  # of a matrix whose rows no block divides


def type_of(size: Size, width: int) -> str:
    """The type of a matrix (out, in) with this width."""
    return next(kind for kind in LADDER[width] if size[1] % BLOCKS[kind][0] == 0)


def grid(size: Size, width: int) -> int:
    """The bits of a code of the type of a matrix: "iq4_nl" has four also where it stands for two."""
    return next(int(digit) for digit in type_of(size, width) if digit.isdecimal())


def stored(size: Size, width: int, group: int | None, scale_bits: int) -> int:
    """The number of bits of a matrix in a GGUF."""
    block, size_of_block = BLOCKS[type_of(size, width)]
    return size[0] * size[1] // block * size_of_block * 8


def reason(size: Size, group: int | None) -> str | None:
    """Why a matrix cannot be quantized; None if it can."""
    return f"its rows of {size[1]} are no multiple of 32" if size[1] % 32 else None


def write(request: Request) -> Written:
    """Writes the types and, with statistics, an importance matrix; with `request.gguf` also a GGUF of `deci`.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: GGUF has no architecture for the model, or no names for any of its matrices; a narrowed model
            without `request.gguf`, or what `deci_of` and `write_deci` raise.
    """
    stack = request.stack
    names = gguf_names(stack)
    if request.gguf is None and isinstance(stack.model, ShapedModel):
        raise ValueError(
            "gguf: expected a GGUF of the model before its layers got sizes of their own, whose tokenizer is copied; "
            "convert_hf_to_gguf.py of llama.cpp does not read such a model; got none"
        )
    unknown = [name for name in request.plan.widths if not names[name]]
    sizes = {tensor: request.plan.sizes[name] for name in request.plan.widths for tensor, _ in names[name]}
    deci = None
    if request.gguf is not None:
        deci = deci_of(stack)
        write_deci(deci, request.output / SOURCE, request.gguf, stack)
        own = {name.removesuffix(".weight"): tensor.shape for name, tensor in deci.tensors.items()}
        sizes = {tensor: (own[tensor][0], own[tensor][1]) for tensor in sizes if tensor in own}
    widths = {tensor: width for name, width in request.plan.widths.items() for tensor, _ in names[name]}
    kinds = {tensor: type_of(size, widths[tensor]) for tensor, size in sizes.items()}
    if not kinds:
        raise ValueError(f"model: expected matrices with names in GGUF, got none: {named(unknown)}")
    write_text(request.output / TYPES, "".join(f"{line}\n" for line in lines(kinds)))
    others = other_type(stack, request.embedding_bits)
    options = [f"--tensor-type-file {TYPES}", f"--token-embedding-type {others}", f"--output-tensor-type {others}"]
    notes = [f"{len(unknown)} matrices have no name in GGUF and get {BASE}: {named(unknown)}"] if unknown else []
    if request.statistics is None:
        notes.append("no calibration dataset: no importance matrix, without which few bits cost much quality")
    else:
        _save_imatrix(request, deci)
        options.insert(0, f"--imatrix {IMATRIX}")
    planned = planned_bytes(stack, request.plan, others) if deci is None else deci_bytes(deci, kinds, others)
    summary = [_command(options, deci is not None)]
    summary.append(f"The tensors of the GGUF will have {planned:,} bytes; its metadata and the tokenizer come on top.")
    return Written(summary, notes if deci is None else [*notes, *_idle(deci)])


def _command(options: list[str], written: bool) -> str:
    made = f"llama-quantize {' '.join(options)}"
    if written:
        return f"{SOURCE} has the architecture deci. In this directory: {made} {SOURCE} quantized.gguf {BASE}"
    return (
        "With a GGUF of the model in 16 bits (convert_hf_to_gguf.py MODEL --outtype bf16 --outfile model-bf16.gguf), "
        f"in this directory: {made} model-bf16.gguf model.gguf {BASE}"
    )


def _save_imatrix(request: Request, deci: Deci | None) -> None:
    assert request.statistics is not None
    file = request.statistics.save(request.output / IMATRIX, model=request.stack.model)
    if deci is not None:
        # llama-quantize refuses sums of another size, such as those of an MLP that is left out.
        found = read_gguf(file, "imatrix")
        write_gguf(file, found.keys, {n: t for n, t in found.tensors.items() if _keeps(deci, n.rpartition(".")[0])})


def _keeps(deci: Deci, name: str) -> bool:
    return name in deci.tensors and not ("ffn_down" in name and not deci.tensors[name].any())


def _idle(deci: Deci) -> list[str]:
    """Notes on sublayers that are left out."""
    attention = [index for index, count in enumerate(deci.heads) if count == 0]
    mlp = [i for i in range(len(deci.heads)) if not deci.tensors[f"blk.{i}.ffn_down.weight"].any()]
    parts = (("attention", attention), ("the MLP", mlp))
    return [f"left out, as it adds nothing: {part} of layers {', '.join(map(str, of))}" for part, of in parts if of]


def other_type(stack: DecoderLayers, width: int) -> str:
    """The type of the embedding and the head."""
    weight: Any = getattr(stack.embeddings or stack.head, "weight", None)
    return BASE_TYPE if weight is None else type_of((weight.shape[0], weight.shape[-1]), width)


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


def planned_bytes(stack: DecoderLayers, plan: ExportPlan, others: str = BASE_TYPE) -> int:
    """Bytes of all tensors of the GGUF."""
    model: Any = stack.model
    bits = sum(stored(plan.sizes[name], width, None, 0) for name, width in plan.widths.items())
    matrices = {id(model.get_submodule(name).weight) for name in plan.widths}
    outside = {id(getattr(module, "weight", None)) for module in (stack.embeddings, stack.head)}
    for parameter in model.parameters():
        if parameter.dim() < 2:
            bits += parameter.numel() * _BITS
        elif id(parameter) not in matrices:
            bits += _of_other(parameter, others if id(parameter) in outside else BASE_TYPE)
    return bits // 8


def deci_bytes(deci: Deci, kinds: dict[str, str], others: str) -> int:
    """Bytes of all tensors of a quantized GGUF of `deci`."""
    bits = 0
    for name, tensor in deci.tensors.items():
        kind = kinds.get(name.removesuffix(".weight"))
        if tensor.dim() < 2:
            bits += tensor.numel() * _BITS
        elif kind is None:
            bits += _of_other(tensor, BASE_TYPE if name.startswith("blk.") else others)
        else:
            block, size = BLOCKS[kind]
            bits += tensor.numel() // block * size * 8
    return bits // 8


def _of_other(parameter: Tensor, kind: str) -> int:
    block, size = BLOCKS[kind]
    if parameter.shape[-1] % block:
        return parameter.numel() * _HALF
    return parameter.numel() // block * size * 8
