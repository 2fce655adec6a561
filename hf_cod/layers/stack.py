"""The stack of layers of a model, and the modules in, before and after it.

A *layer* is a whole decoder (or encoder) block, counted from 0; a *module* is a matrix or norm inside it. Modules are
found by what they are and how they are used, not by their names.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import OldAttribute, renamed
from hf_cod.layers.expert_discovery import expert_sets
from hf_cod.layers.experts import ExpertMatrix, ExpertSet, expert_matrices
from hf_cod.layers.layer_masks import mask_at
from hf_cod.layers.modules import is_linear_like, is_norm, walk
from hf_cod.layers.orientation import shape_of
from hf_cod.layers.stacks import DECODER, ENCODER, TEXT, counting_config, named_stacks, path_of_stack, side_of
from hf_cod.layers.trunk import trunk_of
from hf_cod.layers.weights import weight_of

# Components that wrappers insert into module names: torch.compile of a layer, FSDP, PEFT around a Linear.
_WRAPPER_COMPONENTS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|base_layer)(?=\.|$)")

# Inputs that have one entry for each token.
_TOKENS = {"input_ids", "inputs_embeds"}


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the transformers model inside PEFT, torch.compile and (distributed) data parallel wrappers.

    PEFT adapters stay active, since they are inside the returned model's modules.

    Raises:
        ValueError: prompt, prefix or P-tuning, whose learned tokens are outside the returned model.
    """
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel, FullyShardedDataParallel)):
            model = model.module
        elif getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError("model: expected adapters inside the layers, got prompt learning; use the base model")
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        elif callable(getattr(model, "get_base_model", None)):  # PEFT
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


