"""Configuration of OLMo with a choice of norm placement."""

from huggingface_hub.dataclasses import strict
from transformers.models.olmo.configuration_olmo import OlmoConfig

from .configuration_cod import NormPlacementConfig


@strict
class CodOlmoConfig(NormPlacementConfig, OlmoConfig):
    """OLMo (the first), with its norms where `norm_placement` puts them. Its norms have no weights."""

    model_type = "cod_olmo"


CodOlmoConfig.register_for_auto_class()
