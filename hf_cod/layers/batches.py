"""The batches that a function runs a model on: given by the user, or made from texts with the model's tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from torch import nn

from hf_cod.io.continuation import split_in_two
from hf_cod.io.masking import mask_tokens
from hf_cod.io.settings import SampleSettings
from hf_cod.io.text import Batch, token_batches
from hf_cod.layers.checks import check_length
from hf_cod.layers.stack import unwrap
from hf_cod.layers.task import MASKED_LM_SUFFIXES

Given = TypeVar("Given", bound=Iterable[Batch])

SAMPLE_FIELDS = tuple(f.name for f in fields(SampleSettings))
# Settings of samples that other settings also have, so that they can be passed without texts.
SHARED_FIELDS = ("seed",)
EITHER = "expected batches, or tokenizer and texts"


def batches_of(
    model: nn.Module,
    batches: Given | None,
    tokenizer: Any,
    texts: Any,
    samples: SampleSettings | None,
    given: Mapping[str, Any],
) -> Given | list[Batch] | None:
    """The given batches, or those of `token_batches` for the given texts; None if neither was passed.

    A masked language model gets labels of masked tokens, an encoder-decoder halves of the samples (`with_labels`), as
    in the commands.

    Args:
        model: the model that runs on the batches.
        batches: the argument of the user.
        tokenizer: the argument of the user; without texts it has no effect.
        texts: the argument of the user.
        samples: how texts are cut; default: `SampleSettings()`.
        given: fields of `SampleSettings`, which override `samples`, among other fields.

    Raises:
        ValueError: both batches and texts, only one of tokenizer and texts, settings of samples without texts, texts
            that are too short, or samples that are too long for the model.
    """
    changed = {name: value for name, value in given.items() if name in SAMPLE_FIELDS}
    check_either(batches, tokenizer, texts)
    if texts is None:
        _check_unused(batches is not None, samples, changed)
        return batches
    settings = replace(samples or SampleSettings(), **changed)
    base = unwrap(model)
    check_length(base, settings.sequence_length)
    return [*with_labels(base, tokenizer, token_batches(tokenizer, texts, settings), settings.seed)]


def with_labels(model: nn.Module, tokenizer: Any, batches: Sequence[Batch], seed: int) -> Sequence[Batch]:
    """Batches of tokens for a loss of the model: those of a masked language model get labels of masked tokens, those of
    an encoder-decoder are split into the input of its encoder and the target of its decoder (`split_in_two`).

    Raises:
        ValueError: the tokenizer of a masked language model has no mask token.
    """
    base: Any = unwrap(model)
    config: Any = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False) and base.main_input_name == "input_ids":
        found = [getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")]
        start = next((token for token in found if token is not None), 0)
        return split_in_two(batches, start, found[-1] if found[-1] is not None else 0)
    return mask_tokens(tokenizer, batches, seed) if type(base).__name__.endswith(MASKED_LM_SUFFIXES) else batches


def required(batches: Given | None) -> Given:
    """The batches, for functions that require them.

    Raises:
        ValueError: there are none.
    """
    if batches is None:
        raise ValueError(f"batches: {EITHER}, got neither")
    return batches


def check_needed(batches: Iterable[Batch] | None, purpose: str) -> None:
    """Checks that there are batches, for a method that requires them.

    Args:
        batches: a list of batches, or None.
        purpose: "for wanda", for example.

    Raises:
        ValueError: there are none.
    """
    if batches is None:
        raise ValueError(f"batches: {EITHER}, {purpose}, got neither")
    if not batches:
        raise ValueError(f"batches: expected at least one {purpose}, got none")


def check_either(batches: Any, tokenizer: Any, texts: Any, field: str = "batches") -> None:
    """Checks that at most one of batches and texts was passed, and texts with a tokenizer.

    A tokenizer beside batches has no effect.

    Raises:
        ValueError: both were passed, or texts without a tokenizer, or a tokenizer alone.
    """
    if texts is not None and batches is not None:
        raise ValueError(f"{field}: {EITHER}, got both")
    if texts is not None and tokenizer is None:
        raise ValueError("tokenizer: expected the model's tokenizer with texts, got none")
    if tokenizer is not None and texts is None and batches is None:
        raise ValueError("texts: expected texts with the tokenizer, or batches, got neither")


def _check_unused(beside_batches: bool, samples: Any, changed: Mapping[str, Any]) -> None:
    """Checks that what applies to texts alone was not passed without texts."""
    names = [*(["samples"] if samples is not None else []), *(n for n in changed if n not in SHARED_FIELDS)]
    if names:
        got = "batches, which are already cut" if beside_batches else "no texts"
        raise ValueError(f"{names[0]}: expected tokenizer and texts, which it applies to, got {got}")
