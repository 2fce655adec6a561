"""Tasks of lm-eval in which the model writes an answer, with their own prompts, filters and metrics."""

from __future__ import annotations

import copy
from typing import Any

from hf_cod.analysis.generation.settings import GenerationSettings
from hf_cod.analysis.generation.task import GenerationTask, chosen_rows
from hf_cod.io.display import one_line

WRITES = "generate_until"


def check_lm_eval_task(name: str) -> None:
    """Checks that lm-eval is installed; whether it has the task is found when the data is loaded.

    Raises:
        ImportError: lm-eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError("tasks: lm-eval:NAME requires lm_eval: pip install 'hf_cod[lm-eval]'") from error
    if not name:
        raise ValueError("tasks: expected lm-eval:NAME, got no name")


def lm_eval_task(name: str | dict[str, Any], tokenizer: Any, settings: GenerationSettings) -> GenerationTask:
    """Prompts of a task of lm-eval. An answer ends where the task's stop strings say; it is scored by the task's first
    filter and first metric.

    Args:
        name: a name of lm-eval's, or a dict of task settings for a custom task.
        tokenizer: not used: prompts are plain text, as in lm-eval by default.
        settings: number of prompts and seed.

    Raises:
        ValueError: lm-eval has no such task or cannot load it, or the task compares likelihoods of choices.
        ImportError: lm-eval is not installed.
    """
    check_lm_eval_task(str(name))
    task = _loaded(name)
    instances = sorted(task.instances, key=lambda each: each.idx)
    chosen = [*dict.fromkeys(each.doc_id for each in instances)]
    kept = [instances[i] for i in chosen_rows(len(chosen), settings.max_prompts, settings.seed)]
    references = [_reference(task, each.doc) for each in kept]
    return GenerationTask(_title(name), [each.args[0] for each in kept], references, _Scorer(task), kept)


class _Scorer:
    """The task's first metric of an answer."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def __call__(self, answer: str, instance: Any) -> float:
        for stop in _stops(instance):
            answer = answer.partition(stop)[0]
        answered = copy.copy(instance)
        answered.resps, answered.filtered_resps = [answer], {}
        first = next(iter(self.task._filters), None)
        if first is not None:
            first.apply([answered])
        found = next(iter(answered.filtered_resps.values()), answer)
        while isinstance(found, list | tuple):
            (found,) = found[:1]
        return float(next(iter(self.task.process_results(instance.doc, [found]).values())))


def _stops(instance: Any) -> list[str]:
    until = instance.args[1].get("until", []) if len(instance.args) > 1 else []
    return [until] if isinstance(until, str) else [stop for stop in until if stop]


def _loaded(name: str | dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager, get_task_dict

    try:
        manager = TaskManager(include_defaults=not isinstance(name, dict))
        (task,) = get_task_dict([name], manager).values()
        if getattr(task, "OUTPUT_TYPE", None) != WRITES:
            kind = getattr(task, "OUTPUT_TYPE", type(task).__name__)
            raise ValueError(f"expected a task that writes its answers ({WRITES}), got {kind}")
        task.build_all_requests(rank=0, world_size=1)
        return task
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"tasks: expected one that lm-eval can load, got {_title(name)}: {one_line(error)}") from error


def _reference(task: Any, doc: Any) -> str:
    target = task.doc_to_target(doc)
    target = target[0] if isinstance(target, list) and target else target
    return f"{task.config.target_delimiter}{target}"


def _title(name: str | dict[str, Any]) -> str:
    return str(name.get("task", "task")) if isinstance(name, dict) else f"lm-eval:{name}"
