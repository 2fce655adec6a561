"""See, cure and use the Curse of Depth: every layer of a deep language model earns its place."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from hf_cod.allocation import LayerAllocation, allocate
from hf_cod.comparison import Comparison, compare
from hf_cod.decoder_layers import DecoderLayers, find_decoder_layers
from hf_cod.depth import DepthPlan, drop_layers, plan_depth
from hf_cod.diagnostics import MeasurementError, diagnose
from hf_cod.evaluation import evaluate_tasks, perplexity
from hf_cod.finetuning import LayerSampler, OwLoreAdamW, OwLoreSettings, lora_ranks, owlore
from hf_cod.fit import FitPlan, apply_steps, plan_fit
from hf_cod.healing import HealSettings, heal
from hf_cod.layer_removal import drop, skip
from hf_cod.low_rank import RankPlan, factorize, plan_ranks
from hf_cod.models import fold_lns, from_authors, llama_preset, register, to_lns
from hf_cod.pruning import prune
from hf_cod.quantization import OwlBnbConfig, quantize
from hf_cod.report import RunReport
from hf_cod.scores import LayerScores, score_layers
from hf_cod.sparse import SparseConfig, SparseLinear, pack_sparse
from hf_cod.statistics import LayerStatistics, collect_statistics
from hf_cod.training import LayerMonitor, TrainingHistory
from hf_cod.width import WidthPlan, narrow

if TYPE_CHECKING:
    from hf_cod.finetuning import OwLoreConfig as OwLoreConfig  # not in __all__: `import *` must not need PEFT
    from hf_cod.training.callback import LayerDiagnosticsCallback

__all__ = [
    "Comparison",
    "DecoderLayers",
    "DepthPlan",
    "FitPlan",
    "HealSettings",
    "LayerAllocation",
    "LayerDiagnosticsCallback",
    "LayerMonitor",
    "LayerSampler",
    "LayerScores",
    "LayerStatistics",
    "MeasurementError",
    "OwLoreAdamW",
    "OwLoreSettings",
    "OwlBnbConfig",
    "RankPlan",
    "RunReport",
    "SparseConfig",
    "SparseLinear",
    "TrainingHistory",
    "WidthPlan",
    "allocate",
    "apply_steps",
    "collect_statistics",
    "compare",
    "diagnose",
    "drop",
    "drop_layers",
    "evaluate_tasks",
    "factorize",
    "find_decoder_layers",
    "fold_lns",
    "from_authors",
    "heal",
    "llama_preset",
    "lora_ranks",
    "narrow",
    "owlore",
    "pack_sparse",
    "perplexity",
    "plan_depth",
    "plan_fit",
    "plan_ranks",
    "prune",
    "quantize",
    "score_layers",
    "skip",
    "to_lns",
]

register()  # AutoConfig and AutoModel know our model types from here on


def __getattr__(name: str) -> Any:
    """What takes longer to import than all of ours (transformers' Trainer, PEFT) is imported when it is asked for."""
    if name == "LayerDiagnosticsCallback":
        from hf_cod.training.callback import LayerDiagnosticsCallback

        return LayerDiagnosticsCallback
    if name == "OwLoreConfig":
        import hf_cod.finetuning

        return hf_cod.finetuning.OwLoreConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
