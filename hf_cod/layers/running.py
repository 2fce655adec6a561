"""Running a model for measurements: in eval mode without a cache; the model's modes are restored."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakSet

from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]
from torch import Tensor, nn
from tqdm import std
from tqdm.auto import tqdm

from hf_cod.layers.modes import measuring_config, modes_restored
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.stock_four_bit import without_repacking

Item = TypeVar("Item")
Place = tuple[Any, ...]
"""Where a tensor is inside tuples, lists and dicts: their indices and keys."""
# Bars that exist; a finished one is disabled.
_BARS: WeakSet[Any] = WeakSet()
_IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
# Seconds between lines of progress where no terminal shows a bar.
INTERVAL = 30.0
STATE_RETURNED = "layers that return their hidden state, alone or first in a tuple"


class NonFiniteError(ValueError):
    """Activations are NaN or infinite; the message says in which layer first.

    Args:
        state: index of the first hidden state that is not finite; state l is the input of layer l and the output of
            layer l - 1.
        batch: number of the batch.
    """

    def __init__(self, state: int, batch: int) -> None:
        where = f"the output of layer {state - 1}" if state else "the input of layer 0"
        super().__init__(f"activations: expected finite numbers, got NaN or infinity first in {where}, batch {batch}")


@contextmanager
def naming_weights(model: nn.Module) -> Iterator[None]:
    """If the block fails because of values that are not finite, checks the weights and names the module of a bad one.

    Raises:
        ValueError: the block's own error, or one that names the module.
    """
    try:
        yield
    except ValueError as error:
        for name, weight in model.named_parameters():
            plain = weight.is_floating_point() and not weight.is_meta
            if plain and "finite" in str(error) and not bool(weight.isfinite().all()):
                module = name.rpartition(".")[0]
                raise ValueError(f"weights: expected finite numbers, got NaN or infinity in {module}") from error
        raise


@contextmanager
def evaluation_mode(stack: DecoderLayers, *, repacking: bool = False) -> Iterator[None]:
    """Eval mode without KV cache and load-balancing loss inside the block. Each module's training flag and the config
    are restored at its end.

    bitsandbytes' 4-bit layers repack their weights inside only with `repacking`, as in normal inference.
    """
    # An encoder-decoder passes the choice of its own config on to its decoder.
    config: Any = stack.config
    whole: Any = getattr(stack.model, "config", None)
    with modes_restored(stack.model), measuring_config(config), measuring_config(whole):
        stack.model.eval()
        with nullcontext() if repacking else without_repacking(stack.model):
            yield


def progress(items: Iterable[Item], title: str, show: bool, total: int | None = None) -> Any:
    """A progress bar that disappears when it is finished; without a terminal, a line every half minute.

    There is none if the Hub's progress bars are disabled (HF_HUB_DISABLE_PROGRESS_BARS, `hf-cod --quiet`), or inside
    of the work that another bar shows.
    """
    nested = any(not bar.disable for bar in _BARS)
    wanted = show and not nested and not are_progress_bars_disabled()
    bar: Any
    if wanted and not sys.stderr.isatty() and not _IN_NOTEBOOK:
        bar = _Lines(items, desc=title, total=total, delay=INTERVAL, mininterval=INTERVAL, miniters=1)
    else:
        bar = tqdm(items, desc=title, disable=None if wanted else True, leave=False, total=total)
    _BARS.add(bar)
    return bar


class _Lines(std.tqdm):
    """Progress as lines of text, for a log file."""

    disable: bool

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Prints how much is done, and an estimate of the time left."""
        done = self.format_dict
        left = ""
        if done["total"] and self.n:
            seconds = done["elapsed"] / self.n * (done["total"] - self.n)
            left = f" of {done['total']}, about {self.format_interval(seconds)} left"
        print(f"{self.desc}: {self.n}{left}", file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        """Prints nothing; the work says itself what it has done."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


@contextmanager
def busy(title: str, show: bool = True) -> Iterator[None]:
    """Shows a progress bar (see `progress`) while the block runs."""
    bar = iter(progress((None,), title, show))
    next(bar)
    try:
        yield
    finally:
        next(bar, None)


def hidden_place(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str:
    """Where the input hidden state of a layer is among its arguments: 0, or the keyword.

    Without positional arguments it is `hidden_states`, or else the one floating-point tensor, whatever its keyword.

    Raises:
        ValueError: there is no such tensor, or more than one.
    """
    if args:
        return 0
    if "hidden_states" in kwargs:
        return "hidden_states"
    found = [name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if len(found) == 1:
        return found[0]
    got = f"{len(found)} floating-point tensors among the keywords {', '.join(kwargs) or 'none'}"
    raise ValueError(f"model: expected layers with one hidden state as their input, got {got}")


def hidden_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input hidden state of a layer, see `hidden_place`."""
    place = hidden_place(args, kwargs)
    return args[0] if isinstance(place, int) else kwargs[place]


def with_hidden(args: Sequence[Any], kwargs: Mapping[str, Any], x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer with another input hidden state, see `hidden_place`."""
    place = hidden_place(args, kwargs)
    return ((x, *args[1:]), {**kwargs}) if isinstance(place, int) else ((), {**kwargs, place: x})


def are_tokens_first(shape: Sequence[int], samples: int, tokens: int | None, square: bool = False) -> bool:
    """Whether hidden states (., ., d) begin with the tokens and not with the samples, as in XLNet.

    Args:
        shape: their shape.
        samples, tokens: numbers; None: unknown.
        square: the answer if both are equal, see `has_tokens_first`.
    """
    return tuple(shape[:-1]) == (tokens, samples) and (samples != tokens or square)


def one_vector(x: Tensor, samples: int, tokens: int | None, square: bool = False) -> Tensor:
    """(S, T, d): hidden states with one vector per token. The residual streams of a token, of a model that has several
    (mHC, AltUp), become one vector, so that measures count what a layer does to each of them. Packed tokens without a
    sample axis, such as the patches of all images, are one sample.

    Args:
        x: (S, T, d) or (T, S, d), or (S, T, n, d) or (n, S, T, d) with n streams; or (N, d), packed, if T is unknown.
        samples: S.
        tokens: T, None if it is unknown.
        square: whether x is (T, S, d) if S = T.
    """
    if x.dim() == 2 and tokens is None:
        return x[None]
    if are_tokens_first(x.shape, samples, tokens, square):
        return x.transpose(0, 1)
    if x.dim() == 4 and len(x) == samples and tokens in (None, x.shape[1]):
        return x.flatten(2)
    if x.dim() == 4 and x.shape[1] == samples and tokens in (None, x.shape[2]):
        return x.movedim(0, 2).flatten(2)
    return x


def hidden_output(output: Any) -> Tensor:
    """The output hidden state of a layer, which returns it alone or first in a tuple.

    Raises:
        ValueError: the layer returns something else, such as two streams by name.
    """
    # A model reads a named tuple by its names, which a plain one in its place would lack.
    found = output[0] if type(output) in (tuple, list) and output else output
    if isinstance(found, Tensor):
        return found
    raise ValueError(f"model: expected {STATE_RETURNED}, got ones that return {described_output(output)}")


def described_output(output: Any) -> str:
    """What a layer returned, with the names of its parts."""
    names = getattr(output, "_fields", None) or (list(output) if isinstance(output, Mapping) else None)
    return type(output).__name__ + (f" of {', '.join(map(str, names))}" if names else "")


def tensors_of(value: Any, at: Place = (), by_layer: tuple[int, ...] = ()) -> Iterator[tuple[Place, Tensor]]:
    """Place -> tensor inside of tuples, lists and dicts; lists of one entry for each layer are left out."""
    if isinstance(value, Tensor):
        yield at, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from tensors_of(each, (*at, key), by_layer)
    elif isinstance(value, (tuple, list)) and len(value) not in by_layer:
        for key, each in enumerate(value):
            yield from tensors_of(each, (*at, key), by_layer)
