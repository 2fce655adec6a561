"""How fast a model is: tokens a second of a prompt that it reads, and of text that it generates."""

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

from hf_cod.layers.devices import execution_device
from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.stock_four_bit import as_found

# Rounds that count, and tokens generated in each; and tokens that a prompt should have where nothing else says so: with
# these a model of 135M parameters takes a few seconds on one core.
ROUNDS = 3
NEW_TOKENS = 8
PROMPT_TOKENS = 128


@dataclass(frozen=True)
class ModelSpeed:
    """Speed of one model, round by round.

    Attributes:
        prompt_tokens: length of the prompt.
        prompt: tokens of it that are read in a second.
        generation: tokens behind the first one that are generated in a second, one by one; empty for a model that
            does not generate.
    """

    prompt_tokens: int
    prompt: list[float]
    generation: list[float]

    def medians(self) -> dict[str, float | None]:
        """Over rounds, as reports tell it: "prompt" and "generation" (None where there is none), tokens a second; and
        what they depend on, "prompt_tokens" and the "threads" of the CPU.
        """
        return {
            "prompt": statistics.median(self.prompt),
            "generation": statistics.median(self.generation) if self.generation else None,
            "prompt_tokens": self.prompt_tokens,
            "threads": torch.get_num_threads(),
        }


def measure_speed(
    models: Mapping[str, DecoderLayers], prompt: Tensor, rounds: int = ROUNDS, new_tokens: int = NEW_TOKENS
) -> dict[str, ModelSpeed]:
    """Lets models take turns: each round, each of them reads one prompt and goes on from there, greedily and with a
    KV cache, if it can generate; else it reads alone. What comes before the first round warms up.

    What is measured side by side can be compared on a busy machine, too: round by round, or by medians. Models are left
    as they were.

    Args:
        models: name -> layers of a model, which is measured as a whole.
        prompt: token ids (1, T); its end is used where a model has no positions for more.
        rounds: that count.
        new_tokens: that are timed behind the first one, which the prompt's pass gives.
    """
    prompt = prompt[:, -_most_tokens(models, new_tokens) :]
    seconds: dict[str, list[tuple[float, float | None]]] = {name: [] for name in models}
    with ExitStack() as left:
        for stack in models.values():
            left.enter_context(as_found(stack.model))
        for tokens in (1, *[new_tokens] * rounds):
            for name, stack in models.items():
                with evaluation_mode(stack, repacking=True), torch.no_grad():
                    seconds[name].append(_seconds(stack.model, prompt.to(execution_device(stack.model)), tokens))
    return {
        name: ModelSpeed(
            prompt.shape[1],
            [prompt.shape[1] / reading for reading, _ in found[1:]],
            [1 / token for _, token in found[1:] if token is not None],
        )
        for name, found in seconds.items()
    }


def _most_tokens(models: Mapping[str, DecoderLayers], new_tokens: int) -> int:
    """Of a prompt, so that there are positions for what follows, too."""
    limits = [getattr(stack.config, "max_position_embeddings", None) or 1 << 30 for stack in models.values()]
    return max(1, min(limits) - new_tokens - 1)


def _seconds(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float | None]:
    """Of reading the prompt, and of each token that is generated behind the first one."""
    if not model.can_generate():
        start = time.perf_counter()
        model(prompt)[0].flatten()[-1].item()  # whose value waits for the device
        return time.perf_counter() - start, None
    clock = _Clock()
    with _greedy(model, 1 + new_tokens):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock)
    start, first, *_, last = clock.times
    return first - start, (last - first) / new_tokens


class _Clock(BaseStreamer):
    """Notes when `generate` hands over the prompt, before it begins, and then each token, which it has waited for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@contextmanager
def _greedy(model: Any, count: int) -> Iterator[None]:
    """Within the block the model generates so many tokens whatever its own settings are: it samples nothing, searches
    no beams, and no token ends the text.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = own


Speeds = dict[str, dict[str, float | None]]
"""Name of a model -> what `ModelSpeed.medians` says of it."""


def speeds_of(models: Mapping[str, DecoderLayers], batches: Sequence[Mapping[str, Any]]) -> Speeds:
    """What reports hold of the speed of models: in turns, on the first sample or its beginning."""
    prompt = batches[0]["input_ids"][:1, :PROMPT_TOKENS]
    return {name: found.medians() for name, found in measure_speed(models, prompt).items()}
