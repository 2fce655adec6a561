"""Benchmarks of the Language Model Evaluation Harness (lm-eval) on a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Unpack

from torch import nn

from hf_cod.analysis.evaluation.settings import TaskFields, TaskSettings
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.settings import resolve
from hf_cod.io.text import Tokenizer
from hf_cod.layers.modes import modes_restored
from hf_cod.layers.stack import unwrap
from hf_cod.layers.stock_four_bit import as_found


@renamed(limit="max_samples")
@checked
def evaluate_tasks(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: Sequence[str | dict[str, Any]],
    *,
    settings: TaskSettings | None = None,
    **fields: Unpack[TaskFields],
) -> dict[str, dict[str, float]]:
    """Runs tasks of lm-eval (`arc_easy`, `hellaswag`, `wikitext`, ...) on a causal language model in memory.

    Args:
        model: a transformers model, also pruned or packed; train or eval mode of its modules is restored.
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks, or dicts of task settings for custom tasks (`dataset_path: json` reads local
            files).
        settings: number of samples, batch size and seed.
        **fields: or fields of `TaskSettings` by name: max_samples, batch_size, seed.

    Returns:
        Task -> metric ("acc", "acc_norm", "word_perplexity", ...) -> value.

    Raises:
        ValueError: no task, or a task that lm-eval does not have or cannot load.
        ImportError: lm-eval is not installed.
    """
    chosen = resolve(evaluate_tasks, TaskSettings, settings, fields)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("tasks: lm-eval's tasks require lm_eval: pip install 'hf_cod[lm-eval]'") from error
    if not tasks:
        raise ValueError("tasks: expected at least one task of lm-eval, got none")
    try:
        seeds = {f"{name}_seed": chosen.seed for name in ("random", "numpy_random", "torch_random", "fewshot_random")}
        manager = _known_tasks(not all(_stands_alone(task) for task in tasks))
        options: dict[str, Any] = {"limit": chosen.max_samples, "log_samples": False, "bootstrap_iters": 0, **seeds}
        with modes_restored(model), as_found(model):  # HFLM sets all to evaluation; generation is faster repacked
            wrapped = HFLM(pretrained=unwrap(model), tokenizer=tokenizer, batch_size=chosen.batch_size)
            found = simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, **options)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"tasks: expected tasks that lm-eval can load, got {list(tasks)}: {error}") from error
    return {task: _figures(values) for task, values in found["results"].items()}


def _stands_alone(task: str | dict[str, Any]) -> bool:
    """Whether a task has its own data; names, groups and variations require lm-eval's own tasks."""
    return isinstance(task, dict) and "dataset_path" in task and "group" not in task


@cache
def _known_tasks(named: bool) -> Any:
    """lm-eval's task manager, without lm-eval's own tasks (thousands of files, slow to read) unless required."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=named)


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """Only numbers, under their names without lm-eval's filter ("acc,none")."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, float) and "_stderr," not in key
    }
