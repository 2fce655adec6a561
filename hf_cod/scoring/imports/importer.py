"""`import_scores` and `import_plan`: numbers by module, of other tools, as LayerScores and LayerAllocation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_cod.analysis.statistics.imatrix import SUFFIX
from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.io.arguments import checked
from hf_cod.io.display import named
from hf_cod.io.reading import naming_file, read_json, read_text
from hf_cod.io.schema import brief
from hf_cod.layers.checks import check_sizes, name_of, sizes_of
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.imports import auto_round, mlx
from hf_cod.scoring.imports.numbers import NamedNumbers, by_matrix
from hf_cod.scoring.imports.table import table
from hf_cod.scoring.layer_scores import LayerScores, PartScore, mean_score
from hf_cod.scoring.methods import score_layers
from hf_cod.scoring.settings import Kind

logger = logging.getLogger(__name__)

FORMATS = (
    "a list of [module, number] (MLX's sensitivities), module to settings with bits (AutoRound's layer_config), the "
    "entry quantization of MLX's config.json, or a .csv with lines module,number"
)


@checked
def import_scores(
    model: nn.Module, source: str | Path | Mapping[str, Any], *, layers_path: str | None = None
) -> LayerScores:
    """Scores of another tool: one for each matrix, the higher the more it matters; those of layers are their means.

    | source | scores | method |
    |---|---|---|
    | sensitivities of mlx_lm.dynamic_quant (.json) | as they are | mlx |
    | layer_config of AutoRound, AutoScheme's result (.json, or a dict) | the bits of each matrix | auto-round |
    | the entry quantization of MLX's config.json | the bits of each matrix | mlx |
    | a table of module,number (.csv) | as they are | table |
    | an importance matrix of llama.cpp (.gguf) | OWL's, by layer | owl |

    A name is that of a matrix, or of a module that contains some, such as a layer; if several apply, the longest does.
    Numbers of modules outside of the layers are left out; a warning names them.

    Args:
        model: the model of the scores; not changed.
        source: the file, or its content.
        layers_path: module name of the layer stack, if it cannot be found automatically.

    Raises:
        ValueError: no such file, another format, modules that the model does not have, or matrices without a number.
    """
    if not isinstance(source, Mapping) and Path(source).suffix == SUFFIX:
        statistics = LayerStatistics.load(source, model=model, layers_path=layers_path)
        return score_layers(model, statistics, "owl", layers_path=layers_path)
    stack = find_decoder_layers(model, layers_path)
    found = _read(source, "scores")
    values = _values(found, stack, "scores")
    parts, means = [], []
    for index in range(len(stack)):
        sizes = {name: weight.numel() for name, weight in stack.matrices(index)}
        parts += [PartScore(index, values[name], {name: size}) for name, size in sizes.items()]
        means.append(mean_score(found.source, [(values[name], size) for name, size in sizes.items()], 0.0))
    return LayerScores(name_of(stack), found.source, means, sizes_of(stack), granularity="module", parts=parts)


@checked
def import_plan(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    kind: Kind = "bits",
    *,
    rest: float | None = None,
    layers_path: str | None = None,
) -> LayerAllocation:
    """A plan of another tool: one value for each matrix.

    Sources are those of `import_scores` that hold bits, and tables, whose numbers are of any `kind`. A matrix that is
    not quantized has 16 bits; `export` leaves it out.

    Args:
        model: the model of the plan; not changed.
        source: the file, or its content.
        kind: what the numbers are; see `LayerAllocation`.
        rest: the value of matrices that the source does not name, such as `bits` of AutoRound; default: each has one.
        layers_path: module name of the layer stack, if it cannot be found automatically.

    Raises:
        ValueError: as `import_scores`; sensitivities, which are scores; bits as a plan of another kind.
    """
    stack = find_decoder_layers(model, layers_path)
    if not isinstance(source, Mapping) and Path(source).suffix == SUFFIX:
        raise ValueError(f"plan: expected {kind}, got an importance matrix; use import_scores, then allocate")
    found = _read(source, "plan")
    if found.bits is False:
        raise ValueError(f"plan: expected {kind}, got sensitivities; use import_scores, then allocate or plan_bits")
    if found.bits and kind != "bits":
        raise ValueError(f"plan: expected {kind}, got bits of {found.source}")
    if rest is not None:
        found = NamedNumbers(found.source, found.values, rest, found.bits)
    values = _values(found, stack, "plan")
    means, weights, total = [], [], 0.0
    for index in range(len(stack)):
        sizes = {name: weight.numel() for name, weight in stack.matrices(index)}
        spent = sum(values[name] * size for name, size in sizes.items())
        weights.append(sum(sizes.values()))
        means.append(spent / weights[-1] if weights[-1] else 0.0)
        total += spent
    sizes_now = sizes_of(stack)
    plan = LayerAllocation(
        kind, total / sum(weights), means, weights, found.source, None, name_of(stack), sizes_now, "module", values
    )
    plan.check_read()
    return plan


def read_scores(path: str | Path) -> LayerScores | None:
    """Our own scores of a file; None for a file of another tool, which only `import_scores` reads, by the model.

    Raises:
        ValueError: no such file, or another kind of content.
    """
    if Path(path).is_file() and Path(path).suffix in (SUFFIX, ".csv"):
        return None
    content = read_json(path, LayerScores.FIELD)
    if isinstance(content, dict) and "format" in content:
        return LayerScores.load(path)
    with naming_file(path):
        _of_content(content, LayerScores.FIELD)
    return None


def import_either(
    model: nn.Module, path: str | Path, *, rest: float | None = None, layers_path: str | None = None
) -> LayerScores | LayerAllocation:
    """The scores or the plan of a file: our own, or of another tool; bits are a plan, all other numbers are scores.

    Args:
        model: the model of both; not changed.
        path: a file of `LayerScores`, of `LayerAllocation`, or a source of `import_scores`.
        rest: see `import_plan`.
        layers_path: module name of the layer stack, if it cannot be found automatically.

    Raises:
        ValueError: as `import_plan`, or those of another model.
    """
    if Path(path).suffix not in (SUFFIX, ".csv"):
        content = read_json(path, "plan")
        if isinstance(content, dict) and "format" in content:
            kind: Any = LayerAllocation if "budget" in content else LayerScores
            read: LayerScores | LayerAllocation = kind.load(path)
            made_for = read.parameters if isinstance(read, LayerScores) else read.sizes
            check_sizes(read.FIELD, read.model, made_for, find_decoder_layers(model, layers_path))
            return read
        with naming_file(path):
            bits = _of_content(content, "plan").bits
        if bits:
            return import_plan(model, path, rest=rest, layers_path=layers_path)
    return import_scores(model, path, layers_path=layers_path)


def _values(found: NamedNumbers, stack: DecoderLayers, field: str) -> dict[str, float]:
    values, outside = by_matrix(found, stack, field)
    if outside:
        logger.warning("%s: %d modules outside of the layers are left out: %s", field, len(outside), named(outside))
    return values


def _read(source: str | Path | Mapping[str, Any], field: str) -> NamedNumbers:
    """The numbers of a file, or of its content, by its format."""
    if isinstance(source, Mapping):
        return _of_entries(dict(source), field)
    if Path(source).suffix == ".csv":
        text = read_text(source, field)
        with naming_file(source):
            return table(text)
    content = read_json(source, field)
    with naming_file(source):
        return _of_content(content, field)


def _of_content(content: Any, field: str) -> NamedNumbers:
    if isinstance(content, list):
        return mlx.sensitivities(content)
    if isinstance(content, dict):
        return _of_entries(content, field)
    raise _unknown(content, field)


def _of_entries(content: dict[str, Any], field: str) -> NamedNumbers:
    if isinstance(content.get("quantization"), dict):  # of a config.json
        content = content["quantization"]
    if "bits" in content:
        return mlx.quantization(content)
    if content and all(isinstance(settings, dict) for settings in content.values()):
        return auto_round.layer_config(content)
    raise _unknown(content, field)


def _unknown(content: Any, field: str) -> ValueError:
    return ValueError(f"{field}: expected {FORMATS}, got {brief(content)}")
