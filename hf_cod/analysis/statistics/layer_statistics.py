"""LayerStatistics: sums of squares of the inputs of each matrix, one per channel, collected in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Unpack

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from hf_cod.analysis.statistics.file_checks import check_shapes, check_values
from hf_cod.analysis.statistics.imatrix import SUFFIX, read_imatrix, sums_of, write_imatrix
from hf_cod.analysis.statistics.squares_recorder import StatisticsRecorder, entry_of
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
        return entry_of(self.squares, self.tokens, name, expert)

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
    def save(self, path: str | Path, *, model: nn.Module | None = None) -> Path:
        """Writes a safetensors file or, if the path ends in ".gguf", an importance matrix for `llama-quantize`.

        An importance matrix has sums in float32 under the names of GGUF, and only those matrices that GGUF has names
        for; a warning lists the others. The gguf package is required.

        Args:
            path: the file; written to a temporary name, then renamed.
            model: the model of these statistics, which is checked; required for ".gguf", also without data (on the meta
                device).

        Returns:
            The path.

        Raises:
            ValueError: no model for ".gguf", statistics of another model, or a model without an architecture in GGUF.
        """
        stack = None if model is None else find_decoder_layers(model, self.layers_path)
        if stack is not None:
            self.check(stack)
        if Path(path).suffix == SUFFIX:
            return write_imatrix(path, _needed(stack), self.squares, self.tokens)
        tensors = {f"squares/{name}": tensor for name, tensor in self.squares.items()}
        tensors |= {f"tokens/{name}": tensor for name, tensor in self.tokens.items()}
        metadata = {"format": FORMAT_VERSION, "model": self.model, "layers_path": self.layers_path}
        return save_tensors(path, tensors, metadata)

    @classmethod
    @checked
    def load(
        cls, path: str | Path, *, model: nn.Module | None = None, layers_path: str | None = None
    ) -> LayerStatistics:
        """Reads a file of `save`, or the importance matrix (imatrix.gguf) of a model, from any source.

        Matrices without an entry in an importance matrix are `unseen`: OWL leaves them out. A warning lists them, and
        entries that are of no matrix. A matrix with the same input as another one (query, key and value; gate and up)
        has its entry, if its own is missing.

        Args:
            path: the file.
            model: the model of the statistics, which is checked; required for ".gguf", also without data (on the meta
                device).
            layers_path: for ".gguf", module name of the layer stack, if it cannot be found automatically.

        Raises:
            ValueError: no such file, another kind of file, or invalid sums and counts (negative, not finite, missing);
                no model for ".gguf", or statistics of another model.
        """
        if Path(path).suffix == SUFFIX:
            stack = _needed(None if model is None else find_decoder_layers(model, layers_path))
            return cls(name_of(stack), stack.layers_path, *sums_of(path, stack))
        found = cls._load(path)
        if model is not None:
            found.check(find_decoder_layers(model, found.layers_path))
        return found

    @classmethod
    def _load(cls, path: str | Path) -> LayerStatistics:
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
            inputs = model_inputs(stack.model, to_device(batch, device))
            recorder.start(inputs)
            stack.trunk(**inputs)
            recorder.finish(number)
            seen += 1
    if not seen:
        raise ValueError("batches: expected at least one, got none")
    if recorder.tokens and not any(bool(tokens.any()) for tokens in recorder.tokens.values()):
        raise ValueError(stack.not_run("others"))
    found = name or name_of(stack)
    return LayerStatistics(found, stack.layers_path, recorder.squares, recorder.tokens)


def check_file(path: str | Path) -> None:
    """Checks a file of statistics before its model is loaded.

    Raises:
        ValueError: as `LayerStatistics.load`, without what depends on the model.
    """
    if Path(path).suffix == SUFFIX:
        read_imatrix(path)
    else:
        LayerStatistics.load(path)


def _needed(stack: DecoderLayers | None) -> DecoderLayers:
    if stack is None:
        raise ValueError(f"model: expected the model of the statistics for a {SUFFIX} file, got none; pass model=model")
    return stack


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
