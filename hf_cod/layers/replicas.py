"""Replicas of one model in several processes: all begin with the same weights and settings, or all refuse."""

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

# Seconds that a process waits for the others where all come to the same line of code. torch's own limits are 10 minutes
# (NCCL) and 30 (gloo); a process that raised before that line, or never comes to it, shall end the others in a minute.
# Processes meet over the store that they found each other by, and not by a collective: it has a limit of its own for
# each call, needs no GPU, and does not take another collective of a process that went another way for its own, which
# ends gloo by an abort.
LIMIT = 50.0
# The collectives on gradients and weights have no limit but torch's: one process may save a checkpoint for minutes, and
# the others are in the next backward pass, where DDP waits as well. gloo tells the others at once of a process that
# raised and ended, and a launcher ends those that wait in NCCL.
_COUNT = itertools.count()  # never begins anew: a store outlives a process group, and its keys a meeting


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def together(what: str, limit: float | None = None) -> Iterator[dict[str, Any]]:
    """A block that all processes run; where it fails on one, or ends with other values, it fails on all.

    Args:
        what: what it does, for the message: "make an OwLoreAdamW".
        limit: seconds to wait for the others behind the block; None: `LIMIT`.

    Yields:
        A dictionary, to put in what must be the same on all processes: field -> value that JSON can hold.

    Raises:
        ValueError: on each process: values differ, the block failed on another one, or another one did not come.
    """
    alike: dict[str, Any] = {}
    if processes() == 1:
        yield alike
        return
    failure = None
    try:
        yield alike
    except Exception as error:
        failure = error
    told = None if failure is None else _line(failure)
    found = _exchange({"what": what, "failure": told, "values": {} if told else alike}, limit or LIMIT)
    if failure is not None:
        raise failure
    _compare(what, found)


def broadcast_weights(model: nn.Module) -> None:
    """Gives each process the weights and buffers of the first, as DistributedDataParallel does with those that it sees.

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
    """The mean over all processes, in place; as it is where there is one.

    Raises:
        RuntimeError: another process ended.
    """
    if processes() > 1:
        tensor.div_(processes())
        _finish(dist.all_reduce(tensor, async_op=True))


def digest_structure(model: nn.Module) -> str:
    """Tells two models apart by their parameters and buffers: names, shapes, dtypes, and what trains."""
    named = (*model.named_parameters(), *model.named_buffers())
    rows = [[name, [*t.shape], str(t.dtype), t.requires_grad] for name, t in named]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def digest_bits(tensors: Iterable[Tensor]) -> str:
    """Tells tensors apart by sums of their bits, which take little beside a step."""
    sums = []
    for tensor in tensors:
        if tensor.numel() and not tensor.is_meta:
            bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
            sums.append(bits.sum(dtype=torch.int64).cpu())
    return hashlib.sha256(json.dumps([int(value) for value in sums]).encode()).hexdigest()[:16]


def digest_weights(model: nn.Module) -> str:
    """Of all that `broadcast_weights` makes the same."""
    return digest_bits(_tensors(model))


def refuse_wrapped(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Raises where DistributedDataParallel averages all these parameters, since it stops at one that freezes later.

    Raises:
        ValueError: it is in the model, or around it.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(_WRAPPED)
    if processes() == 1:
        return
    ours = {id(p) for p in parameters}
    if any(_averages(wrapper, ours) for wrapper in _wrappers()):
        gc.collect()  # one that nobody holds any more lives on in cycles
        if any(_averages(wrapper, ours) for wrapper in _wrappers()):
            raise ValueError(_WRAPPED)


_WRAPPED = (
    "model: expected one that is not yet in DistributedDataParallel, got one that is; make the optimizer first, then "
    "wrap the model (and delete a wrapper of an earlier training)"
)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _wrappers() -> list[DistributedDataParallel]:
    # A module does not know what wraps it. `type`, since proxies do work when they are asked for __class__.
    return [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]


def _averages(wrapper: DistributedDataParallel, ours: set[int]) -> bool:
    names = {name for name, p in wrapper.module.named_parameters(remove_duplicate=False) if id(p) in ours}
    return bool(names) and names.isdisjoint(wrapper.parameters_to_ignore)  # an earlier OwLoreAdamW's leaves some alone


def _exchange(mine: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    """What each process brought to this meeting, by rank."""
    number = next(_COUNT)
    store, keys = _store(), [f"hf_cod/{number}/{rank}" for rank in range(processes())]
    store.set(keys[dist.get_rank()], json.dumps(mine, default=str))
    try:
        store.wait(keys, timedelta(seconds=limit))
    except RuntimeError as error:
        missing = [str(rank) for rank, key in enumerate(keys) if not _is_there(store, key)]
        raise ValueError(
            f"processes: expected all {len(keys)} to {mine['what']}, got none in {limit:g} seconds from rank "
            f"{', '.join(missing) or '0'}"
        ) from error
    return [json.loads(store.get(key)) for key in keys]


def _compare(what: str, found: list[dict[str, Any]]) -> None:
    """Raises the same on each process where they differ."""
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


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _is_there(store: Any, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except RuntimeError:  # its server went with the first process
        return False


def _finish(work: Any) -> None:
    """Waits for a collective; on a GPU the host does not, which would cost each gradient a synchronization."""
    try:
        work.wait()
    except RuntimeError as error:
        raise RuntimeError(f"processes: expected all to go on, got one that ended ({_line(error)})") from error


def _on_wire(flat: Tensor) -> Tensor:
    """On a device that the processes talk about: NCCL alone takes nothing of the CPU."""
    talks = dist.get_backend_config()
    return flat.to(torch.accelerator.current_accelerator()) if flat.is_cpu and "cpu" not in talks else flat


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Each parameter and buffer once, and what bitsandbytes keeps beside its codes."""
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        for part in (tensor, *_beside_codes(tensor)):
            # One number that is shown as many (an adapter at rest) is 0.
            shown = any(step == 0 and size > 1 for step, size in zip(part.stride(), part.shape, strict=True))
            if part.numel() and not part.is_meta and not shown and id(part) not in seen:
                seen.add(id(part))
                yield part


def _beside_codes(tensor: Any) -> Iterator[Tensor]:
    if isinstance(getattr(tensor, "SCB", None), Tensor):
        yield tensor.SCB
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, getattr(state, "offset", None)) if isinstance(t, Tensor))
        state = getattr(state, "state2", None)
