"""Chats, prompts with completions and instructions, from files that people have."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cod import load_texts, token_batches
from hf_cod.io.records import Format, Record, find_format, records_of
from hf_cod.io.rows import text_notes
from hf_cod.io.settings import TextSettings
from tests.tiny_tokenizers import gpt_like

ASKED, SAID = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
CHAT = [ASKED, SAID]
# Format of a file -> a row, and what it is read as.
ROWS = {
    "messages": ({"messages": CHAT}, Record(CHAT)),
    "tools": ({"messages": CHAT, "tools": [{"name": "f"}]}, Record(CHAT, tools=[{"name": "f"}])),
    "share_gpt": (
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}], "id": 3},
        Record(CHAT),
    ),
    "texts": ({"prompt": "one ", "completion": "two"}, Record(prompt="one ", completion="two")),
    "messages_apart": ({"prompt": [ASKED], "completion": [SAID]}, Record(CHAT, [ASKED], [SAID])),
    "instruction": ({"instruction": "one", "input": "", "output": "two"}, Record(CHAT, [ASKED], [SAID])),
    "context": (
        {"instruction": "one", "context": "three", "response": "two"},
        Record([made := {"role": "user", "content": "one\n\nthree"}, SAID], [made], [SAID]),
    ),
    "json_prompt": ({"prompt": "[1]", "completion": "{}"}, Record(prompt="[1]", completion="{}")),
}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}ten {% endif %}{% endfor %}"


def written(folder, rows, ending="jsonl"):
    import datasets

    path = folder / f"data.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        datasets.Dataset.from_list(cells).to_csv(path)
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
@pytest.mark.parametrize("kind", ROWS)
def test_each_format_is_recognized_in_each_file(kind, ending, tmp_path):
    row, record = ROWS[kind]
    first, _ = load_texts(text=written(tmp_path, [row, row], ending))
    assert first == record


def test_rows_lose_the_entries_that_other_rows_have(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    first, second = load_texts(text=written(tmp_path, [{"messages": CHAT}, {"messages": [ASKED, call]}], "parquet"))
    assert first.messages == CHAT and first.row == 1 and second.row == 2
    assert second.messages[1] == {**call, "content": ""} and second.answered


def test_a_question_whose_content_has_another_name_is_refused():
    by_messages, by_turns = (find_format([name], "text") for name in ("messages", "conversations"))
    for chosen, asked in [
        (by_messages, {"role": "user", "contents": "one"}),
        (by_turns, {"from": "human", "values": "one"}),
    ]:
        rows = [{chosen.columns[0]: [asked, SAID]}]
        with pytest.raises(ValueError, match=r"got in row 1 the message .*, which has no role and content$"):
            list(records_of(rows, chosen, None, False))
    (record,) = records_of([{"messages": [{**ASKED, "content": None}, SAID]}], by_messages, None, False)
    assert record.messages == [{**ASKED, "content": ""}, SAID]
    (record,) = records_of(
        [{"conversations": [{"from": "human", "value": "one"}, {"from": "gpt"}]}], by_turns, None, False
    )
    assert record.messages == [ASKED, {**SAID, "content": ""}] and not record.answered


@pytest.mark.parametrize("answer", [{"completion": " "}, {"completion": ""}, {"completion": None}])
def test_records_without_an_answer(answer):
    (record,) = records_of([{"prompt": "one", **answer}], find_format(["prompt", "completion"], "text"), None, False)
    assert not record.answered
    assert not Record([ASKED]).answered and not Record([ASKED, {**SAID, "content": ""}]).answered


def test_a_named_column_is_plain_text_and_says_what_it_leaves_out(tmp_path):
    """Calls of earlier versions keep their meaning."""
    path = written(tmp_path, [ROWS["texts"][0]])
    assert [*load_texts(text=path, text_column="completion")] == ["two"]
    note = "the text was read as plain text (column completion); not read: prompt"
    assert text_notes(TextSettings(path, "completion")) == [note]
    assert text_notes(TextSettings(path)) == [
        "the text was read as prompts and completions (columns prompt, completion)"
    ]
    path = written(tmp_path, [{"text": "one", "instruction": "two", "output": "three"}])
    assert [*load_texts(text=path)] == ["one"] and "not read: instruction, output" in text_notes(TextSettings(path))[0]
    path = written(tmp_path, [{"messages": "one"}])
    assert [*load_texts(text=path, text_column="messages")] == ["one"]
    with pytest.raises(ValueError, match="got in row 1 'one' in column messages, which is no list of messages"):
        [*load_texts(text=path)]


def test_unknown_and_ambiguous_columns_are_refused_with_the_columns():
    with pytest.raises(ValueError, match=r"^text_column: expected .* messages; .*; got the columns prompt, chosen$"):
        find_format(["prompt", "chosen"], "text")
    with pytest.raises(
        ValueError, match=r"got conversations and prompts and completions \(columns messages, prompt, co"
    ):
        find_format(["messages", "prompt", "completion"], "text")
    assert find_format(["messages", "prompt", "completion"], "messages").name == "conversations"
    with pytest.raises(ValueError, match=r"^text_column: expected one of messages, got 'body'$"):
        find_format(["messages"], "body")


def test_calibration_reads_chats_by_their_template(tmp_path):
    """Joined or one for each sample, also by a stream; without a template, one line says how to name one."""
    path = written(tmp_path, [{"messages": CHAT * 4}] * 6)
    with pytest.raises(
        ValueError, match=r"^chat_template: expected a tokenizer with .*; --chat-template FILE names one$"
    ):
        token_batches(gpt_like(), load_texts(text=path), sequence_length=4)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    texts = [*load_texts(text=path, chat_template=str(tmp_path / "chat.jinja"))]
    whole = gpt_like()("one two ten " * 24)["input_ids"]
    for given_texts in (texts, iter(texts)):
        joined = token_batches(gpt_like(), given_texts, sequence_length=9, max_samples=8)
        assert [row.tolist() for batch in joined for row in batch["input_ids"]] == [whole[:9]] * 8
    (single,) = token_batches(gpt_like(), texts[:2], sequence_length=100, pack=False)
    assert single["input_ids"].tolist() == [whole[:12]] * 2
    (tmp_path / "my.txt").write_text("one two")
    with pytest.raises(ValueError, match="chat_template: expected none with plain text"):
        load_texts(text=str(tmp_path / "my.txt"), chat_template=str(tmp_path / "chat.jinja"))
    pairs = written(tmp_path, [ROWS["texts"][0]])
    with pytest.raises(ValueError, match=r"^chat_template: expected none with prompts and completions of plain text, "):
        load_texts(text=pairs, chat_template=str(tmp_path / "chat.jinja"))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["user", "[", "{"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["conversations", "prompts and completions", "instructions"]),
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ["messages", "prompt", "completion", "instruction", "input", "output", "tools", "chat_template_kwargs"],
            ANYTHING,
        ),
    ),
    st.booleans(),
)
def test_hostile_rows_are_records_or_one_line(name, row, named):
    """Whatever a row holds: what becomes a record is rendered or refused in one line, too."""
    columns = {"conversations": ("messages",), "instructions": ("instruction", "output", "input")}
    chosen = Format(name, columns.get(name, ("prompt", "completion")))
    try:
        (record,) = records_of([row], chosen, TEMPLATE, named)
        token_batches(gpt_like(), [record, "one two three"], sequence_length=2)
    except ValueError as error:
        assert "\n" not in str(error) and ": expected " in str(error)
        return
    if isinstance(record, Record):
        assert isinstance(record.answered, bool)
