"""When transformers learns of our models and formats: as soon as it has what they are registered with, and not before.

So `import hf_cod` waits neither for torch nor for transformers, whichever is imported first.
"""

import sys
from collections.abc import Callable
from types import ModuleType

from wrapt import register_post_import_hook

_registering = False


def _models(_: ModuleType) -> None:
    """AutoConfig and AutoModel learn our model types."""
    global _registering
    auto = sys.modules.get("transformers.models.auto.modeling_auto")
    half_imported = auto is not None and not hasattr(auto, "AutoModelForCausalLM")
    if _registering or half_imported:  # configurations import it themselves; its own hook comes when it is whole
        return
    _registering = True
    try:
        from hf_cod.models.families import register

        register()
    finally:
        _registering = False


def _formats(_: ModuleType) -> None:
    """`from_pretrained` learns to read quantized and packed checkpoints: the classes register themselves."""
    import hf_cod.compression.quantization.quantizer
    import hf_cod.compression.sparse.quantizer  # noqa: F401


# Module of transformers -> what is done once it is imported.
_HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _models,
    "transformers.models.auto.modeling_auto": _models,
    "transformers.modeling_utils": _formats,
}


def register_with_transformers() -> None:
    """Now, or when transformers is imported."""
    for module, hook in _HOOKS.items():
        register_post_import_hook(hook, module)
