"""When transformers learns of our models and formats: as soon as it has the tables that they stand in.

So `import hf_cod` waits neither for torch nor for transformers, whichever comes first. Nothing of ours is imported
before it is used: our modules import transformers, which may be in the middle of its own import.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from wrapt import register_post_import_hook

# Model type -> its configuration.
CONFIGS = {
    "cod_llama": ("hf_cod.models.configuration_cod_llama", "CodLlamaConfig"),
    "cod_mistral": ("hf_cod.models.configuration_cod_mistral", "CodMistralConfig"),
    "cod_olmo": ("hf_cod.models.configuration_cod_olmo", "CodOlmoConfig"),
    "cod_olmo2": ("hf_cod.models.configuration_cod_olmo2", "CodOlmo2Config"),
    "cod_qwen2": ("hf_cod.models.configuration_cod_qwen2", "CodQwen2Config"),
    "cod_qwen3": ("hf_cod.models.configuration_cod_qwen3", "CodQwen3Config"),
    "cod_vit": ("hf_cod.models.configuration_cod_vit", "CodViTConfig"),
    "cod_shaped": ("hf_cod.models.configuration_shaped", "ShapedConfig"),
}
# Quantization method, as config.json names it -> its configuration and its quantizer.
FORMATS = {
    "owl_bnb": (
        ("hf_cod.compression.quantization.config", "OwlBnbConfig"),
        ("hf_cod.compression.quantization.quantizer", "OwlBnbQuantizer"),
    ),
    "hf_cod_sparse": (
        ("hf_cod.compression.sparse.config", "SparseConfig"),
        ("hf_cod.compression.sparse.quantizer", "SparseQuantizer"),
    ),
}


class Late:
    """Stands in a table of transformers for a class of ours, which is imported when it is called.

    Args:
        module, name: of the class.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self.__name__ = name  # what transformers' tables of processors go by

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """An instance of the class."""
        return self.load()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.load(), name)

    def load(self) -> Any:
        """The class."""
        return getattr(import_module(self._module), self._name)


def _add_models(auto: ModuleType) -> None:
    for model_type, place in CONFIGS.items():
        auto.CONFIG_MAPPING.register(model_type, Late(*place), exist_ok=True)


def _add_formats(auto: ModuleType) -> None:
    for method, (config, quantizer) in FORMATS.items():
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = Late(*config)
        auto.AUTO_QUANTIZER_MAPPING[method] = Late(*quantizer)


def register_with_transformers() -> None:
    """Now, or when transformers is imported."""
    register_post_import_hook(_add_models, "transformers.models.auto.configuration_auto")
    register_post_import_hook(_add_formats, "transformers.quantizers.auto")
