"""Configuration of Qwen3 with a choice of norm placement."""

from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from .configuration_cod import NormPlacementConfig

if TYPE_CHECKING:
    # transformers copies what relative imports name: with this line a config saved alone brings the model's code.
    from .modeling_cod_qwen3 import CodQwen3Model  # noqa: F401


@strict
class CodQwen3Config(NormPlacementConfig, Qwen3Config):
    """Qwen3 with a choice of `norm_placement`.

    The norms on queries and keys do not change. They cancel the factor of LayerNorm Scaling on queries and keys, so it
    affects only the values and the MLP."""

    model_type = "cod_qwen3"


CodQwen3Config.register_for_auto_class()
