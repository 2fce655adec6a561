"""Fine-tuning a few sampled layers at a time, their gradients in low rank: OwLore, LISA and GaLore."""

from typing import TYPE_CHECKING, Any

from hf_cod.finetuning.lora_ranks import lora_ranks
from hf_cod.finetuning.owlore import OwLoreAdamW, OwLoreFactory, owlore
from hf_cod.finetuning.sampling import LayerSampler
from hf_cod.finetuning.settings import OwLoreSettings

if TYPE_CHECKING:
    from hf_cod.finetuning.adapters import OwLoreConfig as OwLoreConfig

# Without OwLoreConfig: `import *` must not need PEFT.
__all__ = ["LayerSampler", "OwLoreAdamW", "OwLoreFactory", "OwLoreSettings", "lora_ranks", "owlore"]


def __getattr__(name: str) -> Any:
    """OwLoreConfig is imported when it is asked for: it needs PEFT, and makes PEFT know the method."""
    if name == "OwLoreConfig":
        try:
            from hf_cod.finetuning.adapters import OwLoreConfig
        except ImportError as error:
            raise ImportError(f"OwLoreConfig needs peft 0.21 or later: pip install -U peft ({error})") from error
        return OwLoreConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
