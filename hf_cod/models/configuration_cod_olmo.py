"""Configuration of OLMo with a choice of norm placement."""

from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers.models.olmo.configuration_olmo import OlmoConfig

from .configuration_cod import NormPlacementConfig

if TYPE_CHECKING:
    # transformers copies what relative imports name: with this line a config saved alone brings the model's code.
    from .modeling_cod_olmo import CodOlmoModel  # noqa: F401


@strict
class CodOlmoConfig(NormPlacementConfig, OlmoConfig):
    """OLMo (version 1) with a choice of `norm_placement`. Its norms have no weights."""

    model_type = "cod_olmo"


CodOlmoConfig.register_for_auto_class()
