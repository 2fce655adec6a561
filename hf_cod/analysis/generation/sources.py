"""Tasks by name: generators of reasoning-gym, tasks of lm-eval, and files of prompts and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_cod.analysis.generation.lm_eval_source import check_lm_eval_task, lm_eval_task
from hf_cod.analysis.generation.reasoning_gym_source import check_gym_task, gym_task
from hf_cod.analysis.generation.settings import GenerationSettings
from hf_cod.analysis.generation.task import GenerationTask, chosen_rows
from hf_cod.io.arguments import shown
from hf_cod.io.inputs import FILE_READERS
from hf_cod.io.records import Record
from hf_cod.io.rows import load_rows, read_rows
from hf_cod.io.settings import TextSettings

# Prefix of a name -> what checks it, without a model, and what loads it.
SOURCES = {"gym": (check_gym_task, gym_task), "lm-eval": (check_lm_eval_task, lm_eval_task)}
KNOWN = "gym:NAME of reasoning-gym, lm-eval:NAME, or a file of prompts and answers (.jsonl, .json, .csv, .parquet)"
# Columns of the prompt and of the answer, beside the formats of `io/records.py`.
PAIRS = (("prompt", "answer"), ("question", "answer"), ("prompt", "reference"))


def check_tasks(tasks: Sequence[str]) -> None:
    """Checks names of tasks before a model is loaded.

    Raises:
        ValueError: there is no such task or file.
        ImportError: the task requires a package that is not installed.
    """
    for task in tasks:
        prefix, _, name = task.partition(":")
        if prefix in SOURCES:
            SOURCES[prefix][0](name)
        elif Path(task).suffix not in FILE_READERS or not Path(task).is_file():
            raise ValueError(f"tasks: expected {KNOWN}, got {task!r}")


def listed(tasks: Any) -> list[str | GenerationTask]:
    """Tasks as a list.

    Raises:
        ValueError: none, or something else than names and tasks.
    """
    given = [tasks] if isinstance(tasks, str | GenerationTask) else tasks
    if not isinstance(given, Sequence):
        raise ValueError(f"tasks: expected names or hf_cod.GenerationTask, got {shown(tasks)}")
    wrong = next((task for task in given if not isinstance(task, str | GenerationTask)), None)
    if wrong is not None:
        raise ValueError(f"tasks: expected names or hf_cod.GenerationTask, got {shown(wrong)} among them")
    if not given:
        raise ValueError(f"tasks: expected at least one of {KNOWN}, got none")
    return [*given]


def load_tasks(tasks: Any, tokenizer: Any, settings: GenerationSettings) -> list[GenerationTask]:
    """The tasks that a user named.

    Args:
        tasks: a name, a `GenerationTask`, or a list of them. Names: `gym:NAME` is a generator of reasoning-gym,
            `gym:NAME@LEVEL` at a level of its curriculum, and `gym:NAME,min_terms=2` with settings of its own;
            `lm-eval:NAME` is a task of lm-eval that generates; others are files with the columns prompt and answer,
            question and answer, prompt and completion, or instruction and output.
        tokenizer: of the model: with a chat template, questions of reasoning-gym are messages.
        settings: number of prompts and seed.

    Raises:
        ValueError: no task, one that does not exist, or a file of another format.
        ImportError: a task requires a package that is not installed.
    """
    found = []
    for task in listed(tasks):
        if isinstance(task, GenerationTask):
            found.append(_limited(task, settings))
            continue
        check_tasks([task])
        prefix, _, name = task.partition(":")
        load = SOURCES[prefix][1] if prefix in SOURCES else None
        found.append(_file_task(task, settings) if load is None else load(name, tokenizer, settings))
    return found


def _limited(task: GenerationTask, settings: GenerationSettings) -> GenerationTask:
    chosen = chosen_rows(len(task.prompts), settings.max_prompts, settings.seed)
    rows = None if task.rows is None else [task.rows[i] for i in chosen]
    prompts, references = [task.prompts[i] for i in chosen], [task.references[i] for i in chosen]
    return GenerationTask(task.name, prompts, references, task.score, rows)


def _file_task(path: str, settings: GenerationSettings) -> GenerationTask:
    """Prompts and answers of a file, scored by exact match.

    Raises:
        ValueError: a file without these columns, or a row without a prompt and an answer.
    """
    source = TextSettings(text=path)
    rows = load_rows(source, plain=False)
    columns = rows.column_names
    pair = next((pair for pair in PAIRS if {*pair} <= {*columns}), None)
    if pair is not None:
        pairs = [_pair(row, pair, number) for number, row in enumerate(rows, 1)]
    else:
        records = read_rows(source)[0]
        pairs = [_asked_and_answered(record) for record in records]
    prompts, references = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    return _limited(GenerationTask(Path(path).stem, prompts, references), settings)


def _pair(row: Mapping[str, Any], columns: Sequence[str], number: int) -> tuple[Any, str]:
    prompt, answer = (row[column] for column in columns)
    if not isinstance(prompt, str | list) or not prompt or answer is None:
        raise ValueError(f"tasks: expected {' and '.join(columns)} in row {number}, got {prompt!r} and {answer!r}")
    return prompt, str(answer)


def _asked_and_answered(record: Any) -> tuple[Any, str]:
    """The prompt and the answer of a record."""
    if not isinstance(record, Record) or record.prompt is None:
        pairs = ", ".join(" and ".join(pair) for pair in PAIRS)
        raise ValueError(f"tasks: expected a file with the columns {pairs}, or prompt and completion; got another one")
    answer = record.completion
    text = answer if isinstance(answer, str) else "".join(str(turn["content"]) for turn in answer or ())
    return record.prompt, text
