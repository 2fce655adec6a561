"""How good a model is on batches."""

from hf_cod.evaluation.choice import find_metric, perplexity
from hf_cod.evaluation.lm_eval_tasks import evaluate_tasks
from hf_cod.evaluation.metrics import Metric, Perplexity, as_loss, negative_log_likelihood
from hf_cod.evaluation.task import LANGUAGE_MODELS, MASKED_LM_SUFFIXES, model_inputs, targets, task_of

__all__ = [
    "LANGUAGE_MODELS",
    "MASKED_LM_SUFFIXES",
    "Metric",
    "Perplexity",
    "as_loss",
    "evaluate_tasks",
    "find_metric",
    "model_inputs",
    "negative_log_likelihood",
    "perplexity",
    "targets",
    "task_of",
]
