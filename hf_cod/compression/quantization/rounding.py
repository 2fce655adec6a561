"""Quantizes one matrix, or those of the experts of a bank, to the tensors of their module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_cod.analysis.statistics.input_products import ProductsRecorder
from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.compression.quantization.experts import QuantizedExperts, joined
from hf_cod.compression.quantization.format import pack_nibbles, pack_planes, stored_columns
from hf_cod.compression.quantization.linear import Linear3bit
from hf_cod.compression.quantization.product import decoded_matrix
from hf_cod.compression.quantization.settings import StorageSettings
from hf_cod.compression.quantization.widths import Width
from hf_cod.functional import codebook
from hf_cod.functional.damping import LEAST_TOKENS, shrunk
from hf_cod.functional.products import output_energy
from hf_cod.layers.experts import ExpertMatrix
from hf_cod.layers.orientation import is_transposed, shape_of
from hf_cod.models.expert_parameters import parameters_of


def round_matrix(
    W: Tensor,
    bits: int,
    storage: StorageSettings,
    name: str,
    squares: Tensor | None = None,
    products: Tensor | None = None,
) -> dict[str, Tensor]:
    """Chooses scales, rounds them to their stored form, and rounds the weights with these scales.

    | given | scales | codes |
    |---|---|---|
    | nothing | the largest magnitude of each block | nearest |
    | squares | least error, weighted by the squares | nearest |
    | products | the same, with the products' diagonal | nearest, with error compensation (GPTQ) |

    Args:
        W: (out, in), any floating dtype.
        bits: 3 or 4.
        storage: block, and how scales are stored.
        name: of the matrix, for error messages.
        squares: sum over tokens of x_j^2, (in,).
        products: X^T X, (in, in).

    Returns:
        {"weight": codes, "scales.absmax": ..., ...} as `new_module` names them.

    Raises:
        ValueError: NaN or infinity in W; a rounded scale that exceeds the range of W's dtype (float16).
    """
    from hf_cod.compression.quantization.bnb_decoding import dequantize_scales, quantize_scales

    largest = torch.finfo(W.dtype).max
    W = W.to(torch.promote_types(W.dtype, torch.float32)).contiguous()
    if not W.isfinite().all():
        raise ValueError(f"weights: expected finite numbers, got NaN or infinity in {name}")
    missing = stored_columns(W.shape[1], storage.block) - W.shape[1]
    if missing:
        W = pad(W, (0, missing))
        squares = None if squares is None else pad(squares, (0, missing))
        products = None if products is None else pad(products, (0, missing, 0, missing))
    weights = products.diagonal() if products is not None else squares
    if weights is None or not weights.any():
        s = codebook.largest_scales(W, bits, storage.block)
    else:
        s = codebook.search_scales(W, bits, storage.block, weights.to(W.device))
    stored = quantize_scales(s, storage.double_quant)
    known = dequantize_scales(stored["absmax"], stored.get("nested_absmax"), stored.get("offset"))
    if known.numel() and known.abs().max() > largest:
        raise ValueError(
            f"weights: expected scales within the model's dtype, got {float(known.abs().max()):.6g} > {largest:g} in "
            f"{name}; load it in bfloat16 or float32"
        )
    s = known.to(W.dtype).view(s.shape)
    if products is None:
        c = codebook.nearest_codes(W, s, bits, storage.block)
    else:
        c = codebook.compensated_codes(W, s, products, bits, storage.block)
    weight = pack_planes(c) if bits == 3 else pack_nibbles(c).view(-1, 1)
    return {"weight": weight, **{f"scales.{key}": tensor for key, tensor in stored.items()}}


class Rounding:
    """Rounds a matrix, or those of the experts of a bank, with what is known of their inputs.

    Attributes:
        unseen, few: names of matrices that no token entered, and of those of experts that fewer tokens entered than
            `LEAST_TOKENS` of their input channels: these get weighted scales and nearest codes. H of other experts is
            `shrunk` by their tokens.
        lost, energy: sum over experts of || X (W - Q)^T ||_F^2 and of || X W^T ||_F^2; 0 without tokens.

    Args:
        name: of the matrix.
        widths: the bits, those of each expert of a bank.
        storage: block, and how scales are stored.
        statistics: for the scales; None: the largest magnitudes.
        sums: products of inputs; None without error compensation.
    """

    def __init__(
        self,
        name: str,
        widths: list[int],
        storage: StorageSettings,
        statistics: LayerStatistics | None,
        sums: ProductsRecorder | None = None,
    ) -> None:
        self._name, self._widths, self._storage, self._statistics, self._sums = name, widths, storage, statistics, sums
        self.unseen: list[str] = []
        self.few: list[str] = []
        self.lost = self.energy = 0.0

    def of_experts(self, W: Tensor) -> dict[str, Tensor]:
        """The tensors of `QuantizedExperts` for W (experts, out, in)."""
        return joined([self.of_matrix(W[expert], expert) for expert in range(len(W))], self._widths)

    def of_matrix(self, W: Tensor, expert: int | None) -> dict[str, Tensor]:
        """See `round_matrix`. With `expert`, W is that expert's matrix."""
        statistics, sums = self._statistics, self._sums
        name = self._name if expert is None else f"{self._name}.{expert}"
        squares = None if statistics is None else statistics.of(self._name, expert)
        products = None if sums is None else sums.of(self._name, expert)
        H = products
        if sums is not None and products is None:
            self.unseen.append(name)
        elif sums is not None and products is not None and expert is not None:
            tokens = sums.count(self._name, expert)
            H = shrunk(products, tokens)
            if tokens < LEAST_TOKENS * W.shape[1]:
                self.few.append(name)
                squares, H = products.diagonal(), None
        bits = self._widths[expert or 0]
        tensors = round_matrix(W, bits, self._storage, name, squares, H)
        if products is not None:
            self._compare(W.to(products.dtype), tensors, bits, products)
        return tensors

    def _compare(self, W: Tensor, tensors: dict[str, Tensor], bits: int, products: Tensor) -> None:
        scales = tensors["scales.absmax"], tensors.get("scales.nested_absmax"), tensors.get("scales.offset")
        codes = tensors["weight"].view(len(W), -1)
        Q = decoded_matrix(codes, scales, bits, self._storage.block, W.dtype)[:, : W.shape[1]]
        self.energy += output_energy(W, products)
        self.lost += output_energy(Q.sub_(W), products)


