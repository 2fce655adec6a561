"""The memory that a training step takes, by what it is for: counted from the storages that are alive."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.trainer_callback import TrainerCallback

PARTS = ("weights", "gradients", "optimizer state", "activations", "logits", "update")


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment when a training step needs most, by part.

    Attributes:
        weights: parameters and buffers of the model, adapters included.
        gradients: of the parameters that train.
        optimizer_state: moments and bases.
        activations: what forward and backward pass hold between and inside layers, inputs included.
        logits: what has the vocabulary as its last dimension, in each copy.
        update: what clipping, projection and update need for themselves.
    """

    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    logits: int
    update: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Part -> bytes."""
        return {name: getattr(self, name.replace(" ", "_")) for name in PARTS}


class LiveStorages(TorchDispatchMode):
    """Counts each storage from the operation that makes it until nothing refers to it any more.

    What an operation needs inside itself is not seen. On fake tensors nothing is computed: sizes are all there is, and
    questions for a number are answered by 1.

    Args:
        vocabulary: a last dimension of this size makes a tensor one of logits.
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary, self.phase = vocabulary, "activations"
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._parts: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and takes note of what it made."""
        if function is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return 1
        if function is torch.ops.aten._grouped_mm.default and _is_fake(args[0]):
            result = _grouped_mm(*args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def add(self, tensors: Iterable[Tensor], part: str | None = None) -> None:
        """Counts storages that are not counted yet; with `part`, those that are change to it."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            known = self._parts.get(key)
            if known is None:
                weakref.finalize(storage, self._free, key).atexit = False
            elif part is None or known[0] == part:
                continue
            else:
                self.now[known[0]] -= known[1]
            self._parts[key] = (part or self._part_of(tensor), storage.nbytes())
            self.now[self._parts[key][0]] += storage.nbytes()
        if self.now.total() >= self.peak.total():  # of equal peaks the last one, which knows the optimizer's state
            self.peak = self.now.copy()

    def memory(self) -> Memory:
        """What was alive at the peak."""
        return Memory(**{name.replace(" ", "_"): self.peak[name] for name in PARTS})

    def _part_of(self, tensor: Tensor) -> str:
        is_logits = self.phase == "activations" and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
        return "logits" if is_logits else self.phase

    def _free(self, key: int) -> None:
        part, size = self._parts.pop(key)
        self.now[part] -= size


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    *,
    steps: int = 2,
    accumulation: int = 1,
    max_grad_norm: float = 1.0,
    entered: Callable[[str], None] = lambda phase: None,
) -> None:
    """Training steps as Trainer makes them; tells `entered` which phase begins ("activations" or "update").

    Two show everything: the first one makes the optimizer's state, the second one has it beside all else.
    """
    model.train()
    for _ in range(steps):
        entered("activations")
        for _ in range(accumulation):
            model(**batch).loss.backward()
        entered("update")
        if max_grad_norm:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def count_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    *,
    accumulation: int = 1,
    max_grad_norm: float = 1.0,
) -> Memory:
    """Trains for two steps and counts; see `train_steps` for the arguments.

    Of accumulated forward passes the first two show everything: the second finds the gradients of the first. And only
    the second step needs them, which finds the optimizer's state besides.
    """
    config: Any = getattr(model, "config", None)
    counter = LiveStorages(getattr(config, "vocab_size", None))
    counter.add([*model.parameters(), *model.buffers()], "weights")
    counter.add(batch.values())

    def entered(phase: str) -> None:
        counter.add(state_of(optimizer), "optimizer state")
        counter.phase = phase

    with gradients_counted(model, counter), counter:
        for passes in (1, min(accumulation, 2)):
            train_steps(
                model, optimizer, batch, steps=1, accumulation=passes, max_grad_norm=max_grad_norm, entered=entered
            )
    return counter.memory()


@contextmanager
def gradients_counted(model: nn.Module, counter: LiveStorages) -> Iterator[None]:
    """Lets each gradient count as one from the moment when a parameter has it."""

    def mark(parameter: Tensor) -> None:
        if parameter.grad is not None:  # a fused update has taken it
            counter.add([parameter.grad], "gradients")

    handles = [p.register_post_accumulate_grad_hook(mark) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _grouped_mm(a: Tensor, b: Tensor, *others: Any, **named: Any) -> Tensor:
    """Of fake tensors, for which the operation knows bfloat16 alone; real ones it takes in any dtype."""
    product = torch.ops.aten._grouped_mm.default(a.bfloat16(), b.bfloat16(), *others, **named)
    return product.to(a.dtype)


def _is_fake(tensor: Tensor) -> bool:
    return tensor.untyped_storage().device.type == "meta"


class MemoryCallback(TrainerCallback):
    """Counts the second step that a run makes: the first one whose optimizer had its state from the beginning.

    Args:
        beside: other models in memory, whose weights count as weights.

    Attributes:
        memory: None until then.
    """

    def __init__(self, beside: Sequence[nn.Module] = ()) -> None:
        self._beside = beside
        self.memory: Memory | None = None
        self._steps = 0
        self._counter: LiveStorages | None = None
        self._attached = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Begins to count, if it is the second step."""
        self._steps += 1
        if self._steps != 2:
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of what was measured before the training
        model, optimizer = about["model"], about["optimizer"]
        counter = LiveStorages(getattr(model.config, "vocab_size", None))
        for each in (model, *self._beside):
            counter.add([*each.parameters(), *each.buffers()], "weights")
        counter.add(state_of(optimizer), "optimizer state")
        self._attached.enter_context(gradients_counted(model, counter))
        self._attached.enter_context(counter)
        self._counter = counter

    def on_pre_optimizer_step(self, *args: Any, **about: Any) -> None:
        """What comes now is for the update."""
        if self._counter is not None:
            self._counter.phase = "update"

    def on_step_end(self, *args: Any, **about: Any) -> None:
        """Ends counting."""
        self.close()
        if self._counter is not None:
            self.memory, self._counter = self._counter.memory(), None

    def close(self) -> None:
        """Takes away what counts; to be called behind a training, too, which may have ended within a step."""
        self._attached.close()

    def bytes_used(self) -> int | None:
        """Peak of the training on the current CUDA device, as its allocator tells; elsewhere of the step that was
        counted, if there was one.
        """
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated()
        return None if self.memory is None else self.memory.total
