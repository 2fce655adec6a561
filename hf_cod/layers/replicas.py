"""Replicas of one model in several processes: all start with the same weights and settings, or all fail."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_cod.io.display import first_line

# Seconds that a process waits for the others at the same line of code. torch's own limits are 10 minutes (NCCL) and 30
# (gloo); if a process raises before that line, or does not reach it, the others shall end within a minute.
# Processes exchange values over torch's rendezvous store and not by a collective: the store has a limit per call, does
# not require a GPU, and does not confuse the call with another collective of a process on another code path, which
# would make gloo abort.
LIMIT = 50.0
# The collectives on gradients and weights have only torch's limit: one process may save a checkpoint for minutes while
# the others wait in the next backward pass, as DDP does. gloo reports a process that raised and ended at once, and a
# launcher ends processes that wait in NCCL.
_COUNT = itertools.count()  # never restarts, because the store and its keys outlive a process group


def processes() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the only one or has rank 0, also where accelerate does not know of the others."""
    return processes() == 1 or dist.get_rank() == 0


@contextmanager
def together(what: str, limit: float | None = None) -> Iterator[dict[str, Any]]:
    """A block that all processes run. If it fails in one process, or values differ, it fails in all.

    Args:
        what: description of the block for messages, such as "make an OwLoreAdamW".
        limit: seconds to wait for the others at the end of the block; None: `LIMIT`.

    Yields:
        A dictionary for the values that must be equal in all processes: field -> JSON-like value.

    Raises:
        ValueError: in each process: values differ, the block failed in another process, or another process did not
            reach its end.
    """
    values: dict[str, Any] = {}
    if processes() == 1:
        yield values
        return
    failure = None
    try:
        yield values
    except Exception as error:
        failure = error
    message = None if failure is None else first_line(failure)
    found = _exchange({"what": what, "failure": message, "values": {} if message else values}, limit or LIMIT)
    if failure is not None:
        raise failure
    _compare(what, found)


@contextmanager
def first_process_first(limit: float | None = None) -> Iterator[None]:
    """A block that rank 0 runs before the others, which run it even if it fails there.

    accelerate's `main_process_first` waits only for processes that accelerate has joined.

    Args:
        limit: seconds that the others wait; None: `LIMIT`.

    Raises:
        ValueError: in the others: rank 0 did not reach the end of its block.
    """
    if processes() == 1:
        yield
        return
    store, key, limit = _store(), f"hf_cod/{next(_COUNT)}/first", limit or LIMIT
    if not is_first():
        try:
            store.wait([key], timedelta(seconds=limit))
        except RuntimeError as error:
            raise ValueError(f"processes: expected rank 0 first, got no answer from it in {limit:g} seconds") from error
    try:
        yield
    finally:
        if is_first():
            store.set(key, "done")


def broadcast_weights(model: nn.Module) -> None:
    """Copies weights and buffers of the first process to all others, as DistributedDataParallel does for its module.

    Raises:
        RuntimeError: another process ended.
    """
    if processes() == 1:
        return
    with torch.no_grad():
        for tensor in _tensors(model):
            flat = _on_wire(tensor.detach().contiguous().view(-1).view(torch.uint8))
            _finish(dist.broadcast(flat, src=0, async_op=True))
            if dist.get_rank() > 0:
                tensor.copy_(flat.to(tensor.device).view(tensor.dtype).view(tensor.shape))


def average(tensor: Tensor) -> None:
    """Replaces the tensor by its mean over all processes, in place; unchanged if there is only one.

    Raises:
        RuntimeError: another process ended.
    """
    if processes() > 1:
        tensor.div_(processes())
        _finish(dist.all_reduce(tensor, async_op=True))


def digest_structure(model: nn.Module) -> str:
    """A hash of the parameters and buffers of a model: names, shapes, dtypes and requires_grad."""
    named = (*model.named_parameters(), *model.named_buffers())
    rows = [[name, [*t.shape], str(t.dtype), t.requires_grad] for name, t in named]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def digest_bits(tensors: Iterable[Tensor]) -> str:
    """A hash of the tensors from sums of their bits, which take little time compared with a training step."""
    sums = []
    for tensor in tensors:
        if tensor.numel() and not tensor.is_meta:
            bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
            sums.append(bits.sum(dtype=torch.int64).cpu())
    return hashlib.sha256(json.dumps([int(value) for value in sums]).encode()).hexdigest()[:16]


