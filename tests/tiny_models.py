"""Tiny random models of the families that users have: for shapes and equality, never for claims."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    PreTrainedModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from examples.tiny_architectures import tiny_config

_COMMON = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_GQA = {**_COMMON, "num_key_value_heads": 2, "max_position_embeddings": 64}
_BERT = {**_COMMON, "max_position_embeddings": 64}
_VIT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}

# Family -> (model type, config values). Special tokens stay inside the tiny vocabulary.
CAUSAL = {
    "llama": ("llama", _GQA),
    "llama_tied": ("llama", {**_GQA, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**_GQA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": ("qwen3", {**_GQA, "head_dim": 8}),
    "mistral": ("mistral", {**_GQA, "sliding_window": 4}),
    "olmo": ("olmo", _GQA),
    "olmo2": ("olmo2", _GQA),
    "gemma3": ("gemma3_text", {**_GQA, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2}),
    "gpt2": ("gpt2", {"vocab_size": 99, "n_embd": 32, "n_head": 4, "n_positions": 64}),
    "opt": ("opt", {**_BERT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mixtral": ("mixtral", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_GQA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [1],
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_COMMON,
            "max_position_embeddings": 64,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {**_GQA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
}
OTHERS = {
    "bert": (AutoModelForMaskedLM, "bert", _BERT),
    "mpnet": (AutoModelForMaskedLM, "mpnet", _BERT),
    "bert_headless": (AutoModel, "bert", _BERT),
    "vit": (AutoModelForImageClassification, "vit", {**_VIT, "num_labels": 3}),
    "dinov2": (AutoModel, "dinov2", _VIT),
}
FAMILIES = [*CAUSAL, *OTHERS]
# Of these, one of each build, the tests run by default; of the others with  pytest -m families.
DEFAULT_FAMILIES = ["llama", "gpt2", "qwen2_moe", "bert", "vit"]
MIXTURES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"]
# Types of mixtures, each with code of its own for the experts or the router.
MIXTURE_TYPES = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v3", "olmoe", "gpt_oss", "granitemoe", "glm4_moe"),
    *("llama4_text", "dbrx", "jetmoe"),
]
PLAIN = [family for family in FAMILIES if family not in MIXTURES]


def build(family: str, layers: int = 4, dtype: torch.dtype = torch.float32, **changes):
    """A model with weights large enough that layers differ clearly."""
    auto, kind, values = (AutoModelForCausalLM, *CAUSAL[family]) if family in CAUSAL else OTHERS[family]
    values = {**values, "num_hidden_layers": layers, "initializer_range": 0.2, **changes}
    if kind in ("gpt2", "opt") or family in CAUSAL:
        values = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **values}
    torch.manual_seed(0)
    return auto.from_config(CONFIG_MAPPING[kind](**values)).to(dtype).eval()


def build_mixture(kind: str, **sizes: Any) -> PreTrainedModel:
    """A random mixture of experts of four layers in eval mode; most have four experts, two for each token.

    Args:
        kind: one of `MIXTURE_TYPES`.
        **sizes: config values that differ from those of `examples/tiny_architectures.py`.
    """
    if kind == "dbrx":  # whose configs inside have no field for what their model reads
        parts = {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "initializer_range": 0.2}
        experts = {"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, **sizes}
        shape = {"vocab_size": 99, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64}
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = CONFIG_MAPPING["dbrx"](**shape, **parts, **rope, **tokens, ffn_config=experts)
    else:
        config = CONFIG_MAPPING[kind](**{**tiny_config(kind).to_dict(), **sizes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def batch_for(model, padding: str | None = None) -> dict[str, torch.Tensor]:
    """Three samples of nine tokens (or three images); padded on one side, a different length each."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 99, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 4)):
        if padding == "right":
            mask[row, length:] = 0
        elif padding == "left":
            mask[row, : 9 - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def two_batches(model, padding=None):
    """Of different sizes, the first one maybe padded."""
    return [batch_for(model, padding), {name: tensor[:2] for name, tensor in batch_for(model).items()}]


def double(batches):
    """The same in float64."""
    return [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]


@torch.no_grad()
def outputs(model, batch=None):
    """The first of what the model returns, in eval mode."""
    return model.eval()(**(batch or batch_for(model))).to_tuple()[0]


def unmapped_outputs(model, batch=None):
    """Of a copy in memory of torch's own: in that of a mapped file, products round by how its tensors are aligned."""
    return outputs(copy.deepcopy(model), batch)


def build_encoder_decoder(kind: str, **sizes: Any) -> PreTrainedModel:
    """A random encoder-decoder of four layers each, in eval mode.

    Args:
        kind: its type in transformers.
        **sizes: config values that differ from those of `examples/tiny_architectures.py`.
    """
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    config = tiny_config(kind)
    for name, value in sizes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return (AutoModelForSpeechSeq2Seq if kind == "whisper" else AutoModelForSeq2SeqLM).from_config(config).eval()


def seq2seq_batch(model: Any) -> dict[str, Tensor]:
    """Tokens, or sound, for the encoder, and fewer tokens for the decoder."""
    ids = torch.randint(5, 80, (2, 9), generator=torch.Generator().manual_seed(1))
    if model.main_input_name == "input_ids":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :7].flip(1)}
    shape = (2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    return {"input_features": torch.randn(shape, generator=torch.Generator().manual_seed(2)), "decoder_input_ids": ids}


def vit_mae():
    """Three layers, and a decoder of two; the patches that it hides are random, or given by `noise`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    of_decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    images = {"image_size": 16, "patch_size": 4, "decoder_intermediate_size": 24}
    return ViTMAEForPreTraining(ViTMAEConfig(**sizes, **of_decoder, **images)).eval()
