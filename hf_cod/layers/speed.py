"""Speed of a model: tokens per second of prompt processing (prefill) and of generation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hf_cod.io.display import quoted
from hf_cod.layers.devices import execution_device
from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.stock_four_bit import as_found

# Number of measured rounds, tokens generated in each, and the default length of the prompt: with these a model of 135M
# parameters takes a few seconds on one core.
ROUNDS = 3
NEW_TOKENS = 8
PROMPT_TOKENS = 128


@dataclass(frozen=True)
class ModelSpeed:
    """Speed of one model, round by round.

    Attributes:
        prompt_tokens: length of the prompt.
        prompt: tokens of the prompt processed per second.
        generation: tokens after the first one generated per second, one by one; empty for a model that does not
            generate.
        generation_error: the error of a model that has `generate`, which fails; else None.
    """

    prompt_tokens: int
    prompt: list[float]
    generation: list[float]
    generation_error: str | None = None

    def medians(self) -> dict[str, Any]:
        """Medians over rounds for reports: "prompt" and "generation" (None if there is none) in tokens per second, with
        the conditions "prompt_tokens" and "threads" (of the CPU), and "generation_error" if generation fails.
        """
        return {
            **({} if self.generation_error is None else {"generation_error": self.generation_error}),
            "prompt": statistics.median(self.prompt),
            "generation": statistics.median(self.generation) if self.generation else None,
            "prompt_tokens": self.prompt_tokens,
            "threads": torch.get_num_threads(),
        }


def measure_speed(
    models: Mapping[str, DecoderLayers], prompt: Tensor, rounds: int = ROUNDS, new_tokens: int = NEW_TOKENS
) -> dict[str, ModelSpeed]:
    """Measures models in turns. In each round each model processes one prompt and, if it can generate, continues it
    greedily with a KV cache. One round for warm-up comes first.

    Because models take turns, their speeds can be compared on a busy machine as well: round by round, or by medians.
    Models are not changed. A model whose `generate` fails processes prompts alone; if memory is exhausted, the error is
    raised, because it says nothing about the model.

    Args:
        models: name -> layers of a model; the full model is measured.
        prompt: token ids (1, T); cut at its beginning if a model has no positions for all of it.
        rounds: number of measured rounds.
        new_tokens: number of timed tokens after the first one, which the pass over the prompt gives.
    """
    prompt = prompt[:, -_most_tokens(models, new_tokens) :]
    seconds: dict[str, list[tuple[float, float | None]]] = {name: [] for name in models}
    failed: dict[str, str] = {}
    with ExitStack() as left:
        for stack in models.values():
            left.enter_context(as_found(stack.model))
        for tokens in (1, *[new_tokens] * rounds):
            for name, stack in models.items():
                own = prompt.to(execution_device(stack.model))
                with evaluation_mode(stack, repacking=True), torch.no_grad():
                    try:
                        reading = _seconds(stack.model, own, 0 if name in failed else tokens)
                    except (MemoryError, torch.OutOfMemoryError):
                        raise
                    except Exception as error:  # whatever transformers raises for a model that its cache does not fit
                        if seconds[name]:
                            raise
                        failed[name], reading = quoted(error), _seconds(stack.model, own, 0)
                    seconds[name].append(reading)
    return {
        name: ModelSpeed(
            prompt.shape[1],
            [prompt.shape[1] / reading for reading, _ in found[1:]],
            [1 / token for _, token in found[1:] if token is not None],
            failed.get(name),
        )
        for name, found in seconds.items()
    }


def _most_tokens(models: Mapping[str, DecoderLayers], new_tokens: int) -> int:
    """Maximum length of a prompt that leaves positions for the generated tokens."""
    limits = [getattr(stack.config, "max_position_embeddings", None) or 1 << 30 for stack in models.values()]
    return max(1, min(limits) - new_tokens - 1)


def _seconds(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float | None]:
    """Seconds for processing the prompt, and per generated token after the first one, if any is to be generated."""
    two_stacks = getattr(model.config, "is_encoder_decoder", False)
    if not new_tokens or not model.can_generate():
        start = time.perf_counter()
        more = {"decoder_input_ids": prompt[:, :1]} if two_stacks else {}
        model(prompt, **more)[0].flatten()[-1].item()  # item() waits for the device
        return time.perf_counter() - start, None
    clock = _Clock()
    with _greedy(model, 1 + new_tokens):
        begin = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock)
    start, first, *_, last = clock.times
    # The encoder of an encoder-decoder has read the prompt before the first call.
    start = begin if two_stacks else start
    return first - start, (last - first) / new_tokens


class _Clock(BaseStreamer):
    """Records when `generate` passes the prompt, before it starts, and when it passes each computed token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@contextmanager
def _greedy(model: Any, count: int) -> Iterator[None]:
    """Within the block the model generates exactly `count` tokens, whatever its own generation settings: greedily,
    without beam search, and without an end-of-sequence token.
    """
    own = model.generation_config
    starts = {name: getattr(own, name) for name in ("bos_token_id", "decoder_start_token_id")}
    model.generation_config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0, **starts)
    try:
        yield
    finally:
        model.generation_config = own


Speeds = dict[str, dict[str, Any]]
"""Name of a model -> result of `ModelSpeed.medians`."""


def speeds_of(models: Mapping[str, DecoderLayers], batches: Sequence[Mapping[str, Any]]) -> Speeds:
    """Speeds of models for reports, measured in turns on the first sample (at most `PROMPT_TOKENS` tokens of it)."""
    prompt = batches[0]["input_ids"][:1, :PROMPT_TOKENS]
    return {name: found.medians() for name, found in measure_speed(models, prompt).items()}
