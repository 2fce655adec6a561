"""Layer-wise diagnosis, compression and training of transformers models, based on the Curse of Depth."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_cod._registration import register_with_transformers
from hf_cod._version import __version__ as __version__

if TYPE_CHECKING:
    from hf_cod.analysis.diagnostics.diagnosis import MeasurementError as MeasurementError
    from hf_cod.analysis.diagnostics.diagnosis import diagnose as diagnose
    from hf_cod.analysis.diagnostics.generation_drop import GenerationDrop as GenerationDrop
    from hf_cod.analysis.diagnostics.generation_drop import measure_generation_drop as measure_generation_drop
    from hf_cod.analysis.diagnostics.layer_swap import measure_swap as measure_swap
    from hf_cod.analysis.diagnostics.settings import DiagnoseSettings as DiagnoseSettings
    from hf_cod.analysis.evaluation.choice import perplexity as perplexity
    from hf_cod.analysis.evaluation.lm_eval_tasks import evaluate_tasks as evaluate_tasks
    from hf_cod.analysis.evaluation.settings import TaskSettings as TaskSettings
    from hf_cod.analysis.generation.settings import GenerationSettings as GenerationSettings
    from hf_cod.analysis.generation.task import GenerationTask as GenerationTask
    from hf_cod.analysis.monitoring.callback import LayerDiagnosticsCallback as LayerDiagnosticsCallback
    from hf_cod.analysis.monitoring.history import TrainingHistory as TrainingHistory
    from hf_cod.analysis.monitoring.monitor import LayerMonitor as LayerMonitor
    from hf_cod.analysis.monitoring.settings import MonitorSettings as MonitorSettings
    from hf_cod.analysis.statistics.layer_statistics import LayerStatistics as LayerStatistics
    from hf_cod.analysis.statistics.layer_statistics import collect_statistics as collect_statistics
    from hf_cod.compression.depth.criteria import plan_depth as plan_depth
    from hf_cod.compression.depth.depth_plan import DepthPlan as DepthPlan
    from hf_cod.compression.depth.dropper import drop_layers as drop_layers
    from hf_cod.compression.depth.repeat_plan import RepeatPlan as RepeatPlan
    from hf_cod.compression.depth.repeat_search import plan_repeat as plan_repeat
    from hf_cod.compression.depth.repeater import repeat_layers as repeat_layers
    from hf_cod.compression.depth.settings import DepthSettings as DepthSettings
    from hf_cod.compression.depth.settings import DropLayersSettings as DropLayersSettings
    from hf_cod.compression.depth.settings import RepeatSettings as RepeatSettings
    from hf_cod.compression.experts.dropper import drop_experts as drop_experts
    from hf_cod.compression.experts.expert_plan import ExpertPlan as ExpertPlan
    from hf_cod.compression.experts.planning import plan_experts as plan_experts
    from hf_cod.compression.experts.settings import DropExpertsSettings as DropExpertsSettings
    from hf_cod.compression.experts.settings import PlanExpertsSettings as PlanExpertsSettings
    from hf_cod.compression.export.exporter import export as export
    from hf_cod.compression.export.settings import ExportSettings as ExportSettings
    from hf_cod.compression.fit.fit_plan import FitPlan as FitPlan
    from hf_cod.compression.fit.knobs import Applying as Applying
    from hf_cod.compression.fit.planning import plan_fit as plan_fit
    from hf_cod.compression.fit.settings import FitSettings as FitSettings
    from hf_cod.compression.fit.trials import apply_steps as apply_steps
    from hf_cod.compression.low_rank.factorizer import factorize as factorize
    from hf_cod.compression.low_rank.rank_plan import RankPlan as RankPlan
    from hf_cod.compression.low_rank.settings import FactorizeSettings as FactorizeSettings
    from hf_cod.compression.low_rank.settings import RankSettings as RankSettings
    from hf_cod.compression.low_rank.spectra import plan_ranks as plan_ranks
    from hf_cod.compression.pruning.pruner import prune as prune
    from hf_cod.compression.pruning.settings import PruneSettings as PruneSettings
    from hf_cod.compression.quantization.config import OwlBnbConfig as OwlBnbConfig
    from hf_cod.compression.quantization.plan import BitPlan as BitPlan
    from hf_cod.compression.quantization.plan import plan_bits as plan_bits
    from hf_cod.compression.quantization.quantize import quantize as quantize
    from hf_cod.compression.quantization.settings import StorageSettings as StorageSettings
    from hf_cod.compression.search.planning import search_plan as search_plan
    from hf_cod.compression.search.settings import SearchSettings as SearchSettings
    from hf_cod.compression.sparse.config import SparseConfig as SparseConfig
    from hf_cod.compression.sparse.linear import SparseLinear as SparseLinear
    from hf_cod.compression.sparse.quantizer import pack_sparse as pack_sparse
    from hf_cod.compression.sparse.settings import PackSettings as PackSettings
    from hf_cod.compression.width.narrower import narrow as narrow
    from hf_cod.compression.width.planning import plan_width as plan_width
    from hf_cod.compression.width.settings import NarrowSettings as NarrowSettings
    from hf_cod.compression.width.settings import WidthSettings as WidthSettings
    from hf_cod.compression.width.width_plan import WidthPlan as WidthPlan
    from hf_cod.io.records import Record as Record
    from hf_cod.io.report import RunReport as RunReport
    from hf_cod.io.settings import SampleSettings as SampleSettings
    from hf_cod.io.settings import TextSettings as TextSettings
    from hf_cod.io.text import load_texts as load_texts
    from hf_cod.io.text import split_samples as split_samples
    from hf_cod.io.text import token_batches as token_batches
    from hf_cod.layers.removal.drop import drop as drop
    from hf_cod.layers.removal.drop import skip as skip
    from hf_cod.layers.removal.repeat import repeat as repeat
    from hf_cod.layers.removal.repeat import repeated as repeated
    from hf_cod.layers.stack import DecoderLayers as DecoderLayers
    from hf_cod.layers.stack import find_decoder_layers as find_decoder_layers
    from hf_cod.models import fold_lns as fold_lns
    from hf_cod.models import from_authors as from_authors
    from hf_cod.models import llama_preset as llama_preset
    from hf_cod.models import to_gpas as to_gpas
    from hf_cod.models import to_layer_scale as to_layer_scale
    from hf_cod.models import to_lns as to_lns
    from hf_cod.reporting.comparison import Comparison as Comparison
    from hf_cod.reporting.comparison import compare as compare
    from hf_cod.reporting.plan_comparison import compare_plans as compare_plans
    from hf_cod.scoring.allocation import LayerAllocation as LayerAllocation
    from hf_cod.scoring.allocation import allocate as allocate
    from hf_cod.scoring.expert_methods import score_experts as score_experts
    from hf_cod.scoring.expert_scores import ExpertScores as ExpertScores
    from hf_cod.scoring.imports.importer import import_plan as import_plan
    from hf_cod.scoring.imports.importer import import_scores as import_scores
    from hf_cod.scoring.layer_scores import LayerScores as LayerScores
    from hf_cod.scoring.methods import score_layers as score_layers
    from hf_cod.scoring.settings import AllocationSettings as AllocationSettings
    from hf_cod.scoring.settings import ExpertScoreSettings as ExpertScoreSettings
    from hf_cod.scoring.settings import ScoreSettings as ScoreSettings
    from hf_cod.training.adapters import OwLoreConfig as OwLoreConfig
    from hf_cod.training.healing.healer import heal as heal
    from hf_cod.training.healing.recovery import recover as recover
    from hf_cod.training.healing.settings import HealSettings as HealSettings
    from hf_cod.training.healing.settings import RecoverySettings as RecoverySettings
    from hf_cod.training.owlore.lora_ranks import lora_ranks as lora_ranks
    from hf_cod.training.owlore.optimizer import OwLoreAdamW as OwLoreAdamW
    from hf_cod.training.owlore.sampling import LayerSampler as LayerSampler
    from hf_cod.training.owlore.settings import LoraRankSettings as LoraRankSettings
    from hf_cod.training.owlore.settings import OwLoreSettings as OwLoreSettings
    from hf_cod.training.owlore.settings import SamplerSettings as SamplerSettings
    from hf_cod.training.owlore.trainer_arguments import owlore as owlore
    from hf_cod.training.pretraining.annealing import LnsAnnealing as LnsAnnealing

# Public name -> the module that defines it. Modules are imported on first use of a name, so that `import hf_cod` and
# `--help` load neither torch nor transformers.
_HOMES = {
    "AllocationSettings": "scoring.settings",
    "Applying": "compression.fit.knobs",
    "BitPlan": "compression.quantization.plan",
    "Comparison": "reporting.comparison",
    "DecoderLayers": "layers.stack",
    "DepthPlan": "compression.depth.depth_plan",
    "DepthSettings": "compression.depth.settings",
    "DiagnoseSettings": "analysis.diagnostics.settings",
    "DropExpertsSettings": "compression.experts.settings",
    "DropLayersSettings": "compression.depth.settings",
    "ExpertPlan": "compression.experts.expert_plan",
    "ExpertScoreSettings": "scoring.settings",
    "ExpertScores": "scoring.expert_scores",
    "ExportSettings": "compression.export.settings",
    "FactorizeSettings": "compression.low_rank.settings",
    "FitPlan": "compression.fit.fit_plan",
    "FitSettings": "compression.fit.settings",
    "GenerationDrop": "analysis.diagnostics.generation_drop",
    "GenerationSettings": "analysis.generation.settings",
    "GenerationTask": "analysis.generation.task",
    "HealSettings": "training.healing.settings",
    "LayerAllocation": "scoring.allocation",
    "LayerDiagnosticsCallback": "analysis.monitoring.callback",
    "LayerMonitor": "analysis.monitoring.monitor",
    "LayerSampler": "training.owlore.sampling",
    "LayerScores": "scoring.layer_scores",
    "LayerStatistics": "analysis.statistics.layer_statistics",
    "LnsAnnealing": "training.pretraining.annealing",
    "LoraRankSettings": "training.owlore.settings",
    "MeasurementError": "analysis.diagnostics.diagnosis",
    "MonitorSettings": "analysis.monitoring.settings",
    "NarrowSettings": "compression.width.settings",
    "OwLoreAdamW": "training.owlore.optimizer",
    "OwLoreConfig": "training.adapters",
    "OwLoreSettings": "training.owlore.settings",
    "OwlBnbConfig": "compression.quantization.config",
    "PackSettings": "compression.sparse.settings",
    "PlanExpertsSettings": "compression.experts.settings",
    "PruneSettings": "compression.pruning.settings",
    "RankPlan": "compression.low_rank.rank_plan",
    "RankSettings": "compression.low_rank.settings",
    "Record": "io.records",
    "RecoverySettings": "training.healing.settings",
    "RepeatPlan": "compression.depth.repeat_plan",
    "RepeatSettings": "compression.depth.settings",
    "RunReport": "io.report",
    "SampleSettings": "io.settings",
    "SamplerSettings": "training.owlore.settings",
    "ScoreSettings": "scoring.settings",
    "SearchSettings": "compression.search.settings",
    "SparseConfig": "compression.sparse.config",
    "SparseLinear": "compression.sparse.linear",
    "StorageSettings": "compression.quantization.settings",
    "TaskSettings": "analysis.evaluation.settings",
    "TextSettings": "io.settings",
    "TrainingHistory": "analysis.monitoring.history",
    "WidthPlan": "compression.width.width_plan",
    "WidthSettings": "compression.width.settings",
    "allocate": "scoring.allocation",
    "apply_steps": "compression.fit.trials",
    "collect_statistics": "analysis.statistics.layer_statistics",
    "compare": "reporting.comparison",
    "compare_plans": "reporting.plan_comparison",
    "diagnose": "analysis.diagnostics.diagnosis",
    "drop": "layers.removal.drop",
    "drop_experts": "compression.experts.dropper",
    "drop_layers": "compression.depth.dropper",
    "evaluate_tasks": "analysis.evaluation.lm_eval_tasks",
    "export": "compression.export.exporter",
    "factorize": "compression.low_rank.factorizer",
    "find_decoder_layers": "layers.stack",
    "fold_lns": "models",
    "from_authors": "models",
    "heal": "training.healing.healer",
    "import_plan": "scoring.imports.importer",
    "import_scores": "scoring.imports.importer",
    "llama_preset": "models",
    "load_texts": "io.text",
    "lora_ranks": "training.owlore.lora_ranks",
    "measure_generation_drop": "analysis.diagnostics.generation_drop",
    "measure_swap": "analysis.diagnostics.layer_swap",
    "narrow": "compression.width.narrower",
    "owlore": "training.owlore.trainer_arguments",
    "pack_sparse": "compression.sparse.quantizer",
    "perplexity": "analysis.evaluation.choice",
    "plan_bits": "compression.quantization.plan",
    "plan_depth": "compression.depth.criteria",
    "plan_experts": "compression.experts.planning",
    "plan_fit": "compression.fit.planning",
    "plan_ranks": "compression.low_rank.spectra",
    "plan_repeat": "compression.depth.repeat_search",
    "plan_width": "compression.width.planning",
    "prune": "compression.pruning.pruner",
    "quantize": "compression.quantization.quantize",
    "recover": "training.healing.recovery",
    "repeat": "layers.removal.repeat",
    "repeat_layers": "compression.depth.repeater",
    "repeated": "layers.removal.repeat",
    "score_experts": "scoring.expert_methods",
    "score_layers": "scoring.methods",
    "search_plan": "compression.search.planning",
    "skip": "layers.removal.drop",
    "split_samples": "io.text",
    "to_gpas": "models",
    "to_layer_scale": "models",
    "to_lns": "models",
    "token_batches": "io.text",
}
# `import *` must work without PEFT.
__all__ = [name for name in _HOMES if name != "OwLoreConfig"]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name == "register":
        from hf_cod.io.deprecation import warn_renamed

        warn_renamed("hf_cod", name, "hf_cod.models.register")
        return import_module("hf_cod.models").register
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"hf_cod.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
