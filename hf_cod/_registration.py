"""Registration of our models and formats with transformers and PEFT, by post-import hooks on their registries.

So `import hf_cod` loads neither torch nor transformers, and the order of imports does not matter. Our modules are
imported on first use only: they import transformers, which may be in the middle of its own import.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from wrapt import register_post_import_hook

# Model type and PEFT type in files that require hf_cod. transformers and PEFT quote an unknown type in the first line
# of their error, so users without hf_cod see this text.
REQUIRES = "requires hf_cod: pip install hf_cod, then import hf_cod"
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
    REQUIRES: ("hf_cod.models.stored_config", "StoredConfig"),
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
# PEFT type in adapter_config.json (the first one was written by 0.1) -> its configuration.
ADAPTERS = dict.fromkeys(("OWLORE", REQUIRES), ("hf_cod.training.adapters.config", "OwLoreConfig"))


class Late:
    """Placeholder for one of our classes in a registry of transformers or PEFT; imports the class on first use.

    Args:
        module, name: module and name of the class.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self.__name__ = name  # key in transformers' tables of processors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Creates an instance of the class."""
        return self.load()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # looked up by copy and pickle
            raise AttributeError(name)
        return getattr(self.load(), name)

    def load(self) -> Any:
        """Imports and returns the class."""
        return getattr(import_module(self._module), self._name)


def _add_models(auto: ModuleType) -> None:
    for model_type, place in CONFIGS.items():
        auto.CONFIG_MAPPING.register(model_type, Late(*place), exist_ok=True)


def _add_formats(auto: ModuleType) -> None:
    for method, (config, quantizer) in FORMATS.items():
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = Late(*config)
        auto.AUTO_QUANTIZER_MAPPING[method] = Late(*quantizer)


def _add_adapters(mapping: ModuleType) -> None:
    for peft_type, config in ADAPTERS.items():
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = Late(*config)


def _silence_readers_that_know_us(configuration: ModuleType) -> None:
    """Filters a warning: config classes that read such a file without AutoConfig warn about its model type."""
    configuration.logger.addFilter(lambda record: REQUIRES not in record.getMessage())


def register_with_transformers() -> None:
    """Registers with transformers and PEFT: now if they are imported, otherwise on their import."""
    register_post_import_hook(_silence_readers_that_know_us, "transformers.configuration_utils")
    register_post_import_hook(_add_models, "transformers.models.auto.configuration_auto")
    register_post_import_hook(_add_formats, "transformers.quantizers.auto")
    register_post_import_hook(_add_adapters, "peft.mapping")
