"""Records for chat models: the format that the columns of a dataset have, and the record of each row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_cod.io.arguments import checked
from hf_cod.io.reading import parse_json
from hf_cod.io.schema import brief

# Format -> columns that it requires; the order is that of the messages.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "conversations": (("messages",), ("conversations",)),
    "prompts and completions": (("prompt", "completion"),),
    "instructions": (("instruction", "output"), ("instruction", "response")),
}
# Columns with which the conversation of an instruction may continue.
INPUTS = ("input", "context")
# Names of roles in ShareGPT's files -> the names of chat templates.
SHARE_GPT = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
KNOWN = "messages; conversations; prompt and completion; instruction and output or response; or text"

Message = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """What the rows of a dataset are read as.

    Attributes:
        name: key of `FORMATS`, or "text".
        columns: the columns that are read.
        left_out: columns of records that are not read.
    """

    name: str
    columns: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def told(self) -> list[str]:
        """Notes for the report; none for plain text that is all there is."""
        read = f"({'columns' if len(self.columns) > 1 else 'column'} {', '.join(self.columns)})"
        if self.name != "text":
            return [f"the text was read as {self.name} {read}"]
        if not self.left_out:
            return []
        return [f"the text was read as plain text {read}; not read: {', '.join(self.left_out)}"]


@checked
@dataclass(frozen=True)
class Record:
    """A conversation, or a prompt with its completion.

    Attributes:
        messages: the whole conversation, each with role and content; empty for a prompt and a completion of text.
        prompt: text or messages before the answer; None for a conversation, in which each turn of the assistant is one.
        completion: text or messages that answer the prompt; None for a conversation.
        tools: JSON schemas of functions, for the chat template.
        template: chat template in place of the tokenizer's.
        options: further variables of the chat template.
        row: number of the row, from 1.
    """

    messages: list[Message] = field(default_factory=list)
    prompt: str | list[Message] | None = None
    completion: str | list[Message] | None = None
    tools: list[Any] | None = None
    template: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    row: int = 1

    @property
    def answered(self) -> bool:
        """Whether there is an answer that is not empty."""
        if isinstance(self.completion, str):
            return bool(self.completion.strip())
        turns = self.messages if self.completion is None else self.completion
        return any(turn["role"] == "assistant" and _says(turn) for turn in turns)


def find_format(columns: Sequence[str], text_column: str) -> Format:
    """The format of a dataset.

    A column that `text_column` names is plain text, except for those of conversations.

    Args:
        columns: the columns of the dataset.
        text_column: the setting of the user.

    Raises:
        ValueError: no such column, and none or several of the formats; names the columns.
    """
    parts = {name: [each for each in choices if set(each) <= {*columns}] for name, choices in FORMATS.items()}
    found = [(name, each) for name, all_ in parts.items() for each in all_]
    chat = [each for (each,) in FORMATS["conversations"]]
    if text_column in columns:
        others = tuple(c for _, each in found for c in each if c != text_column)
        left_out = tuple(dict.fromkeys([*others, *(c for c in INPUTS if others and c in columns and c != text_column)]))
        return Format("conversations" if text_column in chat else "text", (text_column,), left_out)
    if text_column != "text" or not found:
        if text_column != "text":
            raise ValueError(f"text_column: expected one of {', '.join(columns)}, got {text_column!r}")
        raise ValueError(
            f"text_column: expected the column of plain text, or a file with the columns {KNOWN}; got the columns "
            f"{', '.join(columns)}"
        )
    if len(found) > 1:
        raise ValueError(
            f"text_column: expected columns of one format, got {' and '.join(name for name, _ in found)} (columns "
            f"{', '.join(columns)}); name the column of messages or of plain text, or remove columns"
        )
    ((name, read),) = found
    more_columns = [c for c in INPUTS if name == "instructions" and c in columns]
    return Format(name, (*read, *more_columns, *(["tools"] if "tools" in columns else [])))


def records_of(
    rows: Iterable[Mapping[str, Any]], chosen: Format, template: str | None, named: bool
) -> Iterator[Record | str]:
    """The records of rows.

    Args:
        rows: the rows of a dataset.
        chosen: their format.
        template: chat template in place of the tokenizer's.
        named: whether the user named the column, whose strings are then plain text.

    Raises:
        ValueError: a row that is not of this format; gives its number.
    """
    for number, row in enumerate(rows, 1):
        first = row.get(chosen.columns[0])
        if named and isinstance(first, str) and not first.lstrip().startswith("["):
            yield first
            continue
        try:
            yield Record(**_parts(row, chosen), template=template, row=number, **_beside(row))
        except ValueError as error:
            raise ValueError(f"text: expected {chosen.name}, got in row {number} {error}") from error


def _parts(row: Mapping[str, Any], chosen: Format) -> dict[str, Any]:
    if chosen.name == "conversations":
        return {"messages": _messages(row.get(chosen.columns[0]), chosen.columns[0])}
    if chosen.name == "instructions":
        asked, answer = (_string(row.get(column), column) for column in chosen.columns[:2])
        given = [_string(row.get(column), column) for column in INPUTS if column in chosen.columns]
        content = "\n\n".join([asked, *filter(None, given)])
        prompt, completion = [{"role": "user", "content": content}], [{"role": "assistant", "content": answer}]
        return {"messages": [*prompt, *completion], "prompt": prompt, "completion": completion}
    values = [_loaded(row.get(column)) for column in ("prompt", "completion")]
    if not all(map(_of_messages, values)):
        values = [row.get(column) for column in ("prompt", "completion")]  # text that is JSON is text
    if not any(isinstance(value, list) for value in values):
        texts = [_string(value, column) for value, column in zip(values, ("prompt", "completion"), strict=True)]
        return {"prompt": texts[0], "completion": texts[1]}
    first, second = (_messages(v, column) for v, column in zip(values, ("prompt", "completion"), strict=True))
    return {"messages": [*first, *second], "prompt": first, "completion": second}


def _beside(row: Mapping[str, Any]) -> dict[str, Any]:
    tools, options = (_loaded(row.get(name)) for name in ("tools", "chat_template_kwargs"))
    if not (tools is None or isinstance(tools, list)):
        raise ValueError(f"{brief(tools)} as tools, which are a list of JSON schemas")
    if not (options is None or isinstance(options, dict)):
        raise ValueError(f"{brief(options)} as chat_template_kwargs, which are a dict")
    return {"tools": _without_none(tools) or None, "options": _without_none(options) or {}}


def _messages(value: Any, column: str) -> list[Message]:
    """A list of messages with role and content, in the terms of chat templates."""
    value = _loaded(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{brief(value)} in column {column}, which is no list of messages")
    return [_message(each) for each in value]


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"the message {brief(value)}, which is no dict")
    found = {name: _without_none(each) for name, each in value.items() if each is not None}
    if "from" in found and "role" not in found:
        speaker = found.pop("from")
        found = {"role": SHARE_GPT.get(speaker, speaker) if isinstance(speaker, str) else speaker, **found}
        found |= {"content": found.pop("value")} if "value" in found else {}
    if found.get("role") == "assistant" or {"content", "value"} & {*value}:
        found.setdefault("content", "")  # of a call of tools, or null
    if not isinstance(found.get("role"), str) or not isinstance(found.get("content"), str | list):
        raise ValueError(f"the message {brief(value)}, which has no role and content")
    return found


def _loaded(value: Any) -> Any:
    """Messages, tools and options that are stored as JSON, as in a CSV file."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return parse_json(value, "text")
    except ValueError:
        return value


def _of_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, Mapping) for each in value)


def _string(value: Any, column: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{brief(value)} in column {column}, which is no text")
    return value or ""


def _without_none(value: Any) -> Any:
    """Without the entries that datasets adds where other rows have them."""
    if isinstance(value, Mapping):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


def _says(turn: Message) -> bool:
    content = turn["content"]
    return bool(content.strip() if isinstance(content, str) else content) or bool(turn.get("tool_calls"))
