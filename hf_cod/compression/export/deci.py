"""A GGUF of architecture `deci`: narrowed models of Llama's kind, in which each layer has its own heads and channels.

The tensors have the dtype of the model, vectors float32. Whether a model computes what `deci` does is measured: logits
of the stored tensors, computed by `deci`'s formulas, are compared with those of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_cod.functional.deci import deci_logits
from hf_cod.io.gguf_file import require_gguf
from hf_cod.io.inputs import check_file
from hf_cod.layers.devices import execution_device
from hf_cod.layers.gguf_names import architecture_of
from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import DecoderLayers

ARCHITECTURE = "deci"
FIELD = "gguf"
# Channels of zeros in the place of an MLP that adds nothing: without an MLP, llama.cpp passes over the attention, too.
STAND_IN = 32
# Tokens on which logits are compared, and the largest difference as a share of their norm: rounding of the dtype, with
# a margin for its growth over layers. Another formula differs by more.
TOKENS, MARGIN, LEAST = 24, 8, 1e-3


@dataclass(frozen=True)
class Deci:
    """The content of a file.

    Attributes:
        tensors: name in GGUF -> tensor.
        heads: number of query heads of each layer, 0 without attention.
        kv_heads: number of key and value heads of each layer.
        channels: of the MLP of each layer.
        head_size: numbers of a head.
        base: of the rotary frequencies.
        epsilon: of the norms.
        context: number of positions.
    """

    tensors: dict[str, Tensor]
    heads: list[int]
    kv_heads: list[int]
    channels: list[int]
    head_size: int
    base: float
    epsilon: float
    context: int


def deci_of(stack: DecoderLayers) -> Deci:
    """The tensors and sizes of a model, of which sublayers that add nothing (their last matrix is zero) are left out.

    Llama.cpp reads sizes off layer 0, whose attention therefore always stays.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: a parameter that `deci` has no place for, or logits that differ.
    """
    model: Any = stack.model
    tensors = _named(stack)
    rotary = next((m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)), None)
    if rotary is None:
        raise _unlike(model, "no rotary positions")
    size, base = 2 * len(rotary.inv_freq), _base(stack.config)
    default = base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    factors = default / rotary.inv_freq.float().cpu()
    if not torch.allclose(factors, torch.ones_like(factors), rtol=1e-4):
        tensors["rope_freqs.weight"] = factors
    counts = [_without_idle(tensors, f"blk.{index}.", index, size) for index in range(len(stack))]
    heads, kv_heads, channels = ([*numbers] for numbers in zip(*counts, strict=True))
    window = [getattr(stack.config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    made = Deci(tensors, heads, kv_heads, channels, size, base, _epsilon(stack), min(n for n in window if n))
    _check_logits(stack, made)
    return made


def write_deci(made: Deci, output: Path, base: str, stack: DecoderLayers) -> None:
    """Writes the file, with the tokenizer of `base`, a GGUF of the model before it was narrowed.

    Raises:
        ValueError: not a GGUF, one of another architecture, or one with another number of tokens.
    """
    gguf = require_gguf("a GGUF of a narrowed model")
    fields = _fields(gguf, base, stack, len(made.tensors["token_embd.weight"]))

    writer = gguf.GGUFWriter(output, ARCHITECTURE)
    writer.add_name(stack.name or "model")
    writer.add_block_count(len(made.heads))
    writer.add_context_length(made.context)
    writer.add_embedding_length(made.tensors["token_embd.weight"].shape[1])
    writer.add_feed_forward_length(made.channels)
    writer.add_head_count(made.heads)
    writer.add_head_count_kv(made.kv_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(made.head_size)
    writer.add_rope_freq_base(made.base)
    writer.add_layer_norm_rms_eps(made.epsilon)
    for name, field in fields.items():
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for name, tensor in made.tensors.items():
        writer.add_tensor(name, *_stored(gguf, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _fields(gguf: Any, base: str, stack: DecoderLayers, tokens: int) -> dict[str, Any]:
    """The fields of the tokenizer."""
    check_file(base, FIELD, "a GGUF file")
    try:
        found = gguf.GGUFReader(base).fields
        architecture = found["general.architecture"].contents()
        own = {name: field for name, field in found.items() if name.startswith("tokenizer.")}
        count = len(own["tokenizer.ggml.tokens"].data)
    except Exception as error:  # the package trusts what a file says of itself
        raise ValueError(f"{FIELD}: expected a GGUF file with a tokenizer, got {base!r}, which has none") from error
    expected = architecture_of(stack)
    if architecture not in (expected, ARCHITECTURE):
        raise ValueError(f"{FIELD}: expected one of architecture {expected}, as the model, got {architecture}: {base}")
    if count != tokens:
        raise ValueError(f"{FIELD}: expected {tokens} tokens, as the model has, got {count}: {base}")
    return own


def _named(stack: DecoderLayers) -> dict[str, Tensor]:
    gguf = require_gguf("a GGUF of a narrowed model")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(stack))
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.DECI]}
    found: dict[str, Tensor] = {}
    for name, parameter in stack.model.named_parameters():
        tensor = table.get_name(name, try_suffixes=(".weight", ".bias"))
        generic = None if tensor is None else _generic(tensor)
        if tensor is None or generic not in known or tensor in found:
            raise _unlike(stack.model, f"the parameter {name}")
        found[tensor] = parameter.detach()
    return found


def _generic(tensor: str) -> str:
    """ "blk.3.attn_q.weight" -> "blk.{bid}.attn_q", as in the table of the gguf package."""
    parts = tensor.rpartition(".")[0].split(".")
    return ".".join("{bid}" if part.isdecimal() else part for part in parts)


def _without_idle(tensors: dict[str, Tensor], block: str, index: int, size: int) -> tuple[int, int, int]:
    """Removes sublayers that add nothing, and turns rows of queries and keys to adjacent pairs.

    Returns:
        The numbers of heads, of key and value heads, and of channels of the layer.
    """
    q, k, down = (tensors.get(f"{block}{name}.weight") for name in ("attn_q", "attn_k", "ffn_down"))
    if q is None or k is None or down is None:
        raise ValueError(f"model: expected attention and an MLP in each layer, got a layer {index} without")
    if index and _adds_nothing(tensors, f"{block}attn_output"):
        for name in [name for name in tensors if name.startswith(f"{block}attn_")]:
            del tensors[name]
        heads = kv_heads = 0
    else:
        heads, kv_heads = len(q) // size, len(k) // size
        for name, count in (("attn_q", heads), ("attn_k", kv_heads)):
            for kind in ("weight", "bias"):
                if f"{block}{name}.{kind}" in tensors:
                    tensors[f"{block}{name}.{kind}"] = _paired(tensors[f"{block}{name}.{kind}"], count)
    if not _adds_nothing(tensors, f"{block}ffn_down"):
        return heads, kv_heads, down.shape[1]
    for name in ("gate", "up", "down"):
        tensors.pop(f"{block}ffn_{name}.bias", None)
        shape = (len(down), STAND_IN) if name == "down" else (STAND_IN, len(down))
        tensors[f"{block}ffn_{name}.weight"] = down.new_zeros(shape)
    return heads, kv_heads, STAND_IN


def _adds_nothing(tensors: dict[str, Tensor], name: str) -> bool:
    return not any(t.any() for t in (tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) if t is not None)


def _paired(W: Tensor, heads: int) -> Tensor:
    """Rows in the order of adjacent pairs; transformers has the first numbers of all pairs first."""
    return W.view(heads, 2, -1, *W.shape[1:]).transpose(1, 2).reshape(W.shape)


def _base(config: Any) -> float:
    """The base of the rotary frequencies; a scaled one is written as factors."""
    told = getattr(config, "rope_parameters", None) or {}
    return float(told.get("rope_theta", 10_000.0))


def _epsilon(stack: DecoderLayers) -> float:
    norm: Any = stack.final_norm
    found = [value for value in vars(norm or nn.Identity()).values() if isinstance(value, float)]
    if len(found) != 1:
        raise _unlike(stack.model, "no RMS norm with an epsilon before the head")
    return float(found[0])


@torch.no_grad()
def _check_logits(stack: DecoderLayers, made: Deci) -> None:
    model: Any = stack.model
    device = execution_device(model)
    tokens = len(made.tensors["token_embd.weight"])
    count = min(TOKENS, made.context)
    ids = torch.randint(tokens, (count,), generator=torch.Generator().manual_seed(0)).to(device)
    with evaluation_mode(stack):
        expected = model(input_ids=ids[None], use_cache=False).logits[0].float()
    try:
        found = deci_logits(made.tensors, made.heads, made.kv_heads, made.base, made.epsilon, ids)
    except (KeyError, RuntimeError) as error:
        raise _unlike(model, "matrices of other sizes") from error
    share = float((found.to(expected) - expected).norm() / expected.norm())
    limit = max(LEAST, MARGIN * torch.finfo(next(model.parameters()).dtype).eps)
    if not share <= limit:
        raise _unlike(model, f"logits that differ by {share:.2g} of their norm")


def _unlike(model: nn.Module, got: str) -> ValueError:
    return ValueError(
        f"model: expected one that computes as Llama, for llama.cpp's architecture {ARCHITECTURE}, got {got} in "
        f"{type(model).__name__}"
    )


def _stored(gguf: Any, tensor: Tensor) -> tuple[Any, ...]:
    """An array and its type if numpy has none such; vectors in float32, as llama.cpp requires."""
    tensor = (tensor.float() if tensor.dim() < 2 else tensor).cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy(), None, gguf.GGMLQuantizationType.BF16
    return (np.ascontiguousarray(tensor.numpy()),)
