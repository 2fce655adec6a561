"""Tasks by name, from files and in Python: their prompts, references and scores, and what is refused."""

import builtins
import json

import pytest
import reasoning_gym

from hf_cod import GenerationSettings, GenerationTask
from hf_cod.analysis.generation.lm_eval_source import lm_eval_task
from hf_cod.analysis.generation.sources import check_tasks, load_tasks
from tests.tiny_tokenizers import gpt_like

FEW = GenerationSettings(max_prompts=4, seed=3)


def load(task, tokenizer=None):
    (found,) = load_tasks(task, tokenizer or gpt_like(), FEW)
    return found


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("chain_sum", {}),
        ("chain_sum,max_terms=2,max_digits=1", {"max_terms": 2, "max_digits": 1}),
        ("chain_sum@1,allow_negation=true", {"min_terms": 2, "max_terms": 3, "allow_negation": True}),
    ],
)
def test_reasoning_gym_by_name_and_difficulty(name, own):
    found = load(f"gym:{name}")
    if "@" in name:  # the levels of its curriculum
        curriculum = reasoning_gym.factory.create_curriculum("chain_sum")
        curriculum.set_global_level(1)
        configured = curriculum.generate_configuration()
        own = {"allow_negation": True, **{k: getattr(configured, k) for k in ("min_digits", "max_digits")}}
        own |= {k: getattr(configured, k) for k in ("min_terms", "max_terms")}
    data = reasoning_gym.create_dataset("chain_sum", size=4, seed=3, **own)
    assert found.prompts == [f"{entry['question']}\n" for entry in data]
    assert found.references == [entry["answer"] for entry in data]
    assert found.scored(f" {found.references[0]} ", 0) == 1
    assert found.scored(f"I think <answer>{found.references[1]}</answer>", 1) == 1
    assert found.scored("twelve", 2) == data.score_answer("twelve", data[2]) < 1


def test_questions_are_messages_for_a_tokenizer_with_a_chat_template():
    tokenizer = gpt_like()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    found = load("gym:chain_sum", tokenizer)
    assert found.prompts[0][0]["role"] == "user" and "arithmetic" in found.prompts[0][0]["content"]


@pytest.mark.parametrize(
    ("rows", "prompt", "reference"),
    [
        ({"prompt": "1 + 1 =", "answer": 2}, "1 + 1 =", "2"),
        ({"question": "1 + 1 =", "answer": " 2"}, "1 + 1 =", " 2"),
        ({"prompt": "1 + 1 =", "completion": "2"}, "1 + 1 =", "2"),
        ({"instruction": "1 + 1 =", "output": "2"}, [{"role": "user", "content": "1 + 1 ="}], "2"),
    ],
)
def test_files_of_prompts_and_answers(tmp_path, rows, prompt, reference):
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join([json.dumps(rows)] * 6))
    found = load(str(file))
    assert (found.name, len(found.prompts)) == ("sums", 4)
    assert (found.prompts[0], found.references[0]) == (prompt, reference)
    assert [found.scored(answer, 0) for answer in ("2", " 2\n", "22", "")] == [1, 1, 0, 0]


def test_a_function_scores_answers_by_rows():
    def share(answer, row):
        return sum(word in answer for word in row["words"]) / len(row["words"])

    rows = [{"words": ["one", "two"]}] * 5
    task = GenerationTask("words", [f"{i}" for i in range(5)], ["one two"] * 5, share, rows)
    found = load(task)
    assert len(found.prompts) == 4 and found.scored("one", 0) == 0.5
    assert sorted(found.prompts) == sorted(load(task).prompts) and set(found.prompts) < set(task.prompts)


@pytest.fixture
def custom(tmp_path):
    rows = [{"question": f"{i} plus one", "answer": f"{i + 1}"} for i in range(6)]
    file = tmp_path / "sums.json"
    file.write_text("\n".join(map(json.dumps, rows)))
    return {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"]},
        "filter_list": [
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": "(\\d+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def test_lm_eval_prompts_with_its_filters_and_metrics(custom):
    found = lm_eval_task(custom, None, FEW)
    assert len(found.prompts) == 4
    for number, (prompt, reference) in enumerate(zip(found.prompts, found.references, strict=True)):
        right = int(prompt.split()[0]) + 1
        assert reference == f" {right}"
        answers = [f"it is {right} of course", f"{right}\n99", "99", f"99\n{right}"]
        assert [found.scored(answer, number) for answer in answers] == [1, 1, 0, 0]


def test_lm_eval_tasks_that_compare_choices_are_refused(custom):
    custom |= {"output_type": "multiple_choice", "doc_to_choice": ["1", "2"], "doc_to_target": 0}
    del custom["filter_list"], custom["generation_kwargs"]
    custom["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    with pytest.raises(ValueError, match=r"a task that writes its answers .*, got multiple_choice"):
        lm_eval_task(custom, None, FEW)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("chain_sum", "tasks: expected gym:NAME of reasoning-gym, .* got 'chain_sum'"),
        ("missing.jsonl", "tasks: expected gym:NAME .* got 'missing.jsonl'"),
        ("gym:chain_summ", "tasks: expected a generator of reasoning-gym, got gym:chain_summ. did you mean chain_sum?"),
        (
            "gym:chain_sum,max_term=2",
            "tasks: expected a setting of the generator .min_terms.*, got 'max_term'. did you mean max_terms",
        ),
        ("gym:chain_sum,min_terms=9", "tasks: expected settings that gym:chain_sum accepts, got max_terms must be"),
        ("gym:chain_sum@hard", "tasks: expected a level from 0 for gym:chain_sum, got @hard"),
        ("gym:composite@1", "tasks: expected no level, since there is no curriculum for gym:composite, got @1"),
        ("lm-eval:", "tasks: expected lm-eval:NAME, got no name"),
    ],
)
def test_wrong_names_are_one_clear_line_before_a_model_is_loaded(task, told):
    with pytest.raises(ValueError, match=told) as error:
        check_tasks([task])
    assert "\n" not in str(error.value)


def test_wrong_files(tmp_path):
    for content, told in (
        ('{"text": "one"}', "tasks: expected a file with the columns prompt and answer, "),
        ('{"prompt": "one", "answer": null}\n{"prompt": "two", "answer": "a"}', "tasks: expected prompt and answer in"),
    ):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(ValueError, match=told):
            load(str(tmp_path / "rows.jsonl"))


def test_wrong_scorers_and_tasks():
    with pytest.raises(ValueError, match="references: expected 1, one for each prompt of x, got 2"):
        GenerationTask("x", ["one"], ["a", "b"])
    with pytest.raises(ValueError, match="prompts: expected at least one in the task x, got none"):
        GenerationTask("x", [], [])
    with pytest.raises(ValueError, match="tasks: the scorer of x failed on prompt 0: division by zero"):
        GenerationTask("x", ["one"], ["a"], lambda answer, row: 1 / 0).scored("a", 0)
    with pytest.raises(ValueError, match=r"tasks: expected scores from 0 to 1, got 7\.0"):
        GenerationTask("x", ["one"], ["a"], lambda answer, row: 7).scored("a", 0)


@pytest.mark.parametrize(("task", "package"), [("gym:chain_sum", "reasoning_gym"), ("lm-eval:gsm8k", "lm_eval")])
def test_missing_packages_are_named(monkeypatch, task, package):
    own = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return own(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install 'hf_cod\\["):
        check_tasks([task])
