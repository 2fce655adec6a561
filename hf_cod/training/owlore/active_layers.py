"""ActiveLayers: the layers that train now; all others are frozen."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from hf_cod.layers.replicas import average, processes, refuse_wrapped
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.training.owlore.increment import Increment

logger = logging.getLogger(__name__)

ANCHOR = "owlore_ddp_anchor"
# Share of a model's weights that is worth a warning when it never trains (position embeddings are less).
SHARE_TOLD = 0.01
# Attribute of a model: of each parameter that an optimizer found trainable, whether it trains now.
TRAINS = "_owlore_trains"
# Forward hooks of transformers and of PEFT that make the embeddings' output require a gradient.
_INPUT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


class ActiveLayers:
    """Which parameters belong to which layer, and which of them may train.

    Only what requires a gradient when this is made ever trains; what the caller froze stays frozen. What an earlier
    one froze and nobody has touched since counts as trainable (`release`).

    Args:
        model: a transformers model, inside PEFT or not.
        others: names of what trains at all times beside the layers: "norm" (behind the last layer), "embeddings"
            (input and output). Heads of a task always train (a classifier may be new, and is small), and so does
            what PEFT's `modules_to_save` names.

    Attributes:
        layers: of each layer its parameters; one that two layers share belongs to the first.
        always: parameters that train at all times.

    Raises:
        ValueError: no layers found, sharded parameters (FSDP, DeepSpeed), or DistributedDataParallel around them.
    """

    def __init__(self, model: nn.Module, others: Sequence[str] = ("norm",)) -> None:
        self.model, self.stack = model, find_decoder_layers(model)
        refuse_shards(model)
        refuse_wrapped(model, [p for layer in self.stack for p in layer.parameters()])
        release(model)
        self._names = {name: p for name, p in self.stack.model.named_parameters() if p.requires_grad}
        seen: set[int] = set()
        self.layers: list[list[nn.Parameter]] = [_trainable(layer, seen) for layer in self.stack]
        self.always: list[nn.Parameter] = []
        for module in (*_around(self.stack, others), *_saved_with_adapters(model)):
            self.always.extend(_trainable(module, seen))
        if not any(self.layers):
            raise ValueError("model: expected layers that can be trained, got frozen or quantized ones; unfreeze them")
        if not _has_adapters(model):
            warn_of_untrained(self.stack, [p for parameters in (*self.layers, self.always) for p in parameters])
        kept = {id(p) for parameters in (*self.layers, self.always) for p in parameters}
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
        self.active: list[int] = [*range(len(self.layers))]
        self._leave_to_us()

    @property
    def other_adapters(self) -> bool:
        """Whether something in the layers is trained by adapters that are not OwLore's, such as LoRA's."""
        ours = {id(p) for parameters in self.layers for p in parameters}
        adapted = (m for layer in self.stack for m in layer.modules() if hasattr(m, "base_layer"))
        return any(id(p) in ours for m in adapted if not hasattr(m, "owlore_increment") for p in m.parameters())

    def activate(self, layers: Sequence[int]) -> None:
        """Lets these layers train; freezes the others and frees their gradients."""
        self.active = [*layers]
        for index, parameters in enumerate(self.layers):
            for parameter in parameters:
                parameter.requires_grad_(index in layers)
                if index not in layers:
                    parameter.grad = None
        setattr(self.stack.model, TRAINS, {name: p.requires_grad for name, p in self._names.items()})

    def end_at_lowest(self) -> None:
        """Lets the backward pass end at the lowest active layer under activation checkpointing, too.

        transformers then makes the embeddings' output require a gradient, which checkpoints of the reentrant kind need,
        and which takes the backward pass through every layer. Where they are of the other kind, that is undone.
        """
        base: Any = self.stack.model
        checkpoint = getattr(self.stack[0], "_gradient_checkpointing_func", None)
        if not isinstance(checkpoint, partial) or checkpoint.keywords.get("use_reentrant") is not False:
            return
        hooks = getattr(self.stack.embeddings, "_forward_hooks", {})
        found = [key for key, hook in hooks.items() if getattr(hook, "__name__", "") in _INPUT_HOOKS]
        if getattr(base, "_require_grads_hooks", None):
            base.disable_input_require_grads()
        for key in found:  # it forgets those of all calls but the last; TRL and PEFT call for them, too
            hooks.pop(key, None)
        if found:
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
                hook_gradient(parameter, _average)
        names = [name for name, p in self.model.named_parameters(remove_duplicate=False) if id(p) in ours]
        for name, module in self.model.named_modules():
            if isinstance(module, Increment):  # its buffers change their shapes, on all processes alike
                names.extend(f"{name}.{key}" for key, _ in module.named_buffers())
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)
        if processes() > 1 and not self.always:
            # DDP refuses a model of which it has nothing to average; this has no part in the loss.
            self.model.register_parameter(ANCHOR, nn.Parameter(torch.zeros((), device=_device(self.model))))


def warn_of_untrained(stack: DecoderLayers, trained: Sequence[Tensor]) -> None:
    """Warns where matrices never train that are neither embeddings nor head, such as those of an encoder, or experts.

    Args:
        stack: the layers.
        trained: what trains in its turn.
    """
    known = {id(p) for p in trained}
    known.update(id(p) for m in (stack.embeddings, stack.head) if m is not None for p in m.parameters())
    # What a user froze is meant; what is quantized was never asked.
    matrices = {
        n: p for n, p in stack.model.named_parameters() if p.ndim > 1 and (p.requires_grad or not p.is_floating_point())
    }
    never = {name: p.numel() for name, p in matrices.items() if id(p) not in known}
    share = sum(never.values()) / max(1, sum(p.numel() for p in matrices.values()))
    if share >= SHARE_TOLD:
        places = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in never})
        logger.warning(
            "model: %.0f %% of its weights never train: %s%s",
            100 * share,
            ", ".join(places[:5]),
            ", ..." * (len(places) > 5),
        )


def release(model: nn.Module) -> None:
    """Lets train again what an earlier optimizer froze in this model, and takes its hooks away.

    Where somebody has changed since what trains (PEFT, which puts on another adapter), that holds.
    """
    base: Any = find_decoder_layers(model).model
    unhook_gradients(base.parameters())
    parameters = dict(base.named_parameters())
    left = {name: p for name, p in parameters.items() if name in getattr(base, TRAINS, {})}
    now = {name: p.requires_grad for name, p in left.items()}
    if now == getattr(base, TRAINS, {}):
        for parameter in left.values():
            parameter.requires_grad_(True)
    elif any(now.values()) and not all(now.values()):
        logger.warning(
            "model: what trains was changed since an earlier OwLoreAdamW froze layers; what is frozen stays so: call "
            "its release() before you freeze or unfreeze parameters"
        )
    for module in base.modules():
        for name, increment in getattr(module, "owlore_increment", {}).items():
            if increment.resting and name in module.active_adapters:
                increment.release()
    setattr(base, TRAINS, {})


def _average(parameter: nn.Parameter) -> None:
    """The mean of a gradient over all processes; of one that holds several micro-batches too, whatever came before."""
    assert parameter.grad is not None
    average(parameter.grad)


def _device(model: nn.Module) -> torch.device:
    return next(p.device for p in model.parameters())


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


def _has_adapters(model: nn.Module) -> bool:
    return any(hasattr(m, "base_layer") for m in model.modules())


def _saved_with_adapters(model: nn.Module) -> list[nn.Module]:
    """The modules that PEFT trains and saves whole beside an adapter, such as a classifier's head."""
    return [m for m in model.modules() if isinstance(getattr(m, "modules_to_save", None), nn.ModuleDict)]


_HANDLES: Any = WeakIdKeyDictionary()  # parameter -> handle of our hook on it


def hook_gradient(parameter: nn.Parameter, hook: Callable[[Any], None]) -> None:
    """Calls `hook` with the parameter whenever a backward pass has its gradient; an earlier hook of ours goes."""
    unhook_gradients([parameter])
    _HANDLES[parameter] = parameter.register_post_accumulate_grad_hook(hook)


def unhook_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Takes our hooks away."""
    for parameter in parameters:
        handle = _HANDLES.pop(parameter, None)
        if handle is not None:
            handle.remove()


_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
SHARDED = (
    "model: expected whole parameters, got sharded ones (FSDP, DeepSpeed of any stage); train replicas (DDP) instead, "
    "for which a few active layers leave room"
)


def refuse_shards(model: nn.Module) -> None:
    """Raises where parameters are shards, or will be.

    Raises:
        ValueError: FSDP 1 or 2, DeepSpeed, or accelerate is about to shard what it prepares.
    """
    planned = is_initialized() and AcceleratorState().distributed_type in _SHARDING
    wrapped = any(isinstance(m, FullyShardedDataParallel) for m in model.modules())
    if planned or wrapped or any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(SHARDED)
