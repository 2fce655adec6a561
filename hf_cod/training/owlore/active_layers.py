"""ActiveLayers: the layers that currently train; all others are frozen."""

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

from hf_cod.io.module_names import given_names
from hf_cod.layers.input_gradients import release_input_gradients, require_input_gradients
from hf_cod.layers.module_choice import ModuleChoice, choose_modules
from hf_cod.layers.replicas import average, processes, refuse_wrapped
from hf_cod.layers.running_averages import keep_averages, release_averages
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.training.owlore.increment import Increment

logger = logging.getLogger(__name__)

ANCHOR = "owlore_ddp_anchor"
# A warning is logged if at least this share of a model's weights never trains (position embeddings are less).
SHARE_TOLD = 0.01
# Attribute of a model: for each parameter that an optimizer found trainable, whether it currently trains.
TRAINS = "_owlore_trains"
# Forward hooks of transformers and PEFT that make the embeddings' output require a gradient.
_INPUT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


class ActiveLayers:
    """The trainable parameters of each layer, and the layers that currently train.

    Only parameters that require a gradient at construction ever train; parameters that the caller froze stay frozen.
    Parameters that an earlier instance froze count as trainable if they were not changed since (`release`).

    Args:
        model: a transformers model, wrapped by PEFT or not.
        others: names of modules that always train, in addition to the layers: "norm" (the norm after the last layer),
            "embeddings" (input and output). Task heads always train (a classifier may be new, and is small), and so do
            the modules in PEFT's `modules_to_save`.
        settings: `include` and `exclude` choose the matrices of the layers that train, with their biases. Norms train
            in each layer with a chosen matrix. None: all.

    Attributes:
        layers: for each layer, its parameters; a parameter that two layers share belongs to the first.
        always: parameters that always train.
        choice: the chosen matrices.

    Raises:
        ValueError: names that match no matrix, a choice of matrices in a model with adapters, no layers found, sharded
            parameters (FSDP, DeepSpeed), or a model wrapped by DistributedDataParallel.
    """

    def __init__(self, model: nn.Module, others: Sequence[str] = ("norm",), settings: Any = None) -> None:
        self.model, self.stack = model, find_decoder_layers(model)
        refuse_shards(model)
        refuse_wrapped(model, [p for layer in self.stack for p in layer.parameters()])
        self.choice = _chosen(self.stack, settings)
        release(model)
        self._names = {name: p for name, p in self.stack.model.named_parameters() if p.requires_grad}
        left = left_by(self.choice)
        seen = {id(p) for p in left}
        self.layers: list[list[nn.Parameter]] = [_trainable(layer, seen) for layer in self.stack]
        self.always: list[nn.Parameter] = []
        for module in (*_around(self.stack, others), *_saved_with_adapters(model)):
            self.always.extend(_trainable(module, seen))
        if not any(self.layers):
            raise ValueError("model: expected trainable layers, got frozen or quantized ones; unfreeze them")
        if not _has_adapters(model):
            warn_of_untrained(self.stack, [p for parameters in (*self.layers, self.always, left) for p in parameters])
        kept = {id(p) for parameters in (*self.layers, self.always) for p in parameters}
        for parameter in (p for p in model.parameters() if id(p) not in kept):
            parameter.requires_grad_(False)
        self._remember()
        self.active: list[int] = [*range(len(self.layers))]
        self._leave_to_us()
        require_input_gradients(self.stack)
        keep_averages(self.stack.model)

    @property
    def other_adapters(self) -> bool:
        """Whether the layers have trainable adapters of another kind than OwLore, such as LoRA."""
        ours = {id(p) for parameters in self.layers for p in parameters}
        adapted = (m for layer in self.stack for m in layer.modules() if hasattr(m, "base_layer"))
        return any(id(p) in ours for m in adapted if not hasattr(m, "owlore_increment") for p in m.parameters())

    def activate(self, layers: Sequence[int]) -> None:
        """Unfreezes these layers; freezes the others and frees their gradients."""
        self.active = [*layers]
        for index, parameters in enumerate(self.layers):
            for parameter in parameters:
                parameter.requires_grad_(index in layers)
                if index not in layers:
                    parameter.grad = None
        self._remember()

    def _remember(self) -> None:
        """Records in the model what is frozen, so that `release` can undo it."""
        setattr(self.stack.model, TRAINS, {name: p.requires_grad for name, p in self._names.items()})

    def end_at_lowest(self) -> None:
        """Ends the backward pass at the lowest active layer, also under activation checkpointing.

        With activation checkpointing, transformers makes the embeddings' output require a gradient. Reentrant
        checkpoints need this, but it extends the backward pass through every layer. For non-reentrant checkpoints it
        is undone here.
        """
        base: Any = self.stack.model
        checkpoint = getattr(self.stack[0], "_gradient_checkpointing_func", None)
        if not isinstance(checkpoint, partial) or checkpoint.keywords.get("use_reentrant") is not False:
            return
        hooks = getattr(self.stack.embeddings, "_forward_hooks", {})
        found = [key for key, hook in hooks.items() if getattr(hook, "__name__", "") in _INPUT_HOOKS]
        if getattr(base, "_require_grads_hooks", None):
            base.disable_input_require_grads()
        for key in found:  # the call above removes the hooks of the last enable call only; TRL and PEFT enable, too
            hooks.pop(key, None)
        if found:
            logger.info(
                "the embeddings' output does not require a gradient: the backward pass ends at the lowest active layer"
            )

    def _leave_to_us(self) -> None:
        """Excludes the layers from DistributedDataParallel, before it wraps the model.

        DDP fixes the parameters that it averages when it wraps a model, allocates buckets for all of their gradients,
        and fails at a layer that is frozen later. Therefore hooks average the gradients of layers, each one as soon as
        it is complete and before clipping; DDP averages the parameters that always train.
        """
        ours = {id(p) for parameters in self.layers for p in parameters}
        for parameters in self.layers:
            for parameter in parameters:
                hook_gradient(parameter, _average)
        names = [name for name, p in self.model.named_parameters(remove_duplicate=False) if id(p) in ours]
        for name, module in self.model.named_modules():
            if isinstance(module, Increment):  # the shapes of its buffers change, in the same way on all processes
                names.extend(f"{name}.{key}" for key, _ in module.named_buffers())
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)
        if processes() > 1 and not self.always:
            # DDP rejects a model without parameters to average; this parameter is not part of the loss.
            device = next(self.model.parameters()).device
            self.model.register_parameter(ANCHOR, nn.Parameter(torch.zeros((), device=device)))


