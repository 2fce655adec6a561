"""Configuration of Mistral with a choice of norm placement."""

from huggingface_hub.dataclasses import strict
from transformers.models.mistral.configuration_mistral import MistralConfig

from .configuration_cod import NormPlacementConfig


@strict
class CodMistralConfig(NormPlacementConfig, MistralConfig):
    """Mistral, with its norms where `norm_placement` puts them."""

    model_type = "cod_mistral"


CodMistralConfig.register_for_auto_class()
