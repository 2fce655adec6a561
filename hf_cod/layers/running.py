"""How a model is run while it is measured: quietly, on its own device, and left as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_cod.layers.modes import cache_restored, modes_restored
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.stock_four_bit import without_repacking

Item = TypeVar("Item")


class NonFiniteError(ValueError):
    """Activations are NaN or infinite; the message says in which layer first.

    Args:
        state: index of the first broken hidden state; state l enters layer l, or leaves layer l - 1.
        batch: number of the batch.
    """

    def __init__(self, state: int, batch: int) -> None:
        where = f"the output of layer {state - 1}" if state else "the input of layer 0"
        super().__init__(f"activations: expected finite numbers, got NaN or infinity first in {where}, batch {batch}")


@contextmanager
def naming_weights(model: nn.Module) -> Iterator[None]:
    """Where the block fails on something that is not finite, looks whether a weight is the cause, and names its module.

    Raises:
        ValueError: the block's own, or that of the weight.
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
    """Eval mode and no KV cache inside; each module's training flag and the config come back afterwards.

    bitsandbytes' 4-bit layers repack their weights inside only with `repacking`, as they do where the model serves.
    """
    config: Any = stack.config
    with modes_restored(stack.model), cache_restored(config):
        stack.model.eval()
        if getattr(config, "use_cache", None) is not None:
            config.use_cache = False
        with nullcontext() if repacking else without_repacking(stack.model):
            yield


def progress(items: Iterable[Item], title: str, show: bool, total: int | None = None) -> Any:
    """A progress bar that goes away when it is done; none where there is no terminal, or where the Hub's are off
    (HF_HUB_DISABLE_PROGRESS_BARS, `hf-cod --quiet`).
    """
    wanted = show and not are_progress_bars_disabled()
    return tqdm(items, desc=title, disable=None if wanted else True, leave=False, total=total)


@contextmanager
def busy(title: str, show: bool = True) -> Iterator[None]:
    """A bar, as `progress` shows it, while the block does one thing that takes a while."""
    bar = iter(progress((None,), title, show))
    next(bar)
    try:
        yield
    finally:
        next(bar, None)


def hidden_input(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a layer was called with."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_output(output: Any) -> Tensor:
    """The hidden state that a layer returned, alone or as the first of several."""
    return output[0] if isinstance(output, (tuple, list)) else output