def new_module(linear: Any, bits: int, storage: StorageSettings, compute_dtype: torch.dtype | None = None) -> Any:
    """An empty module, on the meta device, that replaces a Linear or Conv1D and shares its bias."""
    from hf_cod.compression.quantization.bnb import Linear4bit

    rows, columns = shape_of(linear)
    made: Any = (Linear3bit if bits == 3 else Linear4bit)(
        columns,
        rows,
        bias=False,
        block=storage.block,
        double_quant=storage.double_quant,
        compute_dtype=compute_dtype,
        device="meta",
    )
    made.register_parameter("bias", linear.bias)
    made.was_transposed = is_transposed(linear)
    # Otherwise transformers would initialize the weight, as that of a Linear.
    for module in (made, made.scales):
        module._is_hf_initialized = True
    return made.train(linear.training)


def new_experts(
    matrix: ExpertMatrix, bits: Width, storage: StorageSettings, compute_dtype: torch.dtype | None = None
) -> QuantizedExperts:
    """An empty module, on the meta device, that replaces the parameter of one matrix of each expert."""
    place = [key for key, _ in parameters_of(matrix.module)].index(matrix.key)
    parameter = matrix.parameter
    return QuantizedExperts(
        parameter.shape,
        matrix.experts,
        matrix.transposed,
        place,
        parameter.dtype,
        bits,
        block=storage.block,
        double_quant=storage.double_quant,
        compute_dtype=compute_dtype,
        device="meta",
    )


def fill(module: Any, tensors: dict[str, Tensor]) -> None:
    """Assigns the tensors of `round_matrix` to the module.

    Raises:
        ValueError: names, dtypes or shapes are not those of the module; its kernels rely on them.
    """
    from hf_cod.compression.quantization.bnb import Linear4bit

    expected = {name: (t.dtype, tuple(t.shape)) for name, t in module.state_dict().items() if name != "bias"}
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(f"{name}: expected {expected.get(name, 'nothing')}, got {found.get(name, 'nothing')}")
    for name, tensor in tensors.items():
        owner = module.scales if name.startswith("scales.") else module
        setattr(owner, name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    if isinstance(module, Linear4bit):
        module.bind()
