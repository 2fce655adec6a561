"""hf-cod pack MODEL: store a pruned model without its zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cod.cli.output import one_directory, say_written, write_model
from hf_cod.cli.parser import SettingsParser, default_directory, model_title
from hf_cod.compression.sparse.settings import PackSettings
from hf_cod.io.settings import ModelSettings, as_in
from hf_cod.scoring.settings import ScoreSettings

if TYPE_CHECKING:
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.report import RunReport
    from hf_cod.layers.stack import DecoderLayers


@dataclass(kw_only=True)
class PackOptions(PackSettings):
    """Settings of packing and of the output directory."""

    output: str | None = field(
        default=None,
        metadata={"help": "new directory for the packed model and its report; default: the second argument"},
    )
    layers_path: str | None = as_in(ScoreSettings, "layers_path")


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        [ModelSettings, PackOptions],
        prog="hf-cod pack",
        description="Stores a pruned model without its zeros: one bit per weight, and the non-zero weights. "
        "from_pretrained loads the result if hf_cod is imported. Generation is faster than with the dense model on "
        "CPUs with AVX-512 or AVX2, and slower on other CPUs. The input model is never changed.",
    )
    parser.add_argument("model", help="Hub id or directory of a model with many zeros")
    parser.add_argument(
        "directory",
        nargs="?",
        metavar="output",
        help="new directory for the packed model and its report; default: hf-cod-pack-MODEL",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    loading, settings, rest = make_parser().parse(arguments)
    from hf_cod.io.output_checks import check_unused
    from hf_cod.io.output_directory import OutputDirectory

    directory = Path(one_directory(rest.directory, settings.output) or default_directory("pack", rest.model))
    told = ["pack", rest.model, asdict(loading), settings.min_sparsity, settings.layers_path]
    output = OutputDirectory(directory, told, check=check_unused, source=rest.model)
    write_model(output, partial(run, rest.model, loading, settings))
    say_written(directory)
    return 0


def run(source: str, loading: ModelSettings, settings: PackOptions, output: OutputDirectory) -> RunReport:
    """Packs a model and writes it to the results of `output`."""
    from hf_cod.cli.recorded import with_inputs
    from hf_cod.compression.sparse.quantizer import pack_sparse
    from hf_cod.io.models import load_model
    from hf_cod.io.whole_checkpoint import WholeCheckpoint
    from hf_cod.layers.checks import check_without_adapter
    from hf_cod.layers.running import busy
    from hf_cod.layers.size import bytes_of, disk_bytes
    from hf_cod.layers.stack import find_decoder_layers
    from hf_cod.models.stored_config import check_storable

    with busy(f"loading {model_title(source)}"):
        loaded, tokenizer = load_model(source, loading)
        model: Any = loaded
        check_without_adapter(model, source)
    check_storable(model)
    whole = WholeCheckpoint(source, loading, model, tokenizer)
    stack = find_decoder_layers(model, settings.layers_path)
    memory = {"intact": bytes_of(model)}
    with busy("packing"):
        pack_sparse(model, settings=settings)
    memory["packed"] = bytes_of(model)
    output.require(memory["packed"])
    notes = whole.save(model, output.results)
    told = {"model": source, "min_sparsity": settings.min_sparsity, "layers_path": settings.layers_path}
    sizes = {"memory_bytes": memory, "disk_bytes": disk_bytes(output.results)}
    report = describe(stack, model_title(source), told, sizes)
    return with_inputs(replace(report, notes=[*report.notes, *notes]), loading)


def describe(stack: DecoderLayers, name: str, settings: dict[str, Any], sizes: dict[str, Any]) -> RunReport:
    """The report: sparsity of each layer; `sizes` holds the results on memory and disk."""
    from hf_cod.cli.closing import TO_LOAD, closing
    from hf_cod.compression.sparse.linear import SparseLinear
    from hf_cod.io.report import RunReport, environment

    packed = {key: m for key, m in stack.model.named_modules() if isinstance(m, SparseLinear)}
    return RunReport(
        kind="pack",
        model=name,
        settings=settings,
        environment=environment(dtype=next(iter(packed.values())).values.dtype),
        layers={"sparsity": [_sparsity(stack, index) for index in range(len(stack))]},
        results={**sizes, "module_sparsity": {key: m.sparsity for key, m in packed.items()}},
        summary=[f"{len(packed)} matrices packed.", *closing(sizes, "packed"), TO_LOAD],
    )


def _sparsity(stack: DecoderLayers, index: int) -> float:
    """Share of zeros in the weights of a layer's Linears, packed or not."""
    from hf_cod.compression.sparse.linear import SparseLinear

    zeros = weights = 0
    linears: list[Any] = list(stack.linears(index).values())
    for module in linears:
        if isinstance(module, SparseLinear):
            count, stored = module.in_features * module.out_features, module.values
        else:
            count, stored = module.weight.numel(), module.weight.detach()
        zeros += count - int(stored.count_nonzero())
        weights += count
    return zeros / max(1, weights)
