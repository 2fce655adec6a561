"""Tiny random models of the architectures of transformers, for `architectures.py`.

A config is made from the defaults of its type: each field of `SIZES` that it knows takes the tiny value, in configs
inside it as well. `CHANGES` holds what a type requires beside that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

LAYERS = 4
WORDS = 99
# Larger models are not built: their type has a size that `SIZES` does not know.
MOST_PARAMETERS = 3e7


def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Config field -> tiny value. Widths are multiples of the 16 channels that matrices in three bits require.
SIZES: dict[str, Any] = {
    **_each("vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input", WORDS),
    **_each("hidden_size n_embd d_model dim attention_hidden_size embedding_size embedding_dim lru_width emb_dim", 32),
    **_each("input_embedding_size output_embedding_size word_embed_proj_dim projection_dim", 32),
    **_each("intermediate_size ffn_hidden_size d_ff dff dim_ff ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner", 96),
    **_each("feed_forward_size dense_intermediate_size intermediate_size_mlp", 96),
    **_each("num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads", 4),
    **_each("attention_heads swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads", 4),
    **_each("num_key_value_heads num_kv_heads swa_num_key_value_heads", 2),
    **_each("head_dim dim_head kv_channels attention_head_dim swa_head_dim attention_head_size d_head d_kv", 8),
    **_each("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks", LAYERS),
    **_each("num_encoder_layers num_decoder_layers", LAYERS),
    **_each("max_position_embeddings n_positions n_ctx model_max_length max_seq_len context_length", 64),
    **_each("max_source_positions max_target_positions original_max_position_embeddings", 64),
    **_each("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size", 16),
    **_each("moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size", 16),
    **_each("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    **_each("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k num_selected_experts", 2),
    **_each("n_group num_expert_group n_groups o_groups num_codebooks index_n_heads", 2),
    **_each("topk_group n_shared_experts num_shared_experts moe_num_shared_experts mamba_n_groups", 1),
    **_each("first_k_dense_replace bos_token_id decoder_start_token_id", 1),
    **_each("kv_lora_rank q_lora_rank qk_nope_head_dim v_head_dim index_head_dim o_lora_rank", 8),
    **_each("qk_rope_head_dim index_topk rotary_dim sliding_window mamba_dt_rank time_step_rank", 4),
    **_each("mamba_d_state mamba_chunk_size chunk_size state_size ssm_state_size block_size", 8),
    **_each("mamba_n_heads n_mamba_heads linear_num_value_heads linear_num_heads mamba_num_heads", 4),
    **_each("mamba_d_head mamba_head_dim mamba_headdim image_size", 16),
    **_each("linear_key_head_dim linear_value_head_dim linear_head_dim patch_size num_mel_bins", 8),
    **_each("hidden_size_per_layer_input query_pre_attn_scalar", 8),
    **_each("initializer_range initializer_factor init_std", 0.2),
    "qk_head_dim": 12,
    "linear_num_key_heads": 2,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sep_token_id": 3,
    "cls_token_id": 4,
    **_each("image_token_id image_token_index", 90),
    "video_token_id": 91,
    "audio_token_id": 92,
    **_each("vision_start_token_id boi_token_id boi_token_index", 93),
    **_each("vision_end_token_id eoi_token_id eoi_token_index", 94),
    "boa_token_id": 95,
    **_each("eoa_token_id eoa_token_index", 96),
}
# Fields that are set even where a config's default is None.
ALWAYS = ("bos_token_id", "eos_token_id", "pad_token_id")

_HALVES = ["linear_attention", "full_attention"] * 2
_HEADS = {"head_dim": 8}
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
# Type -> config values beside `SIZES`. Only what makes a type small, and valid, stands here.
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"], _LATENT),
    **dict.fromkeys(["glm_moe_dsa", "longcat_flash", "minicpm3", "sarvam_mla", "youtu", "dots3_note_text"], _LATENT),
    "bailing_hybrid": {**_LATENT, "layer_types": _HALVES, "mlp_layer_types": ["dense", "sparse"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "dory": {"sliding_window": 16},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    **dict.fromkeys(["hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"], _HEADS),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**_LATENT, "layer_types": _HALVES, "mlp_layer_types": ["dense", "sparse"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}


# Begins the names of encoder-decoders; some of their types are also those of causal models.
SEQ2SEQ = "seq2seq/"


def types() -> list[str]:
    """All types of transformers' causal models, in alphabetical order, then those of its encoder-decoders."""
    both = {*auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES}
    return sorted(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) + [SEQ2SEQ + kind for kind in sorted(both)]


def tiny_config(kind: str) -> Any:
    """A config of the type `kind` whose model has four layers and a width of 32."""
    kind = kind.removeprefix(SEQ2SEQ)
    made = CONFIG_MAPPING[kind]
    start = {"decoder_start_token_id": SIZES["decoder_start_token_id"]} if made().is_encoder_decoder else {}
    return made(**{**_values(made), **start, **CHANGES.get(kind, {})})


def build(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the type `kind`, in float32 and eval mode; always the same one.

    Args:
        kind: the type of a causal model, or `SEQ2SEQ` and that of an encoder-decoder.
        seed: seed of the weights.

    Raises:
        Exception: whatever transformers raises where a config of these sizes is none, or a package is missing.
        ValueError: the model would be large.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    made: Any = AutoModelForCausalLM
    if kind.startswith(SEQ2SEQ):
        writes = kind.removeprefix(SEQ2SEQ) in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        made = AutoModelForSeq2SeqLM if writes else AutoModelForSpeechSeq2Seq
    with torch.device("meta"):
        size = sum(p.numel() for p in made.from_config(tiny_config(kind)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{kind}: expected a tiny model, got {size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    return made.from_config(tiny_config(kind)).float().eval()


def _values(made: type[PreTrainedConfig]) -> dict[str, Any]:
    default = made()
    known = default.to_dict()
    values = {name: SIZES[name] for name in _sized(known)}
    for name, inner in vars(default).items():
        if isinstance(inner, PreTrainedConfig) and not name.startswith("_"):
            values[name] = {**_values(type(inner)), "model_type": inner.model_type}
    return values


def _sized(known: dict[str, Any]) -> Iterable[str]:
    """The fields of a config that take a tiny value: those that hold a number, and the special tokens."""
    return (n for n in SIZES if n in known and (n in ALWAYS or isinstance(known[n], (int, float))))