def _chosen(stack: DecoderLayers, settings: Any) -> ModuleChoice:
    """The matrices that train.

    Raises:
        ValueError: names that match no matrix, or a choice in a model with adapters, whose config has it.
    """
    names = {} if settings is None else given_names(settings)
    if names and _has_adapters(stack.model):
        name = next(iter(names))
        raise ValueError(
            f"{name}: expected none in a model with adapters, got {names[name]!r}; set target_modules and "
            "exclude_modules of the adapter's config"
        )
    return choose_modules(stack, settings) if names else ModuleChoice(stack)


def left_by(choice: ModuleChoice) -> list[nn.Parameter]:
    """The parameters that a choice of matrices leaves: those of excluded matrices, and of layers with no other ones."""
    if not choice.given:
        return []
    found: list[nn.Parameter] = []
    for index, layer in enumerate(choice.stack):
        if not choice.stack.input_shapes(index):
            found += layer.parameters()
    for name in choice.excluded:  # a module, or a parameter of a bank of experts
        parent, _, key = name.rpartition(".")
        each: Any = getattr(choice.stack.model.get_submodule(parent), key)
        found += [each] if isinstance(each, nn.Parameter) else each.parameters()
    return found


def warn_of_untrained(stack: DecoderLayers, trained: Sequence[Tensor]) -> None:
    """Warns about matrices outside of embeddings and head that never train, such as those of an encoder, or experts.

    Args:
        stack: the layers.
        trained: the parameters that train at some time.
    """
    known = {id(p) for p in trained}
    known.update(id(p) for m in (stack.embeddings, stack.head) if m is not None for p in m.parameters())
    # Parameters that the user froze are skipped, since that is intended; quantized ones are counted.
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
    """Unfreezes the parameters that an earlier optimizer froze in this model, and removes its hooks.

    If `requires_grad` was changed since (for example by PEFT, when it adds another adapter), the change is kept.
    """
    base: Any = find_decoder_layers(model).model
    unhook_gradients(base.parameters())
    release_input_gradients(base)
    release_averages(base)
    left = {name: p for name, p in base.named_parameters() if name in getattr(base, TRAINS, {})}
    now = {name: p.requires_grad for name, p in left.items()}
    if now == getattr(base, TRAINS, {}):
        for parameter in left.values():
            parameter.requires_grad_(True)
    elif any(now.values()) and not all(now.values()):
        logger.warning(
            "model: requires_grad was changed after an earlier OwLoreAdamW froze layers; frozen parameters stay "
            "frozen; call release() of that optimizer before you freeze or unfreeze parameters"
        )
    for module in base.modules():
        for name, adapter in getattr(module, "owlore_increment", {}).items():
            found = [m for m in adapter.modules() if isinstance(m, Increment) and name in module.active_adapters]
            for increment in (m for m in found if m.resting):
                increment.release()
    setattr(base, TRAINS, {})