@renamed(path="layers_path")
@dataclass(frozen=True)
class DecoderLayers(Sequence):
    """The stack of layers of one model; `stack[i]` is layer i, `len(stack)` the depth.

    Attributes:
        model: the unwrapped transformers model.
        layers_path: the stack's name inside `model`, such as "model.layers" or "transformer.h".
        module_list: the `nn.ModuleList` over which the model's forward iterates.
        config: the text or vision config that counts these layers; None if there is none. The two sides of an
            encoder-decoder may have one in common.
        excluded: names of matrices that are not listed, because a setting excludes them (`module_choice.py`);
            `count_weights` counts them.
        included: names of matrices that a setting includes by name.
    """

    model: nn.Module
    layers_path: str
    module_list: nn.ModuleList
    config: Any
    excluded: frozenset[str] = frozenset()
    included: frozenset[str] = frozenset()

    path = OldAttribute("layers_path")

    def __len__(self) -> int:
        return len(self.module_list)

    def __getitem__(self, index: Any) -> Any:
        return self.module_list[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.module_list)

    def index_of(self, name: str) -> int | None:
        """The layer that a parameter or module name belongs to, or None.

        Works on names of the bare model and of its wrapped forms ("module.", "_orig_mod.", "base_model.model.").
        """
        prefix = getattr(self.model, "base_model_prefix", "") or "model"
        wrappers = rf"(?:(?:module|base_model|model|{re.escape(prefix)})\.)*?"
        bare = _WRAPPER_COMPONENTS.sub("", name).lstrip(".")
        match = re.match(rf"{wrappers}{re.escape(self.layers_path)}\.(\d+)(?:\.|$)", bare)
        return int(match[1]) if match else None

    def not_run(self, got: str) -> str:
        """The error for inputs on which no layer runs, such as text for those of a vision tower."""
        return (
            f"batches: expected inputs on which the layers of {self.layers_path} run, got {got}, or a model that runs "
            "them without calling them; layers that read images or sound require batches with these, in Python"
        )

    def linears(self, index: int) -> dict[str, nn.Module]:
        """Name -> module of each Linear-like module of layer `index`, in the order of registration.

        Linear-like modules map `in_features` to `out_features` by one 2-D weight: nn.Linear, transformers' Conv1D and
        their quantized replacements. Of a PEFT adapter the base Linear is included, the adapter's own factors are not.
        Names are those of the bare model ("model.layers.3.mlp.up_proj"), also if it is wrapped.
        """
        found = self._modules_of(index)
        return {name: m for name, m in found if is_linear_like(m) and name not in self.excluded}

    def experts(self, index: int) -> dict[str, nn.Module]:
        """Name -> module of each bank of experts of layer `index`: modules that hold the matrices of all experts in one
        parameter each. Experts that are Linears are in `linears`.
        """
        return {matrix.bank: matrix.module for matrix in self._expert_matrices(index)}

    def expert_matrices(self, index: int) -> list[ExpertMatrix]:
        """The matrices of the banks of experts of layer `index` that are not excluded."""
        return [matrix for matrix in self._expert_matrices(index) if matrix.name not in self.excluded]

    def expert_sets(self, index: int) -> list[ExpertSet]:
        """The routed and shared experts of layer `index`, with their routers; see `experts.py`."""
        return expert_sets(self.module_list[index], f"{self.layers_path}.{index}")

    def input_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of a tensor with one number per input channel: (in,) for each Linear-like module, (experts, in)
        for each matrix of a bank of experts, named after its parameter ("model.layers.3.mlp.experts.down_proj").
        """
        shapes: dict[str, tuple[int, ...]] = {name: shape_of(m)[1:] for name, m in self.linears(index).items()}
        return shapes | {matrix.name: (matrix.experts, matrix.shape[1]) for matrix in self.expert_matrices(index)}

    def matrices(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of each entry of `input_shapes`: (out, in), or (experts, out, in) for a bank of experts.

        Conv1D and transposed banks are transposed, offloaded weights are loaded, quantized ones are decoded. This is
        done one module at a time, so the extra memory is that of one module.
        """
        for name, module in self.linears(index).items():
            yield name, weight_of(module)
        of_bank: dict[str, list[ExpertMatrix]] = {}
        for matrix in self.expert_matrices(index):
            of_bank.setdefault(matrix.bank, []).append(matrix)
        for found in of_bank.values():
            with align_module_device(found[0].module):
                weights = [(matrix.name, matrix.weights()) for matrix in found]
            yield from weights

    def count_weights(self, index: int) -> int:
        """Number of weights in the matrices of layer `index`, experts included: those that can be compressed."""
        plain = sum(math.prod(shape_of(m)) for _, m in self._modules_of(index) if is_linear_like(m))
        return plain + sum(matrix.parameter.numel() for matrix in self._expert_matrices(index))

    def other_weights(self, index: int) -> Counter[str]:
        """Class of module -> number of weights of layer `index` in no matrix (convolutions, ...), vectors excluded."""
        found: Counter[str] = Counter()
        experts = {id(matrix.parameter) for matrix in self._expert_matrices(index)}
        for module in (m for _, m in self._modules_of(index) if not is_linear_like(m)):
            named = module.named_parameters(recurse=False)
            own = (p for name, p in named if p.dim() > 1 and id(p) not in experts and "bias" not in name)
            found[type(module).__name__] += sum(p.numel() for p in own)
        return +found

    def norms(self, index: int) -> dict[str, nn.Module]:
        """Name -> module of each normalisation of layer `index`, in the order of registration."""
        return {name: m for name, m in self._modules_of(index) if is_norm(m)}

    @cached_property
    def name(self) -> str | None:
        """The name of these layers in a model with several stacks, see `find_decoder_layers`; None if it has one."""
        named = {stack.path: stack.name for stack in named_stacks(self.model)}
        return side_of(self.model, self.layers_path) or named.get(self.layers_path)

    def mask(self, inputs: Mapping[str, Any]) -> Any:
        """The mask (S, T) of the tokens of these layers among the inputs of the model; None if there is none.

        A decoder beside an encoder has its own tokens. The mask of sound is the one that the model makes of it for its
        layers (`mask_at`); images have none here.
        """
        if self.name == DECODER:
            return inputs.get("decoder_attention_mask")
        if self.name in (None, ENCODER):
            return self._read_mask(inputs, "attention_mask")
        return inputs.get("attention_mask") if TEXT in self.name else None

    def encoded_mask(self, inputs: Mapping[str, Any]) -> Any:
        """The mask (S, T) of the encoder's tokens, which a decoder reads; None if there is none."""
        return self._read_mask(inputs, "encoder_attention_mask")

    def _read_mask(self, inputs: Mapping[str, Any], name: str) -> Any:
        given = inputs.get("attention_mask")
        if given is None or bool(given.all()) or not _TOKENS.isdisjoint(inputs):
            return given
        return mask_at(self[0], lambda: self.trunk(**inputs), name)

    def count_tokens(self, inputs: Mapping[str, Any]) -> int | None:
        """The number of tokens of a sample that these layers read; None if it is unknown, as of images and sound."""
        side = "decoder_" if self.name == DECODER else ""
        if self.name not in (None, ENCODER, DECODER) and TEXT not in str(self.name):
            return None
        found = [inputs.get(f"{side}{name}") for name in ("input_ids", "inputs_embeds")]
        return next((tensor.shape[1] for tensor in found if tensor is not None and tensor.dim() > 1), None)

    @property
    def embeddings(self) -> nn.Module | None:
        """The input embedding (of tokens or patches); None if the model has none."""
        return _ask(self.model, "get_input_embeddings")

    @property
    def head(self) -> nn.Module | None:
        """The output projection onto the vocabulary; None for a model without one."""
        return _ask(self.model, "get_output_embeddings")

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last layer: a direct child of one of the stack's ancestors. None for Post-LN models.

        Gemma 3n has one of narrower states beside it.
        """
        parts, width = self.layers_path.split("."), getattr(self.config, "hidden_size", None)
        for depth in range(len(parts) - 1, -1, -1):
            ancestor = self.model.get_submodule(".".join(parts[:depth]))
            norms = [child for child in ancestor.children() if is_norm(child)]
            own = [norm for norm in norms if width in (None, *getattr(getattr(norm, "weight", None), "shape", ()))]
            if norms:
                return (own or norms)[-1]
        return None

    @property
    def tower(self) -> Any:
        """The smallest model of transformers around the layers."""
        around = [name for name, module in self.model.named_modules() if isinstance(module, PreTrainedModel)]
        inside = [name for name in around if not name or f"{self.layers_path}.".startswith(f"{name}.")]
        return self.model.get_submodule(max(inside, key=len, default=""))

    @property
    def trunk(self) -> Any:
        """The module whose forward runs the layers on the model's inputs without the head, if there is one."""
        return trunk_of(self.model, self.module_list)

    @property
    def task_heads(self) -> dict[str, nn.Module]:
        """Name -> module of a task outside the base model, such as a classifier; modules that hold `head` excluded."""
        base = self.trunk
        if base is self.model:
            return {}
        heads = {name: m for name, m in self.model.named_children() if m is not base and [*m.parameters()]}
        return {name: m for name, m in heads.items() if all(inner is not self.head for inner in m.modules())}

    def _expert_matrices(self, index: int) -> list[ExpertMatrix]:
        return expert_matrices(self._modules_of(index))

    def _modules_of(self, index: int) -> Iterator[tuple[str, nn.Module]]:
        return walk(self.module_list[index], f"{self.layers_path}.{index}")


@renamed(path="layers_path")
@checked
def find_decoder_layers(model: nn.Module, layers_path: str | None = None) -> DecoderLayers:
    """Finds the stack of layers of a transformers model, wrapped or not.

    The stack is the `nn.ModuleList` whose length is the config's `num_hidden_layers`. Of several it is the decoder of
    an encoder-decoder, and the text side of a vision-language model. Each of several has a name: "encoder" or
    "decoder", or what its config is called in the model's config ("text", "vision", "audio").

    Args:
        model: any transformers model (text or vision), also inside PEFT, DDP or torch.compile.
        layers_path: the stack's name if the model has several ("encoder", "decoder", "text", "vision", ...), or the
            name of its module list.

    Raises:
        ValueError: `model` is no model, or no stack or more than one fits; the message lists the stacks by name, or all
            module lists.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a loaded model, got {model!r}; load it by from_pretrained of an Auto class")
    base = unwrap(model)
    path = path_of_stack(base, layers_path)
    layers: Any = base.get_submodule(path)
    return DecoderLayers(base, path, layers, counting_config(base, path, len(layers)))


def _ask(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)() if hasattr(model, getter) else None
    except NotImplementedError:  # raised by transformers for architectures without it
        return None
