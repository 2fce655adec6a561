"""The names of a model's matrices in GGUF, the format of llama.cpp, by the table of the gguf package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hf_cod.io.gguf_file import require_gguf
from hf_cod.layers.stack import DecoderLayers

# Model type of transformers -> architecture of GGUF, where they differ by more than separators and suffixes.
ARCHITECTURES = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "ernie4_5_moe": "ernie4_5-moe",
    "glm": "chatglm",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "ministral": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "umt5": "t5",
}
# Fused matrix in a module's name -> its parts, which GGUF stores as matrices of their own, or not.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}
# Matrices of one layer in GGUF that have the same input.
SAME_INPUT = (
    ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    ("ffn_gate", "ffn_up"),
    ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
)
# The index of an expert in the name of a module; in GGUF one tensor holds all experts.
_EXPERT = re.compile(r"(?<=\.experts)\.(\d+)(?=\.)")
# How the layers are called in the table of the gguf package, beside the model's own name for them.
_PREFIXES = ("model.layers", "transformer.h", "model.decoder.layers", "layers")


def gguf_names(stack: DecoderLayers) -> dict[str, list[tuple[str, int | None]]]:
    """Name of each matrix of the layers -> its tensors in GGUF, as (name without ".weight", expert or None).

    It is one tensor for most matrices, several for a fused matrix that GGUF splits, and none if GGUF has no name for
    it. The expert is the index within the tensor, for experts that are modules of their own.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: GGUF has no architecture for the model.
    """
    table = _table(stack)
    found: dict[str, list[tuple[str, int | None]]] = {}
    for index in range(len(stack)):
        for name in stack.input_shapes(index):
            rest = name.removeprefix(f"{stack.layers_path}.{index}.")
            number = _EXPERT.search(rest)
            expert = None if number is None else int(number[1])
            merged = _EXPERT.sub("", rest)
            known: dict[str, None] = {}
            for prefix in (stack.layers_path, *_PREFIXES):
                for part in _parts(merged):
                    tensor = table.get_name(f"{prefix}.{index}.{part}")
                    if tensor is not None:
                        known[tensor] = None
            found[name] = [(tensor, expert) for tensor in known]
    return found


def with_same_input(tensor: str) -> Iterator[str]:
    """The tensor, then others of its layer that have the same input: "blk.0.attn_q" -> "blk.0.attn_k", ..."""
    block, _, kind = tensor.rpartition(".")
    yield tensor
    for group in SAME_INPUT:
        if kind in group:
            yield from (f"{block}.{other}" for other in group if other != kind)


def architecture_of(stack: DecoderLayers) -> str:
    """The name of the model's architecture in GGUF; of a narrowed or factorized model, that of its family.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: GGUF has no architecture for the model.
    """
    gguf = require_gguf("the name of a matrix in GGUF")
    config: Any = stack.config or stack.model.config
    model_type = str(getattr(config, "base_model_type", None) or getattr(config, "model_type", ""))
    wanted = _bare(ARCHITECTURES.get(model_type, model_type))
    found = next((name for name in gguf.MODEL_ARCH_NAMES.values() if _bare(name) == wanted), None)
    if found is None:
        raise ValueError(f"model: expected an architecture that GGUF has names for, got {model_type or 'none'}")
    return str(found)


def _table(stack: DecoderLayers) -> Any:
    name = architecture_of(stack)
    gguf = require_gguf("the name of a matrix in GGUF")
    architecture = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    return gguf.get_tensor_name_map(architecture, len(stack))


def _bare(name: str) -> str:
    return re.sub(r"[-_.]", "", name.removesuffix("_text"))


def _parts(name: str) -> Iterator[str]:
    """The name, and those of its parts if it is a fused matrix."""
    yield name
    for fused, parts in FUSED.items():
        if name.endswith(fused):
            yield from (name.removesuffix(fused) + part for part in parts)
