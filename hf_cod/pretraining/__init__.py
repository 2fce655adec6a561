"""Pre-training from scratch: recipes, packed text, and what a training loop starts from.

The loops themselves are examples/pretrain.py (Trainer) and examples/pretrain_accelerate.py.
"""

from hf_cod.pretraining.packing import PackedStream, PackedText, pack, train_tokenizer
from hf_cod.pretraining.preparation import Prepared, as_batches, build_model, prepare
from hf_cod.pretraining.recipes import (
    FINAL_LEARNING_RATE_SHARE,
    RECIPES,
    PretrainSettings,
    Recipe,
    accumulation_steps,
    model_config,
)
from hf_cod.pretraining.results import save_results, training_report, unigram_perplexity
from hf_cod.pretraining.run_directory import claim, last_checkpoint, last_steps

__all__ = [
    "FINAL_LEARNING_RATE_SHARE",
    "RECIPES",
    "PackedStream",
    "PackedText",
    "Prepared",
    "PretrainSettings",
    "Recipe",
    "accumulation_steps",
    "as_batches",
    "build_model",
    "claim",
    "last_checkpoint",
    "last_steps",
    "model_config",
    "pack",
    "prepare",
    "save_results",
    "train_tokenizer",
    "training_report",
    "unigram_perplexity",
]
