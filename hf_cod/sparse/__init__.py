"""Models with many zeros, stored without them and run faster for it on CPUs."""

from hf_cod.sparse.config import SparseConfig
from hf_cod.sparse.linear import SparseLinear
from hf_cod.sparse.quantizer import SparseQuantizer, pack_sparse

__all__ = ["SparseConfig", "SparseLinear", "SparseQuantizer", "pack_sparse"]
