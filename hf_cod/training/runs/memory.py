"""Memory of a training step by part, counted from live storages."""

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

from hf_cod.io.bitsandbytes_advice import advice_silenced

with advice_silenced():  # of bitsandbytes, which is imported with PEFT
    from transformers.trainer_callback import TrainerCallback

PARTS = ("weights", "gradients", "optimizer state", "activations", "logits", "update")


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, by part.

    Attributes:
        weights: parameters and buffers of the model, including adapters.
        gradients: gradients of the trainable parameters.
        optimizer_state: moments and bases.
        activations: tensors of the forward and backward pass between and inside layers, including inputs.
        logits: tensors whose last dimension is the vocabulary, every copy.
        update: temporary tensors of clipping, projection and update.
    """

    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    logits: int
    update: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Part -> bytes."""
        return {name: getattr(self, name.replace(" ", "_")) for name in PARTS}


def training_memory(used: int | None, estimate: Memory | None = None) -> dict[str, Any]:
    """`results["training_memory"]` of a report: a step's peak, measured and estimated; None where unknown."""
    return {
        "used_bytes": used,
        "estimate_bytes": None if estimate is None else estimate.total,
        "estimate_parts": None if estimate is None else estimate.parts(),
    }


class LiveStorages(TorchDispatchMode):
    """Counts each storage from the operation that creates it until it is freed.

    Temporary memory inside an operation is not counted. On fake tensors nothing is computed: they have a size only, and
    reading a value from one (`.item()`) gives 1.

    Args:
        vocabulary: size of the last dimension by which a tensor counts as logits.
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary, self.phase = vocabulary, "activations"
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._parts: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts the storages of its results."""
        if function is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return 1
        if function is torch.ops.aten._grouped_mm.default and _is_fake(args[0]):
            result = _grouped_mm(*args, **(kwargs or {}))
        elif function is torch.ops.aten.split_with_sizes.default and _is_fake(args[0]):
            result = function(args[0], _sizes(*args), *args[2:], **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def add(self, tensors: Iterable[Tensor], part: str | None = None) -> None:
        """Counts new storages; with `part`, storages that are counted already are moved to that part."""
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
        if self.now.total() >= self.peak.total():  # of equal peaks the last one, which includes the optimizer's state
            self.peak = self.now.copy()

    def memory(self) -> Memory:
        """Bytes by part at the peak."""
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
    """Runs training steps as Trainer does; calls `entered` with each phase that begins ("activations" or "update").

    Two steps suffice for the peak: the first creates the optimizer's state, the second runs with it in memory.
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


@contextmanager
def gradients_counted(model: nn.Module, counter: LiveStorages) -> Iterator[None]:
    """Counts each tensor as a gradient as soon as it is accumulated in a parameter."""

    def mark(parameter: Tensor) -> None:
        if parameter.grad is not None:  # None after a fused update
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
    """The operation on fake tensors, for which it supports bfloat16 only; on real ones it supports every dtype."""
    product = torch.ops.aten._grouped_mm.default(a.bfloat16(), b.bfloat16(), *others, **named)
    return product.to(a.dtype)


def _sizes(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> list[int]:
    """The sizes of the parts of a fake tensor. Sizes that were read from a fake tensor, such as the tokens of each
    expert (JetMoE), are unknown and have another sum; all parts then have equal sizes, up to 1.
    """
    whole, parts = tensor.shape[dim], len(sizes)
    if sum(sizes) == whole:
        return [*sizes]
    return [whole * (part + 1) // parts - whole * part // parts for part in range(parts)]


def _is_fake(tensor: Tensor) -> bool:
    return tensor.untyped_storage().device.type == "meta"


class MemoryCallback(TrainerCallback):
    """Counts the memory of a run's second step, the first step that begins with the optimizer's state in memory.

    Args:
        beside: other models in memory, whose weights are counted, too.

    Attributes:
        memory: the result; None before the second step has ended.
    """

    def __init__(self, beside: Sequence[nn.Module] = ()) -> None:
        self._beside = beside
        self.memory: Memory | None = None
        self._steps = 0
        self._counter: LiveStorages | None = None
        self._attached = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Starts counting in the second step."""
        self._steps += 1
        if self._steps != 2:
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # excludes measurements before training
        model, optimizer = about["model"], about["optimizer"]
        counter = LiveStorages(getattr(model.config, "vocab_size", None))
        for each in (model, *self._beside):
            counter.add([*each.parameters(), *each.buffers()], "weights")
        counter.add(state_of(optimizer), "optimizer state")
        self._attached.enter_context(gradients_counted(model, counter))
        self._attached.enter_context(counter)
        self._counter = counter

    def on_pre_optimizer_step(self, *args: Any, **about: Any) -> None:
        """Starts the phase "update"."""
        if self._counter is not None:
            self._counter.phase = "update"

    def on_step_end(self, *args: Any, **about: Any) -> None:
        """Stops counting."""
        self.close()
        if self._counter is not None:
            self.memory, self._counter = self._counter.memory(), None

    def close(self) -> None:
        """Removes the hooks that count; must also be called after training, which may have ended within a step."""
        self._attached.close()

    def bytes_used(self) -> int | None:
        """Peak bytes of training, from the allocator of the current CUDA device; without CUDA, the total of the counted
        step, or None.
        """
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated()
        return None if self.memory is None else self.memory.total
