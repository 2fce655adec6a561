"""What the products H = X^T X of the inputs of a matrix say of its outputs."""

from __future__ import annotations

from torch import Tensor

# Numbers of a product that are in memory at a time.
CHUNK = 1 << 22


def output_energy(W: Tensor, H: Tensor) -> float:
    """|| X W^T ||_F^2 = tr(W H W^T), the energy of the outputs; of a difference of two matrices, that of their error.

    Args:
        W: (out, in).
        H: X^T X (in, in), in the dtype of W.
    """
    return sum(float(((rows @ H) * rows).sum()) for rows in W.split(max(1, CHUNK // max(1, W.shape[1]))))
