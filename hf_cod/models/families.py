"""Table of base families: classes of this package and the classes of transformers with the same parameters."""

import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import transformers
from transformers.models.auto.configuration_auto import AutoConfig

from .configuration_cod_llama import CodLlamaConfig
from .configuration_cod_mistral import CodMistralConfig
from .configuration_cod_olmo import CodOlmoConfig
from .configuration_cod_olmo2 import CodOlmo2Config
from .configuration_cod_qwen2 import CodQwen2Config
from .configuration_cod_qwen3 import CodQwen3Config
from .configuration_cod_vit import CodViTConfig
from .configuration_shaped import ShapedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """One base family.

    Args:
        config: The configuration class of this package; its `auto_heads` name the model classes.
        stock_config: The configuration class of transformers.
        absorbers: Modules of a layer whose weights can absorb a factor on the outputs of the norms before the
            sublayers: these norms, or, if they have no weights, the Linears after them.
        foldable: The placements that a stock model of the family can represent.
    """

    config: Any
    stock_config: Any
    absorbers: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    foldable: tuple[str, ...] = ("pre", "scaled_init", "lns", "lns_output")

    @property
    def model_type(self) -> str:
        """The `model_type` of the configuration class of this package."""
        return self.config.model_type

    @property
    def title(self) -> str:
        """The family's name in transformers, such as "Llama"."""
        return self.stock_config.__name__.removesuffix("Config")

    @cached_property
    def models(self) -> dict[Any, "type[PreTrainedModel]"]:
        """Auto class -> model class of this package, from the `auto_map` of a saved model.

        The corresponding class of transformers has the same name without "Cod"; a few do not exist.
        """
        named = {auto: name.split(".") for auto, name in self.config.remote_code_map().items() if auto != "AutoConfig"}
        return {
            getattr(transformers, auto): getattr(importlib.import_module(f".{file}", __package__), name)
            for auto, (file, name) in named.items()
        }

    def stock_class(self, name: str) -> "type[PreTrainedModel] | None":
        """The class of transformers for the class `name` of this package, or None if transformers has none."""
        return getattr(transformers, name.removeprefix("Cod"), None)

    def our_class(self, name: str) -> "type[PreTrainedModel] | None":
        """The class of this package for the class `name` of transformers, or None if this package has none."""
        ours = {model.__name__: model for model in self.models.values()}
        return ours.get(f"Cod{name}")


FAMILIES: tuple[Family, ...] = (
    Family(CodLlamaConfig, transformers.LlamaConfig),
    Family(CodQwen2Config, transformers.Qwen2Config),
    Family(CodQwen3Config, transformers.Qwen3Config),
    Family(CodMistralConfig, transformers.MistralConfig),
    Family(
        CodOlmoConfig,
        transformers.OlmoConfig,
        absorbers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
    ),
    Family(CodOlmo2Config, transformers.Olmo2Config, foldable=("reordered",)),
    Family(CodViTConfig, transformers.ViTConfig, absorbers=("layernorm_before", "layernorm_after")),
)


def register(config: str | None = None) -> None:
    """Register the model types of this package with the Auto classes of transformers; a second call changes nothing.

    Args:
        config: name of a configuration class, to register its models only; None: all of them.
    """
    for family in FAMILIES:
        if config in (None, family.config.__name__):
            AutoConfig.register(family.model_type, family.config, exist_ok=True)
            for auto, model in family.models.items():
                auto.register(family.config, model, exist_ok=True)
    AutoConfig.register(ShapedConfig.model_type, ShapedConfig, exist_ok=True)  # its models register themselves