def digest_weights(model: nn.Module) -> str:
    """`digest_bits` of all tensors that `broadcast_weights` copies."""
    return digest_bits(_tensors(model))


def refuse_wrapped(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Raises if DistributedDataParallel averages all these parameters, because it fails when one is frozen later.

    Raises:
        ValueError: DistributedDataParallel is inside the model, or wraps it.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(_WRAPPED)
    if processes() == 1:
        return
    ours = {id(p) for p in parameters}
    if any(_averages(wrapper, ours) for wrapper in _wrappers()):
        gc.collect()  # unreferenced wrappers remain in memory in reference cycles
        if any(_averages(wrapper, ours) for wrapper in _wrappers()):
            raise ValueError(_WRAPPED)


_WRAPPED = (
    "model: expected one that is not yet in DistributedDataParallel, got one that is; create the optimizer first, then "
    "wrap the model (and delete wrappers of earlier trainings)"
)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _wrappers() -> list[DistributedDataParallel]:
    # A module has no reference to its wrapper. `type` instead of isinstance, since proxies do work on __class__.
    return [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]


def _averages(wrapper: DistributedDataParallel, ours: set[int]) -> bool:
    names = {name for name, p in wrapper.module.named_parameters(remove_duplicate=False) if id(p) in ours}
    # An earlier OwLoreAdamW makes DistributedDataParallel ignore some of them.
    return bool(names) and names.isdisjoint(wrapper.parameters_to_ignore)


def _exchange(mine: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    """The values of all processes, by rank."""
    number = next(_COUNT)
    store, keys = _store(), [f"hf_cod/{number}/{rank}" for rank in range(processes())]
    store.set(keys[dist.get_rank()], json.dumps(mine, default=str))
    try:
        store.wait(keys, timedelta(seconds=limit))
    except RuntimeError as error:
        missing = [str(rank) for rank, key in enumerate(keys) if not _is_there(store, key)]
        raise ValueError(
            f"processes: expected all {len(keys)} to {mine['what']}, got no answer in {limit:g} seconds from rank "
            f"{', '.join(missing) or '0'}"
        ) from error
    return [json.loads(store.get(key)) for key in keys]


def _compare(what: str, found: list[dict[str, Any]]) -> None:
    """Raises the same error in each process if values differ."""
    for rank, other in enumerate(found):
        if other["failure"] is not None:
            raise ValueError(f"processes: expected all to {what}, got a failure of rank {rank}: {other['failure']}")
    for rank, other in enumerate(found):
        if other["what"] != found[0]["what"]:
            raise ValueError(
                f"processes: expected all to do the same, got rank 0 to {found[0]['what']} and rank {rank} to "
                f"{other['what']}"
            )
        _compare_values(found[0]["values"], other["values"], rank)


def _compare_values(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> None:
    for name in dict.fromkeys([*first, *other]):
        if first.get(name) != other.get(name):
            raise ValueError(
                f"{name}: expected the same on all processes, got {_short(first.get(name))} on rank 0 and "
                f"{_short(other.get(name))} on rank {rank}"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _is_there(store: Any, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except RuntimeError:  # the store's server ended with the first process
        return False


def _finish(work: Any) -> None:
    """Waits for a collective. On a GPU the host does not wait, so that no gradient costs a synchronization."""
    try:
        work.wait()
    except RuntimeError as error:
        raise RuntimeError(f"processes: expected all to continue, got one that ended ({first_line(error)})") from error


def _on_wire(flat: Tensor) -> Tensor:
    """The tensor on a device of the backend: NCCL alone does not communicate CPU tensors."""
    backends = dist.get_backend_config()
    return flat.to(torch.accelerator.current_accelerator()) if flat.is_cpu and "cpu" not in backends else flat


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Each parameter and buffer once, and the scales that bitsandbytes stores next to its codes."""
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        for part in (tensor, *_beside_codes(tensor)):
            # A tensor expanded from one number (an inactive adapter) is 0.
            expanded = any(step == 0 and size > 1 for step, size in zip(part.stride(), part.shape, strict=True))
            if part.numel() and not part.is_meta and not expanded and id(part) not in seen:
                seen.add(id(part))
                yield part


def _beside_codes(tensor: Any) -> Iterator[Tensor]:
    if isinstance(getattr(tensor, "SCB", None), Tensor):
        yield tensor.SCB
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, getattr(state, "offset", None)) if isinstance(t, Tensor))
        state = getattr(state, "state2", None)
