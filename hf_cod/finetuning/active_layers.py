"""ActiveLayers: the layers that train now; all others are frozen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_cod.decoder_layers import DecoderLayers, find_decoder_layers

logger = logging.getLogger(__name__)


class ActiveLayers:
    """Which parameters belong to which layer, and which of them may train.

    Only what requires a gradient when this is made ever trains; what the caller froze stays frozen.

    Args:
        model: a transformers model, wrapped or not.
        others: names of what trains at all times beside the layers: "norm" (behind the last layer), "embeddings"
            (input and output). Heads of a task always train: a classifier may be new, and is small.

    Attributes:
        layers: of each layer its parameters; one that two layers share belongs to the first.
        always: parameters that train at all times.

    Raises:
        ValueError: no layers found, or sharded parameters (FSDP, DeepSpeed stage 3).
    """

    def __init__(self, model: nn.Module, others: Sequence[str] = ("norm",)) -> None:
        self.model, self.stack = model, find_decoder_layers(model)
        _refuse_shards(model)
        seen: set[int] = set()
        self.layers: list[list[nn.Parameter]] = [_trainable(layer, seen) for layer in self.stack]
        self.always: list[nn.Parameter] = []
        for module in _around(self.stack, others):
            self.always.extend(_trainable(module, seen))
        if not any(self.layers):
            raise ValueError("model: expected layers that can be trained, got frozen or quantized ones; unfreeze them")
        kept = {id(p) for parameters in (*self.layers, self.always) for p in parameters}
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
        self.active: list[int] = [*range(len(self.layers))]
        self._leave_to_us()

    def activate(self, layers: Sequence[int]) -> None:
        """Lets these layers train; freezes the others and frees their gradients."""
        self.active = [*layers]
        for index, parameters in enumerate(self.layers):
            for parameter in parameters:
                parameter.requires_grad_(index in layers)
                if index not in layers:
                    parameter.grad = None

    def end_at_lowest(self) -> None:
        """Lets the backward pass end at the lowest active layer under activation checkpointing, too.

        transformers then makes the embeddings' output require a gradient, which checkpoints of the reentrant kind need,
        and which takes the backward pass through every layer. Where they are of the other kind, that is undone.
        """
        base: Any = self.stack.model
        if not getattr(base, "_require_grads_hooks", None):
            return
        checkpoint = getattr(self.stack[0], "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, partial) and checkpoint.keywords.get("use_reentrant") is False:
            base.disable_input_require_grads()
            logger.info("the embeddings' output needs no gradient: the backward pass ends at the lowest active layer")

    def _leave_to_us(self) -> None:
        """Tells DistributedDataParallel to leave the layers alone, before it wraps the model.

        It fixes what it averages when it wraps, with room for every gradient, and stops at a layer that is frozen
        later. So gradients of layers are averaged by hooks, each when it is whole and before anyone clips it; what is
        trained at all times stays with DDP.
        """
        ours = {id(p) for parameters in self.layers for p in parameters}
        for parameters in self.layers:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(_average)
        names = [name for name, p in self.model.named_parameters(remove_duplicate=False) if id(p) in ours]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)


def _average(parameter: nn.Parameter) -> None:
    """The mean of a gradient over all processes; of one that holds several micro-batches too, whatever came before."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        assert parameter.grad is not None
        torch.distributed.all_reduce(parameter.grad.div_(torch.distributed.get_world_size()))


def _trainable(module: nn.Module, seen: set[int]) -> list[nn.Parameter]:
    """Parameters that require a gradient and were not seen before."""
    found = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
    seen.update(id(p) for p in found)
    return found


def _around(stack: DecoderLayers, others: Sequence[str]) -> list[nn.Module]:
    """Heads of a task, and the modules around the layers that `others` names, where the model has them."""
    modules = [*stack.task_heads.values()] + ([stack.final_norm] if "norm" in others else [])
    if "embeddings" in others:
        modules += [stack.embeddings, stack.head]
    return [module for module in modules if module is not None]


def _refuse_shards(model: nn.Module) -> None:
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "model: expected whole parameters, got sharded ones (FSDP, DeepSpeed); train replicas (DDP) instead, for "
            "which a few active layers leave room"
        )
