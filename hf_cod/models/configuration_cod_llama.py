"""Configuration of Llama with a choice of norm placement."""

from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from .configuration_cod import NormPlacementConfig

if TYPE_CHECKING:
    # transformers copies what relative imports name: with this line a config saved alone brings the model's code.
    from .modeling_cod_llama import CodLlamaModel  # noqa: F401


@strict
class CodLlamaConfig(NormPlacementConfig, LlamaConfig):
    """Llama with a choice of `norm_placement`."""

    model_type = "cod_llama"


CodLlamaConfig.register_for_auto_class()
