"""LayerStatistics: sums of squares of the inputs of each matrix, one per channel, collected in one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from hf_cod.analysis.statistics.file_checks import check_shapes, check_values
from hf_cod.analysis.statistics.matrix_inputs import MatrixInputs, check_finite_input
from hf_cod.functional.depth import wide
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import OldAttribute, renamed
from hf_cod.io.reading import naming_file, open_tensors, read_bytes
from hf_cod.io.schema import brief, is_path
from hf_cod.io.settings import SampleFields, SampleSettings
from hf_cod.io.tensors import save_tensors
from hf_cod.io.text import BatchStream, Texts, Tokenizer
from hf_cod.layers.batches import batches_of, required
from hf_cod.layers.checks import name_of, warn_of_other_name
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.inputs import InputCheck
from hf_cod.layers.running import evaluation_mode, naming_weights, progress
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import model_inputs

FORMAT_VERSION = "1"
# Numbers that are squared at a time: 4 MiB of memory, and enough work for all threads.
CHUNK = 1 << 20


@renamed(path="layers_path")
@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums over all input tokens of each matrix of a model's layers.

    Attributes:
        model: the model's name.
        layers_path: module name of the stack of layers.
        squares: matrix's name -> sum over tokens of x_j^2, float64 (in,), so that ||X_j||_2 is its square root;
            (experts, in) for a matrix of a bank of experts, where each expert's sum is over the tokens routed to it.
        tokens: matrix's name -> number of input tokens, int64, () or (experts,).
    """

    model: str
    layers_path: str
    squares: dict[str, Tensor]
    tokens: dict[str, Tensor]

    path = OldAttribute("layers_path")

    @property
    def unseen(self) -> dict[str, list[int]]:
        """Matrices without input tokens: name -> indices of the experts, or an empty list for a plain matrix."""
        return {
            name: (count == 0).nonzero().flatten().tolist() if count.dim() else []
            for name, count in self.tokens.items()
            if (count == 0).any()
        }

    def of(self, name: str, expert: int | None = None) -> Tensor | None:
        """(in,): the sum of squares of a matrix, or of one of its experts; None if no token entered it."""
        return _entry(self.squares, self.tokens, name, expert)

    def digests(self) -> dict[str, str]:
        """Matrix's name -> hash of its sums, by which a resumed run identifies them."""
        return {name: sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in self.squares.items()}

    @classmethod
    @checked
    def merge(cls, parts: Sequence[LayerStatistics]) -> LayerStatistics:
        """The statistics of all parts together, equal to those of one pass over all samples. Parts may come from
        different batches, processes (`torch.distributed.all_gather_object`) or files.

        Raises:
            ValueError: no parts, or parts of different models.
        """
        if not parts:
            raise ValueError("parts: expected at least one, got none")
        first = parts[0]
        for part in parts[1:]:
            if (part.model, part.layers_path) != (first.model, first.layers_path):
                raise ValueError(
                    f"parts: expected those of one model, got those of {first.model} ({first.layers_path}) and "
                    f"{part.model} ({part.layers_path}); give them one name by collect_statistics(..., name=...)"
                )
            _check_same(_shapes(first), _shapes(part), "parts", first.model, part.model)
        return cls(
            first.model,
            first.layers_path,
            {name: torch.stack([part.squares[name] for part in parts]).sum(0) for name in first.squares},
            {name: torch.stack([part.tokens[name] for part in parts]).sum(0) for name in first.tokens},
        )

    def check(self, stack: DecoderLayers) -> None:
        """Checks that these are statistics of that model; warns if only its name differs.

        Raises:
            ValueError: a matrix is missing, unknown, or has another number of input channels.
        """
        expected = {name: shape for i in range(len(stack)) for name, shape in stack.input_shapes(i).items()}
        _check_same(expected, _shapes(self), "statistics", type(stack.model).__name__, self.model)
        warn_of_other_name("statistics", self.model, stack)

    @checked
    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file (to a temporary name, then renamed); returns its path."""
        tensors = {f"squares/{name}": tensor for name, tensor in self.squares.items()}
        tensors |= {f"tokens/{name}": tensor for name, tensor in self.tokens.items()}
        metadata = {"format": FORMAT_VERSION, "model": self.model, "layers_path": self.layers_path}
        return save_tensors(path, tensors, metadata)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> LayerStatistics:
        """Reads a file of `save`.

        Raises:
            ValueError: no such file, another kind of file, or invalid sums and counts (negative, not finite, missing).
        """
        with open_tensors(path, "statistics", "a file of statistics") as file:
            metadata = file.metadata() or {}
        layers_path = metadata.get("layers_path", metadata.get("path"))  # its name in version 0.1
        if (written := metadata.get("format")) != FORMAT_VERSION or layers_path is None or "model" not in metadata:
            raise ValueError(f"statistics: expected format {FORMAT_VERSION}, got {brief(written)} in {str(path)!r}")
        kinds: dict[str, dict[str, Tensor]] = {"squares": {}, "tokens": {}}
        raw = read_bytes(path, "statistics")
        with naming_file(path):
            for key, tensor in load_tensors(raw).items():  # faster than reading them one by one
                kind, _, name = key.partition("/")
                if kind not in kinds or not name or is_path(name):
                    raise ValueError(f"statistics: expected squares/NAME and tokens/NAME, got {brief(key)}")
                kinds[kind][name] = tensor
            check_shapes(**kinds)
            check_values(raw, **kinds)
        return cls(metadata["model"], layers_path, **kinds)


@renamed(path="layers_path")
@checked
def collect_statistics(
    model: nn.Module,
    batches: BatchStream | None = None,
    *,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    layers_path: str | None = None,
    name: str | None = None,
    show_progress: bool = False,
    samples: SampleSettings | None = None,
    **fields: Unpack[SampleFields],
) -> LayerStatistics:
    """Collects LayerStatistics in one forward pass per batch, without the head.

    Only a sum of squares per input channel is kept in memory.

    Args:
        model: a transformers model, wrapped or not, in any dtype, also quantized or offloaded by accelerate.
        batches: dicts for the model's forward; `token_batches` makes them from texts. attention_mask (S, T) marks
            padding, which is not counted.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        layers_path: the stack's module name, if it cannot be found.
        name: the model's name; default: where it was loaded from.
        show_progress: show a progress bar.
        **fields: or fields of `SampleSettings` by name: sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: no layers found, no batches, NaN or infinite activations (says in which module first), a module
            shared by two layers, a mixture of experts that cannot be observed.
    """
    stack = find_decoder_layers(model, layers_path)
    batches = required(batches_of(model, batches, tokenizer, texts, samples, fields))
    recorder, checked = StatisticsRecorder(stack), InputCheck(stack.model)
    device = execution_device(stack.model)
    seen = 0
    with torch.no_grad(), naming_weights(stack.model), evaluation_mode(stack), recorder.attached():
        for number, batch in enumerate(progress(batches, "statistics", show_progress)):
            checked.check(batch, number)  # one by one, since batches may come from a stream
            inputs = model_inputs(to_device(batch, device))
            recorder.start(inputs)
            stack.trunk(**inputs)
            recorder.finish(number)
            seen += 1
    if not seen:
        raise ValueError("batches: expected at least one, got none")
    found = name or name_of(stack)
    return LayerStatistics(found, stack.layers_path, recorder.squares, recorder.tokens)


class StatisticsRecorder:
    """Sums the squares of the inputs of each matrix.

    Call `start` before and `finish` after each forward pass, within `attached`.

    Args:
        stack: the layers.
        layers: indices of the layers to record; default: all.
    """

    def __init__(self, stack: DecoderLayers, layers: Iterable[int] | None = None) -> None:
        chosen = list(range(len(stack)) if layers is None else layers)
        self._inputs = MatrixInputs(stack, chosen, self._read)
        shapes = {name: shape for i in chosen for name, shape in stack.input_shapes(i).items()}
        self.squares = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.tokens = {name: torch.zeros(shape[:-1], dtype=torch.int64) for name, shape in shapes.items()}

    def attached(self) -> AbstractContextManager[None]:
        """Adds the hooks to the modules, and removes them at the end of the block."""
        return self._inputs.attached()

    def start(self, inputs: Mapping[str, Any]) -> None:
        """Starts a batch with the inputs of the model, whose masks say which tokens are padding."""
        self._inputs.start(inputs)
        self._batch: list[tuple[str, int | None, Tensor, int]] = []
        self._last: tuple[Tensor, int] = torch.zeros(0), 0

    def finish(self, number: int) -> None:
        """Ends a batch: checks it and adds it to the sums."""
        for name, expert, squares, count in self._batch:
            squares = squares.cpu().double()
            check_finite_input(squares, name, number)
            index = ... if expert is None else expert
            self.squares[name][index] += squares
            self.tokens[name][index] += count

    def of(self, name: str, expert: int | None = None) -> Tensor | None:
        """(in,): the sum of squares of a matrix, or of one of its experts; None if no token entered it."""
        return _entry(self.squares, self.tokens, name, expert)

    def _read(self, name: str, expert: int | None, rows: Tensor | None, source: str) -> None:
        found = self._last if rows is None else (_sum_of_squares(rows), len(rows))
        if expert is None:  # experts may run between matrices that share an input
            self._last = found
        self._batch.append((name, expert, *found))


def _sum_of_squares(rows: Tensor) -> Tensor:
    """(N, in) -> (in,): in float32 within a chunk of rows, in float64 over chunks."""
    total = wide(torch.zeros(rows.shape[1], device=rows.device))
    high = torch.promote_types(rows.dtype, torch.float32)
    for chunk in rows.split(max(1, CHUNK // rows.shape[1])):
        total += chunk.to(high).square().sum(0)
    return total


def _entry(squares: dict[str, Tensor], tokens: dict[str, Tensor], name: str, expert: int | None) -> Tensor | None:
    index = ... if expert is None else expert
    return squares[name][index] if tokens[name][index] else None


def _shapes(statistics: LayerStatistics) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in statistics.squares.items()}


def _check_same(
    expected: dict[str, tuple[int, ...]], got: dict[str, tuple[int, ...]], field: str, wanted: str, given: str
) -> None:
    for name in (*expected, *got):
        if expected.get(name) != got.get(name):
            raise ValueError(
                f"{field}: expected those of {wanted}, with {name} {expected.get(name, 'absent')}, got those of "
                f"{given}, with {name} {got.get(name, 'absent')}"
            )
