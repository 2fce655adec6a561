"""Whether parameters are whole: FSDP and DeepSpeed hold shards of them, which cannot be trained layer by layer."""

from __future__ import annotations

from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
SHARDED = (
    "model: expected whole parameters, got sharded ones (FSDP, DeepSpeed of any stage); train replicas (DDP) instead, "
    "for which a few active layers leave room"
)


def refuse_shards(model: nn.Module) -> None:
    """Raises where parameters are shards, or will be.

    Raises:
        ValueError: FSDP 1 or 2, DeepSpeed, or accelerate is about to shard what it prepares.
    """
    planned = is_initialized() and AcceleratorState().distributed_type in _SHARDING
    wrapped = any(isinstance(m, FullyShardedDataParallel) for m in model.modules())
    if planned or wrapped or any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(SHARDED)
