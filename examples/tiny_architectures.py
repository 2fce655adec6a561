"""Tiny random models of the architectures of transformers, for `architectures.py`.

A *kind* is a model type with the group that it belongs to, such as "llama" (a causal model), "encoder/bert" or
"vision-language/llava". Its config is made from the defaults of its type: each field of `SIZES` that it knows takes the
tiny value, in configs inside it as well. `CHANGES` holds what a kind requires beside that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
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
    **_each("entity_vocab_size pronunciation_vocab_size shape_vocab_size", WORDS),
    **_each("hidden_size n_embd d_model dim attention_hidden_size embedding_size embedding_dim lru_width emb_dim", 32),
    **_each("input_embedding_size output_embedding_size word_embed_proj_dim projection_dim", 32),
    **_each("embed_dim out_hidden_size text_hidden_size d_latents", 32),
    **_each("intermediate_size ffn_hidden_size d_ff dff dim_ff ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner", 96),
    **_each("feed_forward_size dense_intermediate_size intermediate_size_mlp", 96),
    **_each("num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads", 4),
    **_each("attention_heads swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads", 4),
    **_each("num_key_value_heads num_kv_heads swa_num_key_value_heads", 2),
    **_each("head_dim dim_head kv_channels attention_head_dim swa_head_dim attention_head_size d_head d_kv", 8),
    **_each("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks", LAYERS),
    **_each("num_encoder_layers num_decoder_layers depth", LAYERS),
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
    **_each("num_frames tubelet_size", 2),
    **_each("latent_query_num num_patches num_latents num_query_tokens mm_tokens_per_image", 4),
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
    **_each("fullatt_block_indexes global_attn_indexes residual_block_indices deepstack_visual_indexes", [1, 3]),
    **_each("window_block_indices intermediate_layers_indices", [0, 2]),
    "insert_layer_id": 1,
    "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]],
    "boa_token_id": 95,
    **_each("eoa_token_id eoa_token_index", 96),
}
# Fields that are set even where a config's default is None.
ALWAYS = ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "image_token_index")

_HALVES = ["linear_attention", "full_attention"] * 2
_HEADS = {"head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_SECTIONS = {"text_config": {"rope_parameters": _ROPE}}
_WINDOWS = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 2, "image_size": 32, "patch_size": 4}
_GEMMA4_VISION = {
    **{
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "position_embedding_size": 64,
    },
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "patch_size": 8, "pooling_kernel_size": 2},
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
# Type, or group and type -> config values beside `SIZES`. Only what makes a type small, and valid, stands here.
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"], _LATENT),
    **dict.fromkeys(["glm_moe_dsa", "longcat_flash", "minicpm3", "sarvam_mla", "youtu", "dots3_note_text"], _LATENT),
    "aria": {"projector_patch_to_query_dict": {4: 4}},
    "bailing_hybrid": {**_LATENT, "layer_types": _HALVES, "mlp_layer_types": ["dense", "sparse"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "dory": {"sliding_window": 16, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2},
    "encoder/reformer": {"is_decoder": False},
    "esm": {"vocab_size": WORDS, "mask_token_id": 98, "pad_token_id": 0},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2, "intermediate_size": [96] * 4},
    "gemma4": {"vision_config": _GEMMA4_VISION},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    **dict.fromkeys(["hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"], _HEADS),
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**_LATENT, "layer_types": _HALVES, "mlp_layer_types": ["dense", "sparse"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4": {
        "vision_config": {
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        }
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm46v", "glm4v", "glm_ocr", "glmga"], _SECTIONS),
    "kimi_k25": {"text_config": _LATENT, "projection_hidden_size": 32},
    "mistral4": _LATENT,
    "mllama": {"vision_config": {"vision_output_dim": 96}},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,  # else training requires one length
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2,
    },
    **dict.fromkeys(["donut-swin", "swin", "swinv2"], _WINDOWS),
    "qwen2_5_omni_thinker": {**_SECTIONS, "vision_start_token_id": 93},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 93},
    "switch_transformers": {"router_jitter_noise": 0.0},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xmod": {"default_language": "en_XX"},
    "yolos": {"image_size": [16, 16]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}


SEQ2SEQ, ENCODER, VISION, LANGUAGE = "seq2seq/", "encoder/", "vision/", "vision-language/"
# End of a kind whose batches have images beside the text; `architecture_images.py` has the forms of images.
WITH_IMAGES = "+images"
# Field that lists a value for each stage of a hierarchical model -> its tiny values.
STAGES: dict[str, Any] = {
    "depths": lambda value: min(value, 2),
    **_each("hidden_sizes embed_dims embed_dim", lambda value: value // 4),
}


@dataclass(frozen=True)
class Case:
    """A model to check.

    Attributes:
        kind: see above; "+images" at its end: batches with images; "@vision": the stack of that name.
    """

    kind: str

    @property
    def group(self) -> str:
        """What its type is listed under: "" for causal models."""
        return self.kind[: self.kind.index("/") + 1] if "/" in self.kind else ""

    @property
    def type(self) -> str:
        """The model type."""
        return self.kind.partition("@")[0].removesuffix(WITH_IMAGES).removeprefix(self.group)

    @property
    def stack(self) -> str | None:
        """The stack of layers that is checked; None: the model's default."""
        return self.kind.partition("@")[2] or None

    @property
    def images(self) -> bool:
        """Whether batches of text have images as well."""
        return self.kind.partition("@")[0].endswith(WITH_IMAGES)

    @property
    def without_images(self) -> Case:
        """The same with batches of text alone."""
        return Case(self.kind.replace(WITH_IMAGES, ""))

    @property
    def auto_class(self) -> Any:
        """The class of transformers that builds and loads the model."""
        return getattr(transformers, auto_classes(self.group)[self.type])

    def build(self, seed: int = 0) -> PreTrainedModel:
        """A random model in float32 and eval mode; always the same one.

        Raises:
            Exception: whatever transformers raises where a config of these sizes is none, or a package is missing.
            ValueError: the model would be large.
        """
        with torch.device("meta"):
            size = sum(p.numel() for p in self.auto_class.from_config(self.config()).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{self.kind}: expected a tiny model, got {size / 1e6:.0f} million parameters")
        torch.manual_seed(seed)
        model = self.auto_class.from_config(self.config()).float().eval()
        for weight in model.parameters():
            # Behind the projector of Gemma 3 and the gates of Mllama, images would be zeros.
            if (weight.dim() > 1 or weight.numel() == 1) and not weight.any():
                torch.nn.init.normal_(weight, std=SIZES["initializer_range"])
        return model

    def config(self) -> Any:
        """A config whose model has four layers and a width of 32."""
        made = CONFIG_MAPPING[self.type]
        start = {"decoder_start_token_id": SIZES["decoder_start_token_id"]} if made().is_encoder_decoder else {}
        values = _merged({**_values(made), **start}, CHANGES.get(self.type, {}))
        config = made(**_merged(values, CHANGES.get(self.group + self.type, {}) if self.group else {}))
        named = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(self.type)
        if self.group == VISION and isinstance(named, tuple):  # one type, several classes
            config.architectures = [named[0]]
        return config


def build(kind: str) -> PreTrainedModel:
    """A tiny random model of a kind; see `Case.build`."""
    return Case(kind).build()


def tiny_config(kind: str) -> Any:
    """A config of a kind whose model has four layers and a width of 32."""
    return Case(kind).config()


def auto_classes(group: str) -> dict[str, str]:
    """Type -> name of the auto class, of a group."""
    if group == "":
        return dict.fromkeys(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM")
    if group == SEQ2SEQ:
        speech = dict.fromkeys(auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, "AutoModelForSpeechSeq2Seq")
        return speech | dict.fromkeys(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "AutoModelForSeq2SeqLM")
    if group == ENCODER:
        writers = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES  # encoder-decoders that also fill in masks
        masked = (kind for kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES if kind not in writers)
        return dict.fromkeys(masked, "AutoModelForMaskedLM")
    if group == VISION:
        classifiers, readers = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, auto_classes(LANGUAGE)
        headless = (kind for kind in auto.MODEL_FOR_IMAGE_MAPPING_NAMES if kind not in readers)
        return dict.fromkeys(headless, "AutoModel") | dict.fromkeys(classifiers, "AutoModelForImageClassification")
    towers = dict.fromkeys(auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES, "AutoModel")
    return towers | dict.fromkeys(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "AutoModelForImageTextToText")


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    inner = {k: _merged(values[k], v) if isinstance(values.get(k), dict) else v for k, v in changes.items()}
    return {**values, **inner}


def _values(made: type[PreTrainedConfig]) -> dict[str, Any]:
    default = made()
    known = default.to_dict()
    values = {name: SIZES[name] for name in _sized(known)}
    values |= {name: [*map(STAGES[name], known[name])] for name in STAGES if isinstance(known.get(name), (list, tuple))}
    for name, inner in vars(default).items():
        if isinstance(inner, PreTrainedConfig) and not name.startswith("_"):
            values[name] = {**_values(type(inner)), "model_type": inner.model_type}
    return values


def _sized(known: dict[str, Any]) -> Iterable[str]:
    """The fields of a config that take a tiny value: those that hold a number, or numbers of layers, and the special
    tokens.
    """
    for name in SIZES.keys() & known.keys():
        kinds = (list, tuple) if isinstance(SIZES[name], list) else (int, float)
        if name in ALWAYS or isinstance(known[name], kinds):
            yield name
