"""Estimates the peak memory of fine-tuning by running two steps on fake tensors, which have no contents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from hf_cod.io.display import one_line
from hf_cod.training.owlore.increment import Increment
from hf_cod.training.owlore.optimizer import OwLoreAdamW
from hf_cod.training.owlore.sampling import LayerSampler
from hf_cod.training.owlore.settings import OwLoreSettings
from hf_cod.training.runs.memory import LiveStorages, Memory, gradients_counted, state_of, train_steps
from hf_cod.training.runs.methods import METHODS, make_optimizer


def estimate_memory(
    config: Any,
    method: str,
    settings: OwLoreSettings,
    *,
    micro_batch_size: int,
    sequence_length: int,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    autocast: bool = False,
    accumulation: int = 1,
    max_grad_norm: float = 1.0,
    lora_rank: int = 16,
    trust_remote_code: bool = False,
) -> Memory:
    """Peak memory of two training steps of a causal language model, by part.

    Each operation of model, method and optimizer runs on fake tensors, which have a size and no contents, so the same
    code is counted as in real training. Not included: workspace inside kernels, fragmentation of the allocator, and the
    device's own context.

    For methods that sample layers, the estimate is that of the worst sample: the first layer, which extends the
    backward pass through the full model, and the last layers, whose gradients are held longest. OwLore adapters count
    with the maximum rank of their folded updates. If their peak is in the pass that finds their bases, there is no
    optimizer state yet.

    Args:
        config: the model's config.
        method: a name of `METHODS`.
        settings: settings of methods that sample layers or project gradients.
        micro_batch_size: samples per forward pass.
        sequence_length: tokens per sample.
        dtype: dtype of the weights.
        checkpointing: compute the activations of a layer again in the backward pass.
        autocast: run the forward pass under bfloat16 autocast.
        accumulation: forward passes per optimizer step.
        max_grad_norm: norm that gradients are clipped to; 0: no clipping.
        lora_rank: rank of the method lora.
        trust_remote_code: whether a model's own code may run.

    Raises:
        ValueError: the config is that of quantized or packed weights, which a model from a config does not have; the
            forward pass requires the contents of tensors, such as that of DBRX, which loops over the tokens of each
            expert in code of its own.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "config: expected that of plain weights, got quantized or packed ones, whose memory is not estimated; the "
            "estimate of the original model is an upper bound"
        )
    with torch.device("meta"):
        model = _model_of(config)(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained, how = METHODS[method].setup(model, None, settings, 0.0, lora_rank)
    fake = FakeTensorMode()
    fill_adapters(trained)
    _make_fake(trained, fake)
    optimizer = make_optimizer(trained, how, 0.0)
    take_worst_draw(optimizer)
    with _failing_clearly(model), fake, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        ids = torch.zeros((micro_batch_size, sequence_length), dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids.clone()}
        memory = count_memory(trained, optimizer, batch, accumulation=accumulation, max_grad_norm=max_grad_norm)
    if isinstance(optimizer, OwLoreAdamW) and settings.deselected == "keep":
        return replace(memory, optimizer_state=_state_of_all(optimizer))
    return memory


def _model_of(config: Any) -> Callable[..., Any]:
    """What builds the model that finetune trains: of a model of text and images the whole of it, which reads text.

    Raises:
        ValueError: neither a causal language model nor one of text and images.
    """
    kind, code = type(config), getattr(config, "auto_map", None) or {}
    if not getattr(config, "is_encoder_decoder", False):
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING or AutoModelForCausalLM.__name__ in code:
            return AutoModelForCausalLM.from_config
        if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return AutoModelForImageTextToText.from_config
    raise ValueError(f"model: expected a causal language model, got the type {config.model_type!r}")


@contextmanager
def _failing_clearly(model: nn.Module) -> Iterator[None]:
    """Says of an error on fake tensors what was expected of the model; torch would also log a traceback."""
    log = logging.getLogger(FakeTensorMode.__module__)
    before, log.disabled = log.disabled, True
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            "model: expected a forward pass that does not depend on the contents of tensors, to estimate memory, got "
            f"that of {type(model).__name__}: {one_line(error)}"
        ) from error
    finally:
        log.disabled = before


