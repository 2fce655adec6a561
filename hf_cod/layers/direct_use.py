"""Matrices that a model uses other than by calling their module, found by one forward pass of a few tokens.

Some models read `wo.weight.dtype` (T5), multiply `dt_proj.weight` (Mamba), or rescale a weight in place (RWKV). Hooks
on such a module do not see what the matrix is multiplied with, and a replacement, which stores the matrix in another
form, would be misread. In the pass the parameters of each Linear-like module are watched: each read of `weight` while
the module is not being called is recorded, whatever the model does with it, so that no list of models is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_cod.io.text import Batch
from hf_cod.layers.capturing import capturing_hooks
from hf_cod.layers.devices import random_state_restored
from hf_cod.layers.layer_calls import observed_calls
from hf_cod.layers.meta_weights import is_on_meta, on_zeros
from hf_cod.layers.modes import modes_restored, modules_restored, without_cache
from hf_cod.layers.module_choice import by_place
from hf_cod.layers.modules import walk
from hf_cod.layers.orientation import computes_otherwise
from hf_cod.layers.own_changes import undone_at_the_end
from hf_cod.layers.probe_inputs import FEW, probe_inputs
from hf_cod.layers.sensitive_modules import LatentProjections
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.stock_four_bit import without_repacking
from hf_cod.layers.watched_experts import watch_experts
from hf_cod.layers.watched_weights import Watched, is_watched, version_of, watch

# A model may compute otherwise on a few tokens. Linears are not computed in the pass, so that this costs little.
TOKENS = 40
UNCALLED = "the model uses its weight without calling it"
READ = "the model reads its weight itself, beside calling it"


@dataclass(frozen=True)
class DirectUse:
    """What one forward pass showed.

    Attributes:
        reasons: name of a Linear-like module -> `UNCALLED` or `READ`, for each whose weight the model uses directly.
        written: names of weights that the model changes by itself in eval mode.
        latent: names of latent projections (`sensitive_modules.py`).
        failure: the error that ended the pass; None if it was complete.
        obstacles: name of a layer -> why it cannot be run by itself, see `LayerCalls`.
        tokens_first, without_gradients: names of layers, see `LayerCalls`.
        no_tensors: names of Linear-like modules whose output is no tensor.
        in_training: as `reasons`, in train mode: Mamba reads more matrices there, for its kernels.
        unpackable: name of a matrix of a bank of experts -> why it cannot be stored packed (`watched_experts.py`).
        unseen: names of Linear-like modules that did not run on the input, such as those of a vision tower on text, and
            none of whose place in a module of the same class did. Nothing is known of them.
    """

    reasons: Mapping[str, str]
    written: Sequence[str]
    latent: Sequence[str] = ()
    failure: str | None = None
    obstacles: Mapping[str, str] = field(default_factory=dict)
    tokens_first: Sequence[str] = ()
    without_gradients: Sequence[str] = ()
    no_tensors: Sequence[str] = ()
    in_training: Mapping[str, str] = field(default_factory=dict)
    unpackable: Mapping[str, str] = field(default_factory=dict)
    unseen: Sequence[str] = ()

    def notes_on(self, stack: DecoderLayers) -> list[str]:
        """`notes` on the matrices of these layers."""
        notes = self.notes([name for index in range(len(stack)) for name in stack.linears(index)])
        if not self.written:
            return notes
        count = f"{len({*self.written})} of its weights in eval mode"
        return [f"the model changes {count}: save it before it runs in that mode, or after a run in train mode", *notes]

    def notes(self, names: Sequence[str]) -> list[str]:
        """A sentence for a report if the pass failed, or did not run all matrices of these names; else none."""
        if self.failure is not None:
            return [f"{_UNCHECKED}, because a forward pass of a few tokens failed ({self.failure})"]
        unseen = [name for name in names if name in {*self.unseen}]
        if not unseen:
            return []
        count = f"{len(unseen)} of {len(names)} matrices"
        return [f"{_UNCHECKED}, of {count} that did not run on its input: {'; '.join(by_place(unseen))}"]


_UNCHECKED = "not checked: whether the model uses matrices other than by calling their modules"


@dataclass
class _Known:
    """What was found of a model: with these modules, and on inputs of these names (None: those by its config)."""

    modules: list[int]
    inputs: set[frozenset[str] | None]
    found: DirectUse


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def direct_use(model: nn.Module, batches: Sequence[Batch] | None = None) -> DirectUse:
    """Examines a model; its weights, modes, attributes and random numbers are left as they were.

    The result is kept while the model has the same modules, so that further calls cost nothing. If it is not complete,
    because the pass failed or matrices did not run, batches of another kind (with images) add to it.

    Reads that happen only with a cache of earlier tokens are not found: the pass has none, since a pass that fills one
    and a step after that would double its time. Nor are those on more than `TOKENS` tokens or on certain values, and
    those of a reference to the parameter that is kept outside of its module.

    Args:
        model: a transformers model without wrappers; it may be on the meta device.
        batches: one sample of the first is the input; None: a few tokens, or a blank image or sound.
    """
    modules = [id(module) for module in model.modules()]
    inputs = frozenset(batches[0]) if batches else None
    known = _known.get(model)
    if known is None or known.modules != modules:
        known = _known[model] = _Known(modules, {inputs}, _examined(model, batches[0] if batches else None))
    elif batches and inputs not in known.inputs and (known.found.failure is not None or known.found.unseen):
        known.inputs.add(inputs)
        known.found = _together(known.found, _examined(model, batches[0]))
    return known.found


def check_unwritten(model: nn.Module, batches: Sequence[Batch] | None = None) -> DirectUse:
    """`direct_use` of a model that is to be saved.

    Raises:
        ValueError: the model changes its weights by itself, so that a saved model would change them once more, and the
            function that was called does not undo that (`own_changes.py`).
    """
    use = direct_use(model, batches)
    if use.written and not undone_at_the_end(model, use.written):
        raise ValueError(
            f"model: expected weights that stay the same in eval mode, got {type(model).__name__}, whose forward "
            f"changes {use.written[0]}; a model that is saved after a forward pass would change it again"
        )
    return use


def runs_on(model: nn.Module, batch: Batch) -> bool:
    """Whether the forward of a model runs on the first tokens of a batch; hooks are not called, nothing is changed."""
    return _pass(model, batch).failure is None


def has_tokens_first(stack: DecoderLayers, samples: int, tokens: int | None) -> bool:
    """Whether hidden states of a batch with as many tokens as samples are (tokens, samples, width); else False."""
    return samples == tokens and f"{stack.layers_path}.0" in direct_use(stack.model).tokens_first


def not_adaptable(stack: DecoderLayers) -> dict[str, str]:
    """Name -> the reason why an adapter on a matrix of the layers would have no effect, or a wrong one."""
    use = direct_use(stack.model)
    found: dict[str, str] = {}
    for name, module in (item for index in range(len(stack)) for item in stack.linears(index).items()):
        if UNCALLED in (use.reasons.get(name), use.in_training.get(name)):
            found[name] = UNCALLED
        elif name in use.no_tensors:
            found[name] = f"a {type(module).__name__}, whose output is more than the product"
        elif computes_otherwise(module):
            found[name] = f"a {type(module).__name__}, which computes something else than a Linear"
    return found


def _together(before: DirectUse, after: DirectUse) -> DirectUse:
    """What two passes on different inputs showed."""
    if after.failure is not None or before.failure is not None:
        return after if after.failure is None else before
    unseen = [name for name in before.unseen if name in after.unseen]
    joined = {f.name: _union(getattr(before, f.name), getattr(after, f.name)) for f in fields(DirectUse)}
    return DirectUse(**{**joined, "failure": None, "unseen": unseen})


def _union(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping):
        return {**one, **other}
    return None if one is None else [*one, *(value for value in other if value not in one)]


def _examined(model: nn.Module, batch: Batch | None) -> DirectUse:
    """Eval mode shows what is used directly. What is rescaled already is only seen in train mode, which undoes it."""
    for tokens in (TOKENS, FEW):  # a model may have fewer positions
        found = _pass(model, batch, tokens=tokens)
        if found.failure is None:
            break
    training = _pass(model, batch, training=True, tokens=tokens)
    if found.failure is not None and is_on_meta(model):
        found = _pass(model, batch, zeros=True, tokens=tokens)
    written = [*found.written, *training.written]
    # What is rescaled already is read in train mode alone.
    reasons = {**dict.fromkeys((name.removesuffix(".weight") for name in written), READ), **found.reasons}
    return replace(
        found,
        reasons=reasons,
        in_training=training.reasons,
        written=written,
        without_gradients=training.without_gradients,
    )


def _pass(
    model: nn.Module, batch: Batch | None, training: bool = False, zeros: bool = False, tokens: int = FEW
) -> DirectUse:
    """One forward pass; with `zeros`, as in `on_zeros`."""
    versions = {name: version_of(p) for name, p in model.named_parameters()}
    failure = None
    with ExitStack() as block:
        # First, because it reads the weights of bitsandbytes' layers.
        block.enter_context(without_repacking(model))
        block.enter_context(modes_restored(model))
        block.enter_context(modules_restored(model))
        block.enter_context(without_cache(model))  # which would copy what a latent projection hands on
        block.enter_context(random_state_restored(model))
        _prepare(model, training)
        unpackable = block.enter_context(on_zeros(model)) if zeros else {} if training else watch_experts(model)
        named = {name.lstrip("."): m for name, m in walk(model, "") if is_watched(m)}
        each = {module: watch(module, block) for module in named.values()}  # a module may have two names
        watched = {name: each[module] for name, module in named.items()}
        latent = LatentProjections()
        latent.attach(model, named, block)
        calls = block.enter_context(observed_calls(model, training))
        try:
            _run(model, batch, tokens, watched)
        except Exception as error:  # whatever a model raises on inputs that may be none for it
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    written = [f"{name}.weight" for name, parameters in watched.items() if parameters.is_written()]
    written += [name for name, p in model.named_parameters() if version_of(p) != versions[name]]
    return DirectUse(
        reasons=_alike(model, watched),
        written=written,
        latent=latent.found,
        failure=failure,
        obstacles=calls.obstacles,
        tokens_first=calls.tokens_first,
        without_gradients=calls.without_gradients,
        no_tensors=[name for name, parameters in watched.items() if parameters.no_tensor],
        unpackable=unpackable,
        unseen=_unseen(model, watched),
    )


def _run(model: nn.Module, batch: Batch | None, tokens: int, watched: Mapping[str, Watched]) -> None:
    """Runs the model while reads are recorded."""
    empty = next((name for name, parameters in watched.items() if not parameters.size), None)
    if empty is not None:  # torch ends the process where attention has no channels
        raise ValueError(f"{empty} has no weights")
    inputs, device = probe_inputs(model, batch, tokens=tokens)
    for parameters in watched.values():
        parameters.begin()
    with device:
        model(**inputs)


def _prepare(model: nn.Module, training: bool) -> None:
    """Sets the mode, without hooks and compiled code, and without what changes a model in train mode."""
    model.train(training)
    for module in model.modules():
        kept = OrderedDict(capturing_hooks(module))  # a model may read what transformers captures
        vars(module).update(_forward_hooks=kept, _forward_pre_hooks=OrderedDict())
        if training:  # a moving average is changed in place
            module._buffers.update({name: b.clone() for name, b in module._buffers.items() if b is not None})
        if isinstance(module, _BatchNorm):  # it would change its buffers
            module.eval()
        if getattr(module, "gradient_checkpointing", False):  # it would warn
            module.gradient_checkpointing = False  # type: ignore[assignment]
        if vars(module).get("_compiled_call_impl") is not None:
            module._compiled_call_impl = None


def _alike(model: nn.Module, watched: Mapping[str, Watched]) -> dict[str, str]:
    """The reason for each matrix that was read, and for those of the same place in modules of the same class, such as
    experts to which no token was routed.
    """
    places: dict[tuple[type, str], str] = {}
    for name, parameters in watched.items():
        if parameters.read:
            places[_place(model, name)] = READ if parameters.called else UNCALLED
    return {n: places[_place(model, n)] for n in watched if _place(model, n) in places} if places else {}


def _unseen(model: nn.Module, watched: Mapping[str, Watched]) -> list[str]:
    """The matrices that were neither called nor read, and none of whose place was."""
    idle = [name for name, parameters in watched.items() if not (parameters.called or parameters.read)]
    if not idle:
        return []
    seen = {_place(model, name) for name in watched.keys() - {*idle}}
    return [name for name in idle if _place(model, name) not in seen]


def _place(model: nn.Module, name: str) -> tuple[type, str]:
    parent, _, child = name.rpartition(".")
    return type(model.get_submodule(parent)), child
