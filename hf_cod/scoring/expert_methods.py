"""Scores of single experts, in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from hf_cod.analysis.statistics.expert_usage import ExpertUsage, measure_expert_usage, routed_sets
from hf_cod.analysis.statistics.layer_statistics import LayerStatistics, collect_statistics
from hf_cod.functional import outliers
from hf_cod.io.arguments import checked
from hf_cod.io.settings import SampleSettings, check_effect, resolve
from hf_cod.io.text import Batch, Batches, Texts, Tokenizer
from hf_cod.layers.batches import batches_of, check_needed
from hf_cod.layers.checks import name_of
from hf_cod.layers.experts import ExpertMatrix, ExpertSet
from hf_cod.layers.running import naming_weights
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.scoring.expert_scores import ExpertScores
from hf_cod.scoring.settings import EXPERT_METHODS as ROWS
from hf_cod.scoring.settings import ExpertScoreFields, ExpertScoreSettings


@checked
def score_experts(
    model: nn.Module,
    statistics: LayerStatistics | None = None,
    method: str | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    show_progress: bool = False,
    settings: ExpertScoreSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[ExpertScoreFields],
) -> ExpertScores:
    """Scores each expert of a mixture of experts.

    With X_e the tokens routed to expert e, T the number of all tokens, g_e(x) its gate weight for x, f_e(x) its output:

    | method | score of expert e | source |
    |---|---|---|
    | reap | 1/#X_e sum over x in X_e of g_e(x) ||f_e(x)||_2 | REAP, the saliency S_j of arXiv 2510.13999 |
    | router_weight | 1/T sum over x in X_e of g_e(x) | baseline |
    | frequency | #X_e / T | baseline |
    | owl | D^l of OWL, with A^l the matrices of e alone and X its own inputs | arXiv 2310.05175, eq. 1 |

    An expert that no token was routed to has the score 0. If a model applies gate weights to the inputs of its experts
    (Llama 4), reap is the mean of ||f_e(g_e(x) x)||_2, what the expert adds. Shared experts are not scored.

    Args:
        model: a transformers model, wrapped or not; it is not changed.
        statistics: for owl: statistics of this model and these batches, from `collect_statistics`.
        method: see the table; default: reap.
        batches: dicts for the model's forward; `token_batches` makes them from texts.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        show_progress: show progress bars.
        settings: how experts are scored.
        **fields: or fields of `ExpertScoreSettings` by name: threshold, layers_path; for texts, also fields of
            `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: a model without experts, an unknown method, a setting of another method, no batches, gate weights
            that the method needs and that cannot be observed, statistics of another model, or activations that are not
            finite.
    """
    chosen = resolve(score_experts, ExpertScoreSettings, settings, fields, method=method)
    unused = [] if chosen.method == "owl" else ["threshold"]
    check_effect(chosen, [n for n in fields if n in unused], f"method {chosen.method}, which does not use it")
    stack = find_decoder_layers(model, chosen.layers_path)
    check_mixture(stack)
    batches = batches_of(model, batches, tokenizer, texts, samples, fields)
    check_needed(batches, f"for the method {chosen.method}")
    assert batches is not None
    batches = [*batches]
    with naming_weights(stack.model):
        usage = measure_expert_usage(stack, batches, show_progress=show_progress)
        request = _Request(stack, usage, batches, statistics, chosen, show_progress)
        values = METHODS[chosen.method](request)
    sets = {experts.name: (i, experts) for i in range(len(stack)) for experts in routed_sets(stack, i)}
    return ExpertScores(
        model=name_of(stack),
        method=chosen.method,
        values={name: values[name].tolist() for name in sets},
        layers={name: index for name, (index, _) in sets.items()},
        tokens={name: usage[name].tokens.tolist() for name in sets},
        parameters={name: experts.sizes() for name, (_, experts) in sets.items()},
        settings={name: getattr(chosen, name) for name in ROWS[chosen.method].settings},
    )


def check_mixture(stack: DecoderLayers) -> None:
    """Checks that there are experts.

    Raises:
        ValueError: there are none.
    """
    if not any(routed_sets(stack, index) for index in range(len(stack))):
        raise ValueError(f"model: expected a mixture of experts, got {name_of(stack)}, whose layers have no experts")


@dataclass(frozen=True)
class _Request:
    """The inputs of a method."""

    stack: DecoderLayers
    usage: dict[str, ExpertUsage]
    batches: Sequence[Batch]
    statistics: LayerStatistics | None
    settings: ExpertScoreSettings
    show_progress: bool

    def check_gates(self) -> None:
        """Checks that the gate weights of all experts were seen."""
        unknown = next((name for name, usage in self.usage.items() if usage.weights is None), None)
        if unknown is not None:
            raise ValueError(
                f"method: expected frequency or owl for {name_of(self.stack)}, whose gate weights cannot be observed "
                f"({unknown}), got {self.settings.method}"
            )


def _reap(request: _Request) -> dict[str, Tensor]:
    request.check_gates()
    return {name: _sums(usage.norms) / usage.tokens.clamp(min=1) for name, usage in request.usage.items()}


def _router_weight(request: _Request) -> dict[str, Tensor]:
    request.check_gates()
    return {name: _sums(usage.weights) / max(1, usage.all_tokens) for name, usage in request.usage.items()}


def _frequency(request: _Request) -> dict[str, Tensor]:
    return {name: usage.tokens.double() / max(1, usage.all_tokens) for name, usage in request.usage.items()}


def _owl(request: _Request) -> dict[str, Tensor]:
    statistics, stack = request.statistics, request.stack
    if statistics is None:
        statistics = collect_statistics(
            stack.model,
            request.batches,
            layers_path=request.settings.layers_path,
            show_progress=request.show_progress,
        )
    statistics.check(stack)
    found = {}
    for index in range(len(stack)):
        matrices = dict(stack.matrices(index)) if routed_sets(stack, index) else {}
        for experts in routed_sets(stack, index):
            scores = torch.zeros(experts.count, dtype=torch.float64)
            for expert in range(experts.count):
                parts = _seen_matrices(experts, expert, matrices, statistics)
                if parts:
                    scores[expert] = outliers.outlier_ratio(partial(iter, parts), request.settings.threshold)
            found[experts.name] = scores
    return found


def _seen_matrices(
    experts: ExpertSet, expert: int, weights: dict[str, Tensor], statistics: LayerStatistics
) -> list[tuple[str, Tensor, Tensor]]:
    """(name, W, s) of each matrix of one expert that tokens entered."""
    found = []
    for matrix in experts.matrices:
        if isinstance(matrix, ExpertMatrix):
            name, W = f"{matrix.name}.{expert}", weights[matrix.name][expert]
            squares = statistics.of(matrix.name, expert)
        else:
            name = [*matrix.linears][expert]
            W, squares = weights[name], statistics.of(name)
        if squares is not None:
            found.append((name, W, squares.sqrt()))
    return found


def _sums(found: Tensor | None) -> Tensor:
    assert found is not None, "gate weights were checked"
    return found


# Method -> its function; `settings.EXPERT_METHODS` says what each measures.
METHODS: dict[str, Callable[[_Request], dict[str, Tensor]]] = {
    "reap": _reap,
    "router_weight": _router_weight,
    "frequency": _frequency,
    "owl": _owl,
}
