"""`factorize`: replaces a model's matrices by products of two thin factors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from hf_cod.analysis.statistics.input_products import ProductsRecorder
from hf_cod.compression.low_rank.experts import BankMatrix, bank_matrices, check_basis, moments_of, without_banks
from hf_cod.compression.low_rank.rank_plan import (
    RankPlan,
    check_ranks,
    factorizable,
    plan_of_allocation,
)
from hf_cod.compression.low_rank.rank_report import RankReporter
from hf_cod.compression.low_rank.settings import OWN, FactorizeFields, FactorizeSettings
from hf_cod.functional import factorization, sparse_low_rank
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.report import RunReport
from hf_cod.io.settings import SampleSettings, check_effect, resolve
from hf_cod.io.text import Batches, Texts, Tokenizer, describe_batches
from hf_cod.layers.batches import batches_of, check_needed
from hf_cod.layers.checks import check_reshapeable
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.finished_layers import FinishedLayers, fingerprint_of_work
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.layer_notes import NamedErrors, check_errors, check_unseen
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.module_choice import choose_modules, other_notes
from hf_cod.layers.orientation import shape_of
from hf_cod.layers.own_changes import undoing_own_changes
from hf_cod.layers.sequential import change_each, change_sequentially
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.models.factors import LowRankLinear, recorded_experts
from hf_cod.models.shapes import SPARSE
from hf_cod.models.shaping import record_shapes
from hf_cod.scoring.allocation import LayerAllocation, same_share

# Method -> whether it requires batches; `settings.METHODS` describes each.
METHODS = {"whitened": True, "plain": False, "oats": True}


@renamed(path="layers_path", rank_share="factor_share")
@for_one_thread
@undoing_own_changes
@checked
def factorize(
    model: nn.Module,
    plan: LayerAllocation | RankPlan | float,
    method: str | None = None,
    *,
    batches: Batches | None = None,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    name: str | None = None,
    show_progress: bool = False,
    settings: FactorizeSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[FactorizeFields],
) -> RunReport:
    """Replaces matrices W of the layers by products B A of two thin factors, in place, where these have fewer weights.

    | method | minimizes | requires |
    |---|---|---|
    | whitened | the error of the outputs, || X (W - B A)^T ||_F (SVD-LLM, arXiv 2403.07378, made robust) | batches |
    | plain | the error of the entries, || W - B A ||_F | nothing |
    | oats | the scaled error with an additional sparse S, || (W - B A - S) D ||_F (arXiv 2409.13652) | batches |

    With batches, layers are changed one after another; the calibration inputs of a layer are the outputs of the changed
    layers before it. Embeddings, head, norms and biases are left unchanged. Linears and Conv1D become `LowRankLinear`.
    Parameters of banks of experts become `LowRankExperts`, with one rank for all experts of a matrix: each is whitened
    by the inputs of its own tokens, and a token is multiplied by the factors of its experts only. An expert with fewer
    tokens than 1/16 of its input channels is whitened by the inputs of all experts, or not at all where channels are
    its own; notes count such experts. oats leaves banks unchanged. The model and its config get a subclass of their
    classes (`models/shaping.py`): save_pretrained, generate, device_map and PEFT (name "all-linear") work, and so does
    from_pretrained, with this package installed, or without it by trust_remote_code.

    The report's `layers` hold `parameter_share` (share of the layer's weights that is kept), `full_rank_share` (mean
    share of full rank that is kept, weighted by weights), `error` (share of the outputs' energy that is lost, mean over
    factorized matrices) and `parameters` (of the intact layer); its `results` hold `parameter_share` and
    `full_rank_share` of all layers, `parameters` of the full model before and after, `ranks` by matrix, and for oats
    `nonzeros`. Zeros of sparse parts are not counted; they take memory and time until `pack_sparse` stores the model
    without them.

    Args:
        model: a transformers model with plain weights. After an interruption (NaN or infinity, out of memory, Ctrl-C)
            the finished layers are factorized, the others are not. Such a model runs and can be saved; to start again
            or to resume from a journal, load the original model again.
        plan: an allocation of "parameter_share" or "rank"; ranks by matrix; or one share of parameters for all layers.
            For oats, ranks by matrix require their `nonzeros`, and allocations of "rank" are not accepted.
        method: see the table; default: whitened.
        batches: dicts for the model's forward; `token_batches` makes them from texts. attention_mask (S, T) marks
            padding, which is ignored.
        tokenizer: with `texts`, instead of `batches`: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts them.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        journal: a directory to which each finished layer is saved; the same call on the same intact model resumes from
            it. The files are not removed.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        name: the model's name in the report; default: where it was loaded from.
        show_progress: show a progress bar.
        settings: how matrices are factorized.
        **fields: or fields of `FactorizeSettings` by name: `factor_share`, for oats, the part of the kept weights that
            is in the thin factors, between 0 and 1; `expert_basis`, "own" (default) or "shared", whether the experts
            of a bank share the factor on the side of the hidden state (`functional/expert_factorization.py`; if the
            plan has ranks by matrix, that of the plan); `include` and `exclude`, the matrices to factorize, as PEFT's
            target_modules and exclude_modules (the budget is that of all matrices); for texts, also fields of
            `SampleSettings`: sequence_length, max_samples, batch_size, pack, seed.

    Raises:
        ValueError: an unknown method, a plan for another model or out of range (says the least possible), missing
            batches, weights that cannot be replaced (adapters, quantized, offloaded, shared, already factorized), a
            basis that is shared by no experts, a model class of neither transformers nor hf_cod, a model that changes
            its weights in eval mode for good; in these cases the model is left unchanged. NaN or infinity in weights or
            activations (says where): see `model`.
    """
    how = resolve(factorize, FactorizeSettings, settings, fields, method=method)
    method = how.method
    if method != "oats" and "factor_share" in fields:
        check_effect(how, ["factor_share"], f"method {method}, which does not use it")
    stack = find_decoder_layers(model, layers_path)
    batches = batches_of(model, batches, tokenizer, texts, samples, fields)
    if METHODS[method]:
        check_needed(batches, f"for {method}")
    if batches:
        check_inputs(stack.model, batches)
    choice = choose_modules(stack, how)
    check_basis(choice.stack, how.expert_basis)
    stack, banks_left = without_banks(choice.stack) if method == "oats" else (choice.stack, [])
    check_reshapeable(stack, "factorize")
    use = check_unwritten(stack.model, batches)
    chosen = _plan(stack, plan, how)
    check_ranks(stack, chosen)
    notes = [*choice.notes("factorized"), *banks_left, *other_notes(stack, "factorized"), *use.notes_on(stack)]
    described = RankReporter(stack, name, how.expert_basis, notes)
    basis = [] if how.expert_basis == OWN else [how.expert_basis]
    identity = (chosen.ranks, chosen.nonzeros, *choice.identity, *basis)
    work = fingerprint_of_work(journal, stack.model, batches, method, *identity)
    change = LayerChange(stack, chosen)
    check_note = partial(change.check_note, measured=bool(METHODS[method] and batches))
    finished = FinishedLayers(journal, work, change.tensors_of, change.put_back, check_note)
    told: dict[str, Any] = {"method": method, "plan": f"{chosen.kind} {chosen.budget:g} by {chosen.method}"}
    told |= {**choice.given, **({"expert_basis": how.expert_basis} if change.has_banks else {})}
    try:
        if METHODS[method] and batches:
            told |= describe_batches(batches)
            recorder, bar = ProductsRecorder, "factorizing"
            described.notes += change_sequentially(stack, batches, recorder, change, finished, bar, show_progress)
        else:
            change_each(stack, change, finished, "factorizing", show_progress)
    finally:
        if change.done:  # also after an error: otherwise the changed model could not be loaded after saving
            record_shapes(stack.model, change.done)
    return described.report(chosen, finished, told)


class LayerNote(NamedErrors, total=False):
    """A layer's note. Notes of earlier versions have no `few`.

    Attributes:
        few: "name of a matrix.expert" of each expert that few tokens entered.
    """

    few: list[str]


class LayerChange:
    """Replaces the matrices of one layer, and provides what `FinishedLayers` requires to save and to repeat that.

    Args:
        stack: the layers.
        plan: the rank of each matrix to factorize, and optionally the size of its sparse part.
    """

    def __init__(self, stack: DecoderLayers, plan: RankPlan) -> None:
        self._stack, self._plan = stack, plan
        basis, depth = plan.expert_basis, range(len(stack))
        self._names = [[n for n in factorizable(stack, index, basis) if n in plan.ranks] for index in depth]
        self._banks = {n: bank for index in depth for n, bank in bank_matrices(stack, index, basis).items()}
        plain = [n for names in self._names for n in names if n not in self._banks]
        self._training = {n: stack.model.get_submodule(n).training for n in plain}
        self.done: dict[str, dict[str, int]] = {}

    @torch.no_grad()
    def __call__(self, index: int, sums: Any) -> LayerNote:
        """Returns {"unseen": matrices that no token entered, factorized as by plain, "few": experts that few tokens
        entered, "errors": name -> error}.
        """
        matrices = dict(self._stack.matrices(index))
        unseen, few, errors = [], [], {}
        for name in self._names[index]:
            if name in self._banks:
                moments = moments_of(self._banks[name], sums)
                unseen += [f"{name}.{expert}" for expert in moments.unseen]
                few += [f"{name}.{expert}" for expert in moments.few]
                rank = self._plan.ranks[name]
                B, A, errors[name] = self._banks[name].factors(matrices[name], rank, moments)
                self._exchange_bank(self._banks[name], rank, B, A)
                continue
            H = None if sums is None else sums.of(name)
            if sums is not None and H is None:
                unseen.append(name)
            W, rank = matrices[name], self._plan.ranks[name]
            if self._plan.nonzeros:
                kept = self._plan.nonzeros.get(name, 0)
                S, B, A, errors[name] = sparse_low_rank.decompose(W, rank, kept, H)
                self._exchange(name, B, A, S if kept else None)
            else:
                B, A, errors[name] = factorization.factorize(W, rank, H)
                self._exchange(name, B, A)
        return LayerNote(unseen=unseen, errors=errors, few=few)

    def tensors_of(self, index: int) -> dict[str, Tensor]:
        """The factors and the sparse parts of a layer."""
        modules = {name: self._stack.model.get_submodule(name) for name in self._names[index]}
        return {f"{n}.{key}": p.detach() for n, m in modules.items() for key, p in m.named_parameters() if p.dim() > 1}

    def put_back(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Replaces the matrices of an intact layer by these factors."""
        for name in self._names[index]:
            if name in self._banks:
                B, A = tensors[f"{name}.expand"], tensors[f"{name}.reduce"]
                self._exchange_bank(self._banks[name], self._plan.ranks[name], B, A)
                continue
            B, A = tensors[f"{name}.expand.weight"], tensors[f"{name}.reduce.weight"]
            S = tensors.get(f"{name}.{SPARSE}.weight")
            m, n = shape_of(self._stack.model.get_submodule(name))
            rank, sparse = self._plan.ranks[name], bool(self._plan.nonzeros.get(name))
            shapes = [None if t is None else tuple(t.shape) for t in (B, A, S)]
            if shapes != [(m, rank), (rank, n), (m, n) if sparse else None]:
                raise ValueError(f"{name}: expected factors of {m} x {n} with rank {rank}, got {shapes}")
            self._exchange(name, B, A, S)

    def check_note(self, index: int, note: Any, measured: bool) -> None:
        """Checks a note of a layer that was finished with batches (`measured`) or without."""
        check_errors(note, LayerNote, self._names[index], measured, without_tokens=True)
        check_unseen(note.get("few", []), self._names[index], measured)

    @property
    def has_banks(self) -> bool:
        """Whether matrices of banks of experts are factorized."""
        return any(name in self._banks for name in self._plan.ranks)

    def _exchange_bank(self, bank: BankMatrix, rank: int, B: Tensor, A: Tensor) -> None:
        made = bank.put(rank, B, A)
        self.done.setdefault(bank.matrix.bank, {}).update(recorded_experts(made, bank.matrix.key))

    def _exchange(self, name: str, B: Tensor, A: Tensor, S: Tensor | None = None) -> None:
        module: Any = self._stack.model.get_submodule(name)
        weight, bias = module.weight, module.bias
        made = LowRankLinear(A.shape[1], B.shape[0], A.shape[0], bias is not None, S is not None, device="meta")
        for part, values in ((made.reduce, A), (made.expand, B), (made.sparse, S)):
            if part is None or values is None:
                continue
            values = values.to(device=weight.device, dtype=weight.dtype)
            if not values.isfinite().all():
                raise ValueError(f"weights: expected finite factors, got NaN or infinity of {name}")
            part.weight = nn.Parameter(values.contiguous(), requires_grad=weight.requires_grad)
        made.expand.register_parameter("bias", bias)
        parent, _, child = name.rpartition(".")
        setattr(self._stack.model.get_submodule(parent), child, made.train(self._training[name]))
        self.done[name] = {"rank": made.rank, **({} if S is None else {SPARSE: 1})}


def _plan(stack: DecoderLayers, plan: LayerAllocation | RankPlan | float, how: FactorizeSettings) -> RankPlan:
    factor_share = how.factor_share if how.method == "oats" else None
    if isinstance(plan, RankPlan):
        if plan.expert_basis != how.expert_basis:
            raise ValueError(
                f"expert_basis: expected {plan.expert_basis}, for which the plan has ranks, got {how.expert_basis}"
            )
        if bool(plan.nonzeros) != (factor_share is not None):
            wanted, got = ("no nonzeros", "some") if plan.nonzeros else ("nonzeros for oats, next to ranks", "none")
            raise ValueError(
                f"plan: expected {wanted}, got {got}; oats takes one share, or an allocation of parameter_share"
            )
        return plan
    allocation = plan if isinstance(plan, LayerAllocation) else same_share(stack, plan)
    return plan_of_allocation(stack, allocation, factor_share, how.expert_basis)