def _average(parameter: nn.Parameter) -> None:
    """Averages a gradient over all processes. An accumulated gradient's earlier part is the same on all already."""
    assert parameter.grad is not None
    average(parameter.grad)


def _trainable(module: nn.Module, seen: set[int]) -> list[nn.Parameter]:
    """The module's parameters that require a gradient and are not in `seen`, to which they are added."""
    found = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
    seen.update(id(p) for p in found)
    return found


def _around(stack: DecoderLayers, others: Sequence[str]) -> list[nn.Module]:
    """Task heads, and the modules around the layers that `others` names, as far as the model has them."""
    modules = [*stack.task_heads.values()] + ([stack.final_norm] if "norm" in others else [])
    if "embeddings" in others:
        modules += [stack.embeddings, stack.head]
    return [module for module in modules if module is not None]


def _has_adapters(model: nn.Module) -> bool:
    return any(hasattr(m, "base_layer") for m in model.modules())


def _saved_with_adapters(model: nn.Module) -> list[nn.Module]:
    """The modules that PEFT trains and saves in full together with an adapter, such as a classification head."""
    return [m for m in model.modules() if isinstance(getattr(m, "modules_to_save", None), nn.ModuleDict)]


_HANDLES: Any = WeakIdKeyDictionary()  # parameter -> handle of the hook that this package registered on it


def hook_gradient(parameter: nn.Parameter, hook: Callable[[Any], None]) -> None:
    """Calls `hook` with the parameter once its gradient is accumulated; replaces an earlier hook of this package."""
    unhook_gradients([parameter])
    _HANDLES[parameter] = parameter.register_post_accumulate_grad_hook(hook)


def unhook_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Removes the hooks of `hook_gradient`."""
    for parameter in parameters:
        handle = _HANDLES.pop(parameter, None)
        if handle is not None:
            handle.remove()


_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
SHARDED = (
    "model: expected unsharded parameters, got sharded ones (FSDP, or DeepSpeed of any stage); train replicas (DDP) "
    "instead, whose memory few active layers reduce"
)


def refuse_shards(model: nn.Module) -> None:
    """Raises if parameters are sharded, or will be.

    Raises:
        ValueError: FSDP 1 or 2, DeepSpeed, or accelerate is configured to shard the models that it prepares.
    """
    planned = is_initialized() and AcceleratorState().distributed_type in _SHARDING
    wrapped = any(isinstance(m, FullyShardedDataParallel) for m in model.modules())
    if planned or wrapped or any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(SHARDED)
