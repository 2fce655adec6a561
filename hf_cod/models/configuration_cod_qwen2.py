"""Configuration of Qwen2 and Qwen2.5 with a choice of norm placement."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

from .configuration_cod import NormPlacementConfig


@strict
class CodQwen2Config(NormPlacementConfig, Qwen2Config):
    """Qwen2 or Qwen2.5, with its norms where `norm_placement` puts them."""

    model_type = "cod_qwen2"


CodQwen2Config.register_for_auto_class()
