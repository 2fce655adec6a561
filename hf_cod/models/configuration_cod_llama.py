"""Configuration of Llama with a choice of norm placement."""

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from .configuration_cod import NormPlacementConfig


@strict
class CodLlamaConfig(NormPlacementConfig, LlamaConfig):
    """Llama, with its norms where `norm_placement` puts them."""

    model_type = "cod_llama"


CodLlamaConfig.register_for_auto_class()
