"""Answers of a model to batches of prompts, by generation with a KV cache; the same for any batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hf_cod.analysis.generation.prompts import padded_left
from hf_cod.analysis.generation.settings import GenerationSettings
from hf_cod.io.files import fingerprint
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.stack import DecoderLayers


class Decoder:
    """Answers prompts with the model as it is at the time of the call.

    The model's own generation config, such as a repetition penalty, has no effect.

    Args:
        stack: the layers of the model.
        tokenizer: its tokenizer, for the tokens that end an answer and that pad.
        settings: number of tokens, temperature and seed.

    Raises:
        ValueError: no token ends an answer, or the model does not generate text.
    """

    def __init__(self, stack: DecoderLayers, tokenizer: Any, settings: GenerationSettings) -> None:
        model: Any = stack.model
        if (
            not (callable(getattr(model, "can_generate", None)) and model.can_generate())
            or model.config.is_encoder_decoder
        ):
            raise ValueError(f"tasks: expected a causal language model, got {type(model).__name__}")
        self._stack, self._settings = stack, settings
        self.ends = _ends(model, tokenizer)
        if not self.ends:
            raise ValueError("tokenizer: expected an end-of-text token, which ends an answer, got none")
        found = tokenizer.pad_token_id
        self.padding: int = self.ends[0] if found is None else int(found)

    @torch.no_grad()
    def answers(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[list[int]]:
        """The tokens of each answer, up to and with the one that ends it.

        Args:
            prompts: tokens of each prompt.
            numbers: their numbers, by which answers are sampled.
        """
        generated = self._generate(padded_left(prompts, self.padding), numbers, self._settings.max_new_tokens).sequences
        rows = generated[:, max(map(len, prompts)) :].tolist()
        return [self._cut(row) for row in rows]

    @torch.no_grad()
    def padding_changes(self, prompt: Sequence[int]) -> bool:
        """Whether padding on the left changes what the model predicts, as without positions or masks of its own."""
        longer = [*prompt, *prompt]
        both = padded_left([prompt, longer], self.padding)
        alone = self._generate(padded_left([prompt], self.padding), [0], 1).logits[0][0]
        padded = self._generate(both, [0, 1], 1).logits[0][0]
        return bool((alone - padded).abs().max() > torch.finfo(alone.dtype).eps ** 0.5 * alone.abs().max())

    def _cut(self, row: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(row) if token in self.ends), len(row))
        return row[:end]

    def _generate(self, batch: dict[str, Tensor], numbers: Sequence[int], new: int) -> Any:
        model: Any = self._stack.model
        chosen = GenerationConfig(
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.ends,
            pad_token_id=self.padding,
            return_dict_in_generate=True,
            output_logits=new == 1,
        )
        sampled = [_Noise(self._settings, numbers)] if self._settings.temperature > 0 else []
        batch = to_device(batch, execution_device(model))
        with _generation_config(model, chosen):
            return model.generate(**batch, logits_processor=LogitsProcessorList(sampled))


class _Noise(LogitsProcessor):
    """Adds Gumbel noise, so that the most probable token is a sample of softmax(logits / temperature) (Gumbel-max).

    Each prompt has a generator of its own: its answer does not depend on the batch, and models without a layer get the
    same noise as the intact model.
    """

    def __init__(self, settings: GenerationSettings, numbers: Sequence[int]) -> None:
        self.temperature = settings.temperature
        seeds = [int(fingerprint("answer", settings.seed, number)[:12], 16) for number in numbers]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (S, V) with noise."""
        size, tiny = scores.shape[-1], torch.finfo(torch.float64).tiny
        drawn = [torch.rand(size, generator=each, dtype=torch.float64) for each in self.generators]
        noise = -(-torch.stack(drawn).clamp(min=tiny).log()).log()
        return scores.double() / self.temperature + noise.to(scores.device)


@contextmanager
def _generation_config(model: Any, chosen: GenerationConfig) -> Iterator[None]:
    own = model.generation_config
    model.generation_config = chosen
    try:
        yield
    finally:
        model.generation_config = own


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the model's generation config, and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return [*dict.fromkeys(int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None)]
