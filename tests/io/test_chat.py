"""Rendered records, and the tokens of their answers, compared with those of TRL's trainer."""

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl import chat_template_utils as of_trl

from hf_cod.io.chat import MARKED, find_answers, text_of, tokens_of
from hf_cod.io.models import embedded_model
from hf_cod.io.records import Record, find_format, records_of
from tests.tiny_models import build

if not hasattr(of_trl, "gemma_chat_template"):
    pytest.skip(f"TRL {trl.__version__} has no templates with marked answers", allow_module_level=True)

MARKS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Name -> chat template: with marks of answers, and published ones, which TRL marks.
TEMPLATES = {
    "marks": MARKS,
    "qwen2_5": of_trl.qwen2_5_chat_template,
    "qwen3": of_trl.qwen3_chat_template,
    "llama3": of_trl.llama3_chat_template,
    "gemma": of_trl.gemma_chat_template,
}
CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


ROWS = {
    "one turn": {"messages": turns("What is it?", "A fine day.")},
    "three turns": {"messages": turns("Who?", "She.", "Why\n\nnot?", "  He said so.\n", "Then?", "Never.")},
    "open end": {"messages": turns("Who?", "She.", "And?")},
    "unicode": {
        "messages": turns("\u00bfQui\u00e9n? \U0001f600", "\u5973 e\u0301\u200d \U0001f469\u200d\U0001f469 <|im_end|>")
    },
    "empty answer": {"messages": turns("Who?", "", "Who?", "She.")},
    "prompt": {"prompt": "What is it? ", "completion": "A fine day."},
    "prompt that merges": {"prompt": "a fi", "completion": "ne day"},
    "prompt of messages": {"prompt": turns("Who?", "She.", "Why?"), "completion": turns("", "He.")[1:]},
}
WITH_TOOLS = {
    "tools": {
        "messages": [*turns("Who?"), CALLS, {"role": "tool", "name": "f", "content": "6"}, *turns("", "6.")[1:]],
        "tools": TOOLS,
    }
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model("lns"))


def of_trainer(tokenizer, row, length, folder):
    """input_ids and labels of TRL's trainer; None if it leaves the row out."""
    conversation = "messages" in row
    arguments = SFTConfig(
        str(folder), assistant_only_loss=conversation, max_length=length, use_cpu=True, bf16=False, report_to=[]
    )
    model = build("llama", 1, vocab_size=len(tokenizer))
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    return [(each["input_ids"], each["labels"]) for each in trainer.train_dataset]


def ours(tokenizer, row):
    (record,) = records_of([row], find_format([*row], "text"), None, False)
    ids, mask = tokens_of(tokenizer, record, find_answers(tokenizer, None))
    return ids, [token if answer else -100 for token, answer in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_answers_are_those_of_trl(name, row, tokenizer, tmp_path):
    if name != "marks" and row in ("prompt", "prompt that merges"):
        pytest.skip("no template")
    tokenizer.chat_template = TEMPLATES[name]
    torch.manual_seed(0)
    assert of_trainer(tokenizer, ROWS[row], 1000, tmp_path) == [ours(tokenizer, ROWS[row])]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_calls_of_tools_are_answers_as_for_trl(name, tokenizer, tmp_path):
    tokenizer.chat_template = TEMPLATES[name]
    ids, labels = ours(tokenizer, WITH_TOOLS["tools"])
    assert of_trainer(tokenizer, WITH_TOOLS["tools"], 1000, tmp_path) == [(ids, labels)]
    answers = tokenizer.decode([label for label in labels if label != -100])
    assert '"name": "f", "arguments": {"a": 1}' in answers and "6." in answers and "Who?" not in answers


@pytest.mark.parametrize("row", ROWS)
def test_answers_by_prefixes_are_those_of_marks(row, tokenizer, monkeypatch):
    """Of the same template without marks, which TRL does not know; the line behind each answer belongs to it."""
    if "messages" not in ROWS[row]:
        pytest.skip("no conversation")
    tokenizer.chat_template = MARKS
    ids, labels = ours(tokenizer, ROWS[row])
    tokenizer.chat_template = MARKED.sub("", MARKS).replace("{% endgeneration %}", "")
    assert find_answers(tokenizer, None).by == "prefixes"
    again, found = ours(tokenizer, ROWS[row])
    (line,) = tokenizer("\n")["input_ids"]
    behind = [i for i in range(1, len(ids)) if labels[i] == -100 and labels[i - 1] != -100 and ids[i] == line]
    for place in behind:
        labels[place] = line
    assert again == ids and found == labels and behind


def test_a_template_that_renders_earlier_answers_otherwise_is_refused(tokenizer):
    """Without marks, no prefix shows its answers."""
    tokenizer.chat_template = "{% for m in messages %}{{ loop.revindex }} {{ m.content }}\n{% endfor %}"
    with pytest.raises(
        ValueError, match=r"^chat_template: expected one that renders each answer alike .* at row 1; --chat"
    ):
        ours(tokenizer, ROWS["three turns"])


@pytest.mark.parametrize(
    "template, said",
    [
        (None, "expected a tokenizer with a chat template for conversations, got one without"),
        ("{{ raise_exception('no') }}", "expected one that renders row 1, got TemplateError: no"),
        ("{% for %}", "expected one that renders row 1, got TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", "expected one that renders row 1, got TypeError"),
    ],
)
def test_what_cannot_be_rendered_is_one_line(template, said, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"^chat_template: {said}") as error:
        ours(tokenizer, ROWS["one turn"])
    assert "\n" not in str(error.value)


def test_halves_of_characters_are_refused(tokenizer):
    tokenizer.chat_template = MARKS
    record = Record(turns("a", "\ud800"))
    for call in (
        lambda: text_of(tokenizer, record),
        lambda: tokens_of(tokenizer, record, find_answers(tokenizer, None)),
    ):
        with pytest.raises(ValueError, match="row 1"):
            call()
    with pytest.raises(ValueError, match=r"^text: expected text, got in row 1"):
        tokens_of(tokenizer, Record(prompt="a", completion="\ud800"), find_answers(tokenizer, None))
