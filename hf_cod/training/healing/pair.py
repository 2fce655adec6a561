"""Checks of a student and a teacher before training."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_cod.layers.checks import check_writable, pruned_matrices
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import task_of
from hf_cod.training.healing.matching import Matching, match_layers
from hf_cod.training.healing.settings import HealSettings

# Spaces, capitals, digits, accents, other scripts, line ends: tokenizers with the same vocabulary may differ here.
PROBE = "The quick  brown fox, naïve and 12345.67!\n\tDéjà vu — Ελληνικά, 日本語, done; print('x_1')\n"


def check_pair(
    student: nn.Module, teacher: nn.Module, settings: HealSettings
) -> tuple[DecoderLayers, DecoderLayers, Matching | None]:
    """The layers of both models, and their matching if the loss includes hidden states.

    Raises:
        ValueError: models that are no causal language models; the same model twice; a student whose weights are
            quantized, packed, adapted or offloaded, or whose zeros the method would fill; different vocabularies; with
            `hidden_weight`, hidden states of different widths.
    """
    if student is teacher:
        raise ValueError("teacher: expected another model than the student, got the same; use copy.deepcopy first")
    for field, model in (("student", student), ("teacher", teacher)):
        if isinstance(model, nn.Module) and task_of(model) != "causal_lm":
            raise ValueError(f"{field}: expected a causal language model, got {type(model).__name__}")
    mine, theirs = find_decoder_layers(student), find_decoder_layers(teacher)
    try:
        check_writable(mine, factors=True)
    except ValueError as error:
        raise ValueError(f"student: {error}; heal a model before it is quantized or packed") from error
    check_unwritten(mine.model)
    if settings.method == "owlore-peft" and pruned_matrices(mine):
        raise ValueError(
            "method: expected owlore, lisa, galore, lora or full for a student with zeros, which stay zeros, got "
            "owlore-peft; owlore trains the weights directly instead of adapters"
        )
    sizes = [int(getattr(stack.config, "vocab_size", 0)) for stack in (mine, theirs)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"teacher: expected the student's vocabulary of {sizes[0]} tokens, got {sizes[1]}")
    if not settings.hidden_weight:
        return mine, theirs, None
    widths = [int(stack.config.hidden_size) for stack in (mine, theirs)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"hidden_weight: expected 0 with a teacher of another width than the student's {widths[0]}, because hidden "
            f"states of different widths cannot be compared, got {settings.hidden_weight} and width {widths[1]}"
        )
    return mine, theirs, match_layers(mine, theirs, settings.teacher_layers)


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Checks that both tokenizers map the same text to the same ids.

    Raises:
        ValueError: different vocabularies, or different ids of a probe text; names the first difference.
    """
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        token = min((t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)), key=str)
        ids = [f"as {vocabulary[token]}" if token in vocabulary else "missing" for vocabulary in (mine, theirs)]
        raise ValueError(
            f"teacher: expected the student's tokenizer, with {len(mine)} tokens, {token!r} {ids[0]}, got another with "
            f"{len(theirs)} tokens, {token!r} {ids[1]}; use the model that the student was made from as the teacher"
        )
    cut = [tokenizer(PROBE, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher)]
    if cut[0] != cut[1]:
        place = next((i for i, (a, b) in enumerate(zip(*cut, strict=False)) if a != b), min(map(len, cut)))
        raise ValueError(
            f"teacher: expected the student's tokenizer, which splits a probe text into {len(cut[0])} tokens with "
            f"{cut[0][place : place + 3]} from token {place} on, got {len(cut[1])} with {cut[1][place : place + 3]}"
        )
