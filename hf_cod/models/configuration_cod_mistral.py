"""Configuration of Mistral with a choice of norm placement."""

from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers.models.mistral.configuration_mistral import MistralConfig

from .configuration_cod import NormPlacementConfig

if TYPE_CHECKING:
    # transformers copies what relative imports name: with this line a config saved alone brings the model's code.
    from .modeling_cod_mistral import CodMistralModel  # noqa: F401


@strict
class CodMistralConfig(NormPlacementConfig, MistralConfig):
    """Mistral with a choice of `norm_placement`."""

    model_type = "cod_mistral"


CodMistralConfig.register_for_auto_class()
