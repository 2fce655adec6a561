"""Checks before a model is changed or a file is used on it: writable weights, zeros to keep, sizes, positions."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.layers.experts import check_weight_in_memory
from hf_cod.layers.offloading import in_memory
from hf_cod.layers.stack import DecoderLayers
from hf_cod.models.factors import LowRankExperts, LowRankLinear
from hf_cod.models.shaping import check_shapeable

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_without_adapter(model: nn.Module, source: str) -> None:
    """Checks that a model, which is to be changed and saved, was loaded without an adapter.

    Raises:
        ValueError: it has one: of a quantized base, into which it cannot be merged, or loaded by transformers from the
            model's own directory, so that saving would write the adapter alone.
    """
    if hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"model: expected a model, got an adapter on a quantized base in {source!r}; only diagnose, score and the "
            "teacher of heal accept it"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "model: expected a directory without an adapter, got adapter_config.json next to the weights; save the "
            "merged model (merge_and_unload of PEFT), or move the adapter"
        )


def check_writable(stack: DecoderLayers, factors: bool = False, in_files: bool = False) -> None:
    """Checks that each matrix can be changed in place.

    Args:
        stack: the layers.
        factors: whether experts may be factors, as for training.
        in_files: whether weights may stay in files, because layers change in `changed_in_memory`.

    Raises:
        ValueError: adapters, quantized, offloaded or sharded weights; a weight that two matrices share (or a matrix
            and an embedding); NaN or infinity. Says in which module.
    """
    for index in range(len(stack)):
        with in_memory(stack[index]) if in_files else nullcontext():
            _check_layer(stack, index, factors)
    check_matrices(stack)


def check_matrices(stack: DecoderLayers) -> None:
    """Checks that layers have matrices.

    Raises:
        ValueError: they have none, as those of SqueezeBERT, which are convolutions.
    """
    if not any(stack.count_weights(index) for index in range(len(stack))):
        raise ValueError(
            f"model: expected matrices in the layers of {type(stack.model).__name__} ({stack.layers_path}), got none"
        )


def check_separate(stack: DecoderLayers, names: Collection[str] | None = None) -> None:
    """Checks that each matrix has a weight of its own; before the weights are loaded, too.

    Args:
        stack: the layers.
        names: of the matrices; None: all.

    Raises:
        ValueError: a weight that two matrices share (or a matrix and an embedding); says which.
    """
    known = _names_of_weights(stack.model)
    for index in range(len(stack)):
        _check_separate(stack, index, known, names)


def _check_separate(
    stack: DecoderLayers, index: int, known: Mapping[int, list[str]], names: Collection[str] | None = None
) -> None:
    """Checks one layer, as `check_separate`; `known` is the result of `_names_of_weights`."""
    for name, weight in _parameters(stack, index, factors=True):
        first, *others = known.get(id(weight), [""])
        if others and (names is None or name in names):
            raise ValueError(
                f"model: expected a separate weight for each matrix, got {first}, which is shared with {others[0]}; "
                "exclude such matrices"
            )


def _check_layer(stack: DecoderLayers, index: int, factors: bool) -> None:
    """Checks one layer, as `check_writable`."""
    adapter = next((n for n, m in stack[index].named_modules() if hasattr(m, "base_layer")), None)
    if adapter is not None:
        raise ValueError(
            f"model: expected plain weights, got an adapter at {stack.layers_path}.{index}.{adapter}; "
            "call merge_and_unload first, or prune the base model"
        )
    for name, weight in _parameters(stack, index, factors):
        _check_plain(name, weight)
    _check_separate(stack, index, _names_of_weights(stack.model))
    for name, weight in _parameters(stack, index, factors):
        if not weight.isfinite().all():
            raise ValueError(f"weights: expected finite numbers, got NaN or infinity in {name}")


def check_reshapeable(stack: DecoderLayers, doing: str) -> None:
    """Checks that the matrices of a model can be replaced by others of another shape, and that the result can be saved.

    Args:
        stack: the layers.
        doing: what is to be done with the model, in one word.

    Raises:
        ValueError: a class of neither transformers nor this package, or as `check_writable`; or matrices that are
            factors already.
    """
    check_shapeable(stack.model)
    check_writable(stack)
    before = next((name for name, m in stack.model.named_modules() if isinstance(m, LowRankLinear)), None)
    if before is not None:
        raise ValueError(f"model: expected dense matrices, got factors in {before}; {doing} the original model")


def _parameters(stack: DecoderLayers, index: int, factors: bool) -> Iterator[tuple[str, Any]]:
    for name, module in stack.linears(index).items():
        yield name, getattr(module, "weight", None)
    for name, parameter in ((matrix.name, matrix.parameter) for matrix in stack.expert_matrices(index)):
        if factors and isinstance(parameter, LowRankExperts):
            yield from ((f"{name}.{key}", factor) for key, factor in parameter.named_parameters())
        else:
            yield name, parameter


def check_unfactored(name: str, weight: Any) -> None:
    """Checks that the matrices of a bank of experts are not factors.

    Raises:
        ValueError: they are.
    """
    if isinstance(weight, LowRankExperts):
        raise ValueError(
            f"model: expected dense matrices, got factors of experts in {name}; use the original model, or, to prune "
            "the other matrices, exclude these"
        )


def _check_plain(name: str, weight: Any) -> None:
    check_unfactored(name, weight)
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
        kind = f"{type(weight).__name__} {getattr(weight, 'dtype', '')}".strip()
        raise ValueError(
            f"model: expected plain floating-point weights, got {kind} in {name}; use the model from before it was "
            "quantized"
        )
    check_weight_in_memory(name, weight)


def _names_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """Identity of a weight -> its names; before the weights are loaded, also those that it will be tied to."""
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        mine, other = parameters.get(name), parameters.get(source)
        if mine is not None and other is not None and mine is not other and mine.is_meta:
            names[id(other)].append(name)
            names[id(mine)].insert(0, source)
    return names


# A matrix with at least this share of zeros counts as pruned. Rounding of small weights gives a few zeros as well.
LEAST_SHARE = 0.01


def is_pruned(weight: Tensor) -> bool:
    """Whether at least `LEAST_SHARE` of the entries is 0."""
    return int((weight == 0).sum()) >= LEAST_SHARE * weight.numel()


def pruned_matrices(stack: DecoderLayers) -> list[nn.Parameter]:
    """Weights of the layers' matrices, banks of experts included, that are pruned.

    A weight in no matrix that is zero as a whole is none: gates and biases of several dimensions start so.
    """
    found = [p for layer in stack for p in layer.parameters() if p.dim() > 1 and p.is_floating_point()]
    matrices = {id(weight) for index in range(len(stack)) for _, weight in _parameters(stack, index, factors=True)}
    return [p for p in found if is_pruned(p) and (id(p) in matrices or bool(p.any()))]


logger = logging.getLogger(__name__)


def check_sizes(field: str, model: str, sizes: Sequence[int] | None, stack: DecoderLayers) -> None:
    """Checks that scores, statistics or a plan of a model are used on a model with layers of the same sizes.

    Args:
        field: the name of the scores, statistics or plan; messages begin with it.
        model: the name of the model that they were computed for; a warning is given if only the name differs.
        sizes: number of weights in the matrices of each of its layers; None: unknown, no check.
        stack: the layers that they are used on.

    Raises:
        ValueError: the number of layers, or the number of weights in a layer, differs.
    """
    if sizes is None:
        return
    expected = sizes_of(stack)
    if len(sizes) != len(expected):
        raise ValueError(f"{field}: expected those of a model with {len(expected)} layers, got {len(sizes)} ({model})")
    wrong = [index for index, size in enumerate(sizes) if size != expected[index]]
    if wrong:
        raise ValueError(
            f"{field}: expected those of a model with {expected[wrong[0]]} weights in layer {wrong[0]}, got one with "
            f"{sizes[wrong[0]]} ({model})"
        )
    warn_of_other_name(field, model, stack)


def sizes_of(stack: DecoderLayers) -> list[int]:
    """Number of weights in the matrices of each layer, by which scores and plans identify a model."""
    return [stack.count_weights(index) for index in range(len(stack))]


def name_of(stack: DecoderLayers) -> str:
    """The name of a model in scores and plans: where it was loaded from, or its class."""
    config = getattr(stack.model, "config", None)
    return str(getattr(config, "_name_or_path", "") or type(stack.model).__name__)


def other_name(field: str, model: str, stack: DecoderLayers) -> list[str]:
    """A sentence if the names of the models differ, else none. Directories before the names are not compared."""
    mine = name_of(stack)
    if model.rstrip("/").rpartition("/")[2] == mine.rstrip("/").rpartition("/")[2]:
        return []
    return [f"{field}: used on {mine}, but computed for {model}, which has layers of the same sizes"]


def warn_of_other_name(field: str, model: str, stack: DecoderLayers) -> None:
    """Warns if the names differ; see `other_name`."""
    for message in other_name(field, model, stack):
        logger.warning("%s", message)


# Names of learned position embeddings in the style of GPT-2, OPT and BERT. Rotary embeddings have no table and no
# limit.
_TABLES = ("wpe", "embed_positions", "position_embeddings")


def learnt_positions(model: nn.Module) -> tuple[int, str] | None:
    """(Number of learned positions of a model, name of their table); None if there is no limit."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            # OPT's table has two rows before the first position, RoBERTa's has rows up to its padding index.
            offset = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset, name
    return None


def embedding_tables(model: nn.Module) -> list[nn.Module]:
    """The tables of a model's input embeddings: several if it adds up those of several codebooks, none if unknown."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # raised by transformers for architectures without embeddings
        return []
    return [*found] if isinstance(found, nn.ModuleList) else [found]


def check_length(model: nn.Module, length: int) -> None:
    """Checks that a model reads text, and that samples of `length` tokens fit its learned positions.

    Raises:
        ValueError: it has an embedding table for each of several codebooks (MusicGen), whose codes are no tokens of a
            text; or samples are longer than its table of positions; says the maximum.
    """
    tables = embedding_tables(model)
    if len(tables) > 1:
        raise ValueError(
            f"model: expected one that reads text, got {type(model).__name__}, which reads the codes of {len(tables)} "
            "codebooks; in Python, pass batches of codes"
        )
    found = learnt_positions(model)
    if found is not None and length > found[0]:
        raise ValueError(
            f"sequence_length: expected at most {found[0]} tokens, the learned positions of {found[1]}, got {length}"
        )
