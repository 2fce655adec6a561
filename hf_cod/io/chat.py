"""Rendering of records by chat templates, and the tokens of their answers."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from hf_cod.io.display import one_line
from hf_cod.io.records import Message, Record

logger = logging.getLogger(__name__)

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
WAY_OUT = "--chat-template FILE names one with {% generation %} around answers"


def text_of(tokenizer: Any, record: Record) -> str:
    """The text of a record, with all special tokens that its chat template gives.

    Raises:
        ValueError: there is no chat template, or it cannot render the record.
    """
    if isinstance(record.prompt, str):
        return f"{record.prompt}{record.completion}"
    found: str = _render(tokenizer, record, record.messages, tokenize=False)
    return found


@dataclass(frozen=True)
class Answers:
    """How the tokens of answers in conversations are found.

    Attributes:
        template: the chat template that renders; None: the record's or the tokenizer's.
        by: "marks", "marks of TRL" or "prefixes".
        told: a sentence for the report.
    """

    template: str | None
    by: str
    told: str


def find_answers(tokenizer: Any, template: str | None) -> Answers:
    """Chooses how answers are found: by the template's generation marks, by those of TRL's version of the template, or
    by rendering the conversation up to each answer.

    Args:
        tokenizer: a transformers tokenizer.
        template: chat template in place of the tokenizer's.
    """
    own = template or _template_of(tokenizer)
    if own is not None and MARKED.search(own):
        return Answers(None, "marks", "answers are those that the chat template marks")
    training = _template_of_trl(tokenizer, own)
    if training is not None:
        return Answers(training, "marks of TRL", "answers are those that TRL's version of the chat template marks")
    return Answers(None, "prefixes", "answers were found by rendering the conversation up to each of them")


def tokens_of(tokenizer: Any, record: Record, answers: Answers) -> tuple[list[int], list[bool]]:
    """The token ids of a record, and whether each is part of an answer, as TRL's SFTTrainer has them.

    In a conversation, the tokens of the assistant; in a prompt with a completion, the tokens behind those that the
    prompt alone has in common with both.

    Args:
        tokenizer: a transformers tokenizer.
        record: the record.
        answers: result of `find_answers`, for conversations.

    Raises:
        ValueError: there is no chat template or no end-of-text token, the template cannot render the record, or
            answers cannot be found in it.
    """
    if record.prompt is None:
        return _of_conversation(tokenizer, record, answers)
    if isinstance(record.prompt, str):
        end = tokenizer.eos_token
        if end is None:
            raise ValueError("tokenizer: expected an end-of-text token behind completions, got none")
        whole = f"{record.prompt}{record.completion}"
        whole = whole if str(record.completion).endswith(end) else whole + end
        before, ids = (_tokenize(tokenizer, text, record) for text in (record.prompt, whole))
    else:
        before = _ids(_render(tokenizer, record, record.prompt, add_generation_prompt=True))
        ids = _ids(_render(tokenizer, record, record.messages))
    shared = next((i for i, (one, other) in enumerate(zip(before, ids, strict=False)) if one != other), None)
    start = min(len(before), len(ids)) if shared is None else shared
    return ids, [place >= start for place in range(len(ids))]


def _of_conversation(tokenizer: Any, record: Record, answers: Answers) -> tuple[list[int], list[bool]]:
    if not tokenizer.is_fast:
        raise ValueError("tokenizer: expected a fast one, which gives the places of answers, got a slow one")
    if answers.by == "prefixes":
        return _by_prefixes(tokenizer, record)
    marked = _render(tokenizer, record, record.messages, template=answers.template, return_assistant_tokens_mask=True)
    return list(marked["input_ids"]), [bool(each) for each in marked["assistant_masks"]]


def _by_prefixes(tokenizer: Any, record: Record) -> tuple[list[int], list[bool]]:
    """Answers are the text between the conversation up to each answer, with the prompt for it, and with it.

    Raises:
        ValueError: the template renders earlier messages otherwise if others follow.
    """
    whole = text_of(tokenizer, record)
    encoded = tokenizer(whole, add_special_tokens=False, verbose=False)
    mask = [False] * len(encoded["input_ids"])
    for place, turn in enumerate(record.messages):
        if turn["role"] != "assistant":
            continue
        earlier, until = record.messages[:place], record.messages[: place + 1]
        before = _render(tokenizer, record, earlier, tokenize=False, add_generation_prompt=True) if place else ""
        behind = _render(tokenizer, record, until, tokenize=False)
        if not (behind.startswith(before) and whole.startswith(behind)):
            raise ValueError(
                f"chat_template: expected one that renders each answer alike whatever follows, got another at row "
                f"{record.row}; {WAY_OUT}, and TRL, if it is installed, has those of some models"
            )
        # As transformers does for marks: the tokens of the first and of the last character, and those between.
        found = [each for c in range(len(before), len(behind)) if (each := encoded.char_to_token(c)) is not None]
        for token in range(found[0], found[-1] + 1) if found else ():
            mask[token] = True
    return _ids(encoded), mask


def _render(
    tokenizer: Any, record: Record, messages: list[Message], template: str | None = None, **options: Any
) -> Any:
    """`apply_chat_template` with the template, tools and options of the record.

    Raises:
        ValueError: there is no template, or it cannot render the messages.
    """
    template = template or record.template or _template_of(tokenizer)
    if template is None:
        raise ValueError(
            "chat_template: expected a tokenizer with a chat template for conversations, got one without; "
            "--chat-template FILE names one"
        )
    if options.get("tokenize", True):
        options["return_dict"] = True
    try:
        found = tokenizer.apply_chat_template(
            messages, tools=record.tools, chat_template=template, **record.options, **options
        )
        if isinstance(found, str):
            found.encode()  # halves of pairs of UTF-16, which JSON can hold, are no text
        return found
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"chat_template: expected one that renders row {record.row}, got {type(error).__name__}: {one_line(error)}"
        ) from error


def _tokenize(tokenizer: Any, text: str, record: Record) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text: expected text, got in row {record.row} {one_line(error)}") from error
    # verbose=False: what is longer than the model's length is truncated afterwards.
    return _ids(tokenizer(text, verbose=False))


def _ids(encoded: Any) -> list[int]:
    return list(encoded["input_ids"])


def _template_of(tokenizer: Any) -> str | None:
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        found = found.get("default")
    return found or None


def _template_of_trl(tokenizer: Any, template: str | None) -> str | None:
    """TRL's version of a template, which marks answers; None if TRL has none or is not installed."""
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        return None
    before = getattr(tokenizer, "chat_template", None)
    try:
        tokenizer.chat_template = template
        found: str | None = get_training_chat_template(tokenizer)
        return found
    except (TemplateError, TypeError, ValueError, KeyError):  # TRL has none, or the template renders no tools
        return None
    finally:
        tokenizer.chat_template = before