def count_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    *,
    accumulation: int = 1,
    max_grad_norm: float = 1.0,
) -> Memory:
    """Counts the memory of two training steps on fake tensors; see `train_steps` for the arguments.

    The peak is in the last forward and backward pass of the second step, which starts with the optimizer's state and
    the gradients of earlier passes; or, with OwLore adapters, in the first pass, which finds their bases from inputs
    and gradients of whole matrices. No other pass is run: values do not matter, so gradients are made without one.
    """
    config: Any = getattr(model, "config", None)
    counter = LiveStorages(getattr(config, "vocab_size", None))
    counter.add([*model.parameters(), *model.buffers()], "weights")
    counter.add(batch.values())

    def entered(phase: str) -> None:
        counter.add(state_of(optimizer), "optimizer state")
        counter.phase = phase

    with gradients_counted(model, counter), counter:
        if any(isinstance(module, Increment) and module.searching for module in model.modules()):
            model.train()
            model(**batch).loss.backward()
        else:
            make_gradients(model)
        entered("update")
        optimizer.step()
        optimizer.zero_grad()
        entered("activations")
        if accumulation > 1:
            make_gradients(model)
        train_steps(model, optimizer, batch, steps=1, max_grad_norm=max_grad_norm, entered=entered)
    return counter.memory()


def make_gradients(model: nn.Module) -> None:
    """Accumulates a gradient in each trainable parameter, as a backward pass does."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.backward(torch.zeros_like(parameter))


class WorstDraw(LayerSampler):
    """Always samples the layers that take most memory: the first one and the last ones."""

    def draw(self, number: int) -> list[int]:
        """The same layers for every number."""
        possible = [index for index, p in enumerate(self.probabilities) if p > 0]
        return [possible[0], *possible[len(possible) - self.n_active + 1 :]]


def take_worst_draw(optimizer: torch.optim.Optimizer) -> None:
    """Makes an OwLoreAdamW train the layers that take most memory; other optimizers are left unchanged."""
    if isinstance(optimizer, OwLoreAdamW):
        sampler = optimizer.sampler
        optimizer.sampler = WorstDraw(sampler.probabilities, sampler.n_active, sampler.seed, floor=0.0)
        optimizer._activate()


def fill_adapters(model: nn.Module) -> None:
    """Pads OwLore adapters to their maximum size, reached late in training; their outputs do not change."""
    for module in model.modules():
        if isinstance(module, Increment):
            module.fill()


def _state_of_all(optimizer: OwLoreAdamW) -> int:
    """Bytes of the optimizer state once every layer was sampled, assuming layers of the same size."""
    found = {True: 0, False: 0}
    for group in optimizer.param_groups:
        states = [value for p in group["params"] for value in optimizer.state.get(p, {}).values()]
        found[group["layer"] is None] += sum(value.nbytes for value in states if isinstance(value, Tensor))
    return found[True] + found[False] * len(optimizer.layers.layers) // optimizer.settings.n_active


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replaces meta tensors by fake CPU tensors, which use the kernels of a real device, such as fused attention."""
    made: dict[int, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with fake:
                made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _parameter(of(parameter), parameter.requires_grad, made, id(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = of(buffer)


def _parameter(tensor: Tensor, requires_grad: bool, made: dict[int, Tensor], key: int) -> nn.Parameter:
    """One parameter for all modules that share it."""
    if not isinstance(tensor, nn.Parameter):
        made[key] = nn.Parameter(tensor, requires_grad=requires_grad)
    parameter = made[key]
    assert isinstance(parameter, nn.Parameter)
    return parameter
