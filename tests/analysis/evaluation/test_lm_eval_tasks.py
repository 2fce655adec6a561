import builtins
import json
from functools import partial

import lm_eval.tasks
import pytest
import torch

from hf_cod import evaluate_tasks, pack_sparse
from hf_cod.analysis.evaluation import lm_eval_tasks
from tests.tiny_models import build
from tests.tiny_tokenizers import gpt_like

ROWS = [
    {"question": "one two three", "choices": [" four", " nine"], "answer": 0},
    {"question": "two three four", "choices": [" one", " five"], "answer": 1},
    {"question": "six seven", "choices": [" eight", " two"], "answer": 0},
    {"question": "nine", "choices": [" ten", " three"], "answer": 1},
]


@pytest.fixture
def task(tmp_path):
    file = tmp_path / "questions.json"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return {
        "task": "counting",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


@torch.no_grad()
def log_likelihood(model, tokenizer, question, choice):
    ids, start = tokenizer(question + choice)["input_ids"], len(tokenizer(question)["input_ids"])
    logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[t - 1, ids[t]]) for t in range(start, len(ids)))


def by_hand(model, tokenizer):
    right = 0
    for row in ROWS:
        scores = [log_likelihood(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    return right / len(ROWS)


def test_a_task_of_ones_own_against_log_likelihoods_by_hand(task):
    tokenizer, found = gpt_like(), set()
    for seed in range(4):
        model = build("llama").train()
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.lm_head.weight)
        accuracy = evaluate_tasks(model, tokenizer, [task])["counting"]["acc"]
        assert model.training and accuracy == by_hand(model.eval(), tokenizer)
        found.add(accuracy)
    assert len(found) > 1, "the task tells models apart"


def test_packed_models_are_measured_as_they_are(task):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(torch.rand(48, 32) > 0.8)
    pack_sparse(model)
    assert evaluate_tasks(model, gpt_like(), [task], max_samples=2)["counting"]["acc"] in (0, 0.5, 1)


def test_groups_of_known_tasks_find_them_and_modes_come_back(task, monkeypatch):
    """Reading all of lm-eval's tasks takes a while: here only whether they are asked for."""
    model, asked = build("llama").train(), []
    model.model.layers[0].eval()
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: asked.append(include_defaults))
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *args, **options: {"results": {}})
    lm_eval_tasks._known_tasks.cache_clear()
    group = {"group": "mine", "task": [{"task": "arc_easy", "num_fewshot": 2}]}
    for tasks in ([task], [group], [{"task": "arc_easy", "num_fewshot": 2}], ["arc_easy"]):
        evaluate_tasks(model, gpt_like(), tasks)
    lm_eval_tasks._known_tasks.cache_clear()
    assert asked == [False, True], "each kind once"
    assert model.training and model.model.layers[1].training and not model.model.layers[0].mlp.training


def test_bad_tasks(task, monkeypatch):
    model, tokenizer = build("llama"), gpt_like()
    with pytest.raises(ValueError, match="tasks: expected at least one task of lm-eval, got none"):
        evaluate_tasks(model, tokenizer, [])
    quick = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # reading all of its tasks takes 20 s
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: quick())
    lm_eval_tasks._known_tasks.cache_clear()
    with pytest.raises(ValueError, match=r"tasks: expected tasks that lm-eval can load, got \['no_such_task'\]"):
        evaluate_tasks(model, tokenizer, ["no_such_task"])
    lm_eval_tasks._known_tasks.cache_clear()
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'hf_cod\[lm-eval\]'"):
        evaluate_tasks(model, tokenizer, [task])
