"""hf-cod convert: between LayerNorm Scaling and stock checkpoints, and from checkpoints of the papers' authors."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cod.cli.output import one_directory, say_written, write_model
from hf_cod.cli.parser import SettingsParser, model_title
from hf_cod.models.authors import AUTHORS_NORM_TYPES

if TYPE_CHECKING:
    from hf_cod.io.output_directory import OutputDirectory
    from hf_cod.io.report import RunReport

# Conversions that take --lns-exponent.
SCALED = ("lns", "lns_output")
# Conversion -> sentence on its result.
RESULTS = {
    "stock": "A stock checkpoint with the logits of the model with LayerNorm Scaling.",
    "lns": "LayerNorm Scaling with the logits of the stock model, for further training.",
    "lns_output": "LayerNorm Scaling behind the sublayers with the logits of the stock model, for further training.",
    "gpas": "Gradient-Preserving Activation Scaling with the logits of the stock model, for further training.",
    "layer_scale": "LayerScale with the logits of the stock model, for further training.",
    "authors": "A checkpoint of the papers' authors as a model of hf_cod.",
}


def make_parser() -> SettingsParser:
    """The command's options."""
    parser = SettingsParser(
        prog="hf-cod convert",
        formatter_class=RawDescriptionHelpFormatter,
        description="Converts a checkpoint; the source is never changed.\n\n"
        "  stock        a model with LayerNorm Scaling -> a stock model with the same logits, for software without\n"
        "               hf_cod (vLLM, llama.cpp): 1 / sqrt(l) is multiplied into the norm weights of layer l (from 1)\n"
        "  lns          a stock model -> LayerNorm Scaling with the same logits, for further training\n"
        "  lns_output   the same with the factors behind attention and MLP\n"
        "  gpas         a stock model -> a learned gate on the residual stream (GPAS), 0 at first\n"
        "  layer_scale  a stock model -> learned factors on the outputs of attention and MLP, 1 at first\n"
        "  authors      a checkpoint of the code released with Mix-LN or the Curse of Depth -> a model of hf_cod",
    )
    parser.add_argument("to", choices=list(RESULTS), metavar="to", help="the conversion, see above")
    parser.add_argument("source", help="directory of the checkpoint, or its Hub id")
    parser.add_argument("directory", nargs="?", metavar="output", help="new directory for the result; required")
    parser.add_argument("--output", help="new directory for the result; default: the third argument")
    parser.add_argument(
        "--norm-type",
        type=str.lower,
        choices=list(AUTHORS_NORM_TYPES),
        help="for authors: NORM_TYPE of the training, in upper or lower case; no default",
    )
    parser.add_argument(
        "--post-layers", type=int, help="for authors with post_pre: POST_NUM of the training; no default"
    )
    parser.add_argument(
        "--lns-exponent",
        type=float,
        help="for lns and lns_output: exponent of l in the factors, from 0 to 1; 0 leaves the weights as they are, for "
        "a training that raises it (LnsAnnealing); default: 0.5",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and runs the command."""
    (chosen,) = make_parser().parse(arguments)
    chosen.output = one_directory(chosen.directory, chosen.output)
    if chosen.output is None:
        raise ValueError("output: expected a new directory for the result, got none")
    if chosen.to == "authors" and chosen.norm_type is None:
        raise ValueError(f"norm_type: expected one of {', '.join(AUTHORS_NORM_TYPES)}, got none; set --norm-type")
    for name in ("norm_type", "post_layers"):
        if chosen.to != "authors" and getattr(chosen, name) is not None:
            raise ValueError(f"{name}: expected none with {chosen.to}, got {getattr(chosen, name)!r}")
    if chosen.to not in SCALED and chosen.lns_exponent is not None:
        raise ValueError(f"lns_exponent: expected none with {chosen.to}, got {chosen.lns_exponent}")
    if chosen.lns_exponent is not None and not 0 <= chosen.lns_exponent <= 1:
        raise ValueError(f"lns_exponent: expected a number from 0 to 1, got {chosen.lns_exponent}")
    from hf_cod.io.output_checks import check_unused
    from hf_cod.io.output_directory import OutputDirectory

    told = ["convert", chosen.to, chosen.source, chosen.norm_type, chosen.post_layers, chosen.lns_exponent]
    output = OutputDirectory(chosen.output, told, check=check_unused, source=chosen.source)
    write_model(output, partial(run, chosen))
    say_written(output.path)
    return 0


def run(chosen: Any, output: OutputDirectory) -> RunReport:
    """Converts a checkpoint and writes it to the results of `output`."""
    from hf_cod.io.adapters import base_of
    from hf_cod.io.generation import mend_generation
    from hf_cod.io.model_config import check_model_config, read_model_config
    from hf_cod.io.quantized import check_unquantized_config
    from hf_cod.layers.size import bytes_of
    from hf_cod.models import fold_lns, from_authors, to_gpas, to_layer_scale, to_lns
    from hf_cod.models.checkpoint import copy_companions

    exponent = {} if chosen.lns_exponent is None else {"exponent": chosen.lns_exponent}
    conversions: dict[str, Callable[[], Any]] = {
        "stock": lambda: fold_lns(chosen.source),
        **{name: partial(to_lns, chosen.source, placement=name, **exponent) for name in SCALED},
        "gpas": lambda: to_gpas(chosen.source),
        "layer_scale": lambda: to_layer_scale(chosen.source),
        "authors": lambda: from_authors(chosen.source, chosen.norm_type, post_layers=chosen.post_layers),
    }
    base = base_of(chosen.source)
    if base is not None:
        raise ValueError(
            f"source: expected a model, got an adapter of {base!r} in {chosen.source!r}; merge it first "
            "(merge_and_unload of PEFT, then save_pretrained)"
        )
    file = check_model_config(chosen.source, field="source")
    if file is not None:
        check_unquantized_config(read_model_config(file), chosen.source, "source")
    model = conversions[chosen.to]()
    output.require(bytes_of(model))
    notes = mend_generation(model, chosen.source)
    model.save_pretrained(output.results)
    copy_companions(chosen.source, output.results)
    return _report(model, chosen, notes)


def _report(model: Any, chosen: Any, notes: list[str]) -> RunReport:
    from hf_cod.io.report import RunReport, environment

    settings = {name: getattr(chosen, name) for name in ("to", "source", "norm_type", "post_layers", "lns_exponent")}
    settings["output"] = Path(chosen.output).resolve().name  # the command requires it
    return RunReport(
        kind="convert",
        model=model_title(chosen.source),
        settings=settings,
        environment=environment(dtype=model.dtype),
        layers={},
        results={"parameters": {"converted": model.num_parameters()}},
        summary=[RESULTS[chosen.to], f"{type(model).__name__}, {model.num_parameters():,} parameters."],
        notes=notes,
    )
