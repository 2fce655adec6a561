"""`plan_fit`: finds the combination of compression steps with the least measured loss within a budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from torch import nn

from hf_cod.compression.fit.budget import Budget, check_budget
from hf_cod.compression.fit.fit_plan import FitPlan
from hf_cod.compression.fit.knobs import KNOBS, chosen_knobs, exclusive, left_out
from hf_cod.compression.fit.reach import fixed_share
from hf_cod.compression.fit.samples import calibration_and_tuning, check_given
from hf_cod.compression.fit.search import Search
from hf_cod.compression.fit.settings import FitFields, FitSettings
from hf_cod.compression.fit.trials import Trials
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import current_value, renamed
from hf_cod.io.files import fingerprint
from hf_cod.io.settings import SampleSettings, resolve
from hf_cod.io.text import Batches, Texts, Tokenizer
from hf_cod.layers.fingerprints import Journals, digest_batches
from hf_cod.layers.size import size_of
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.scoring.settings import OLD_KINDS

# Tolerance, as a factor on the expected size: integer ranks, heads and channels are rounded.
ROUNDING = 0.95


@renamed(path="layers_path", verify="n_verified")
@checked
def plan_fit(
    make: Callable[[], nn.Module],
    kind: str,
    budget: float,
    calibration: Batches | None = None,
    tuning: Batches | None = None,
    *,
    tokenizer: Tokenizer = None,
    texts: Texts | None = None,
    journal: str | Path | None = None,
    layers_path: str | None = None,
    show_progress: bool = False,
    settings: FitSettings | None = None,
    samples: SampleSettings | None = None,
    **fields: Unpack[FitFields],
) -> FitPlan:
    """Finds the compression steps with which a model meets a budget.

    1. Each knob is measured alone at a few levels: its cost (nats a token on `tuning`) and the remaining size.
    2. All combinations of levels are compared, on the assumption that costs add up and savings multiply.
    3. The best level of each knob alone, and the `n_verified` best combinations of several knobs, are applied and
       measured, because the assumption is approximate. If a measured size exceeds the budget, levels are increased. The
       combination with the least measured loss is the plan. Only measured combinations whose measured size is within
       the budget can be the plan; with `n_verified=0` these are single methods.

    The loss of the plan on `tuning` is therefore at most that of any single method at the measured levels that meet the
    budget. The notes name methods that do not meet the budget alone. If the intact model meets the budget, nothing is
    tried, and the plan has no steps.

    Args:
        make: a function that loads the intact model; each call must return a new copy. One copy at a time is in memory.
        kind: "memory" (bytes of the full model), "parameter_share" (of the weights of the layers' matrices, 0 to 1)
            or "bits" (stored bits for each of those weights).
        budget: the largest allowed size, in the unit of `kind`.
        calibration: dicts for the model's forward, on which methods calibrate; `token_batches` makes them from texts.
        tuning: other ones, on which losses are measured; `split_samples` splits batches.
        tokenizer: with `texts`, instead of both: the model's tokenizer.
        texts: text, list of texts, `datasets` column, or any iterable of strings; `token_batches` cuts `max_samples`
            and then `tuning_samples` samples.
        samples: how texts are cut into samples; default: `SampleSettings()`.
        journal: a directory to which measurements are saved; the same call resumes from it.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        show_progress: show a progress bar.
        settings: the knobs to choose from, and the number of combinations to measure.
        **fields: or fields of `FitSettings` by name: `knobs`, names of `KNOBS` to choose from (default: all that can
            reduce the size in the unit of `kind`, without those that cannot be applied to this model), and
            `n_verified`, the number of combinations of several knobs to measure, in addition to each knob alone; for
            texts, also `tuning_samples`, and fields of `SampleSettings`: sequence_length, max_samples, batch_size,
            pack, seed. Levels at which a method fails are always excluded. The plan's notes name all excluded knobs and
            levels.

    Raises:
        ValueError: an unknown kind or knob; an invalid budget; a budget out of range (says the least possible), before
            anything is measured, or, if knobs fail or rounding decides, after they are measured alone; a named knob
            that cannot be applied to the model, before anything is measured if the model shows it.
        ImportError: a named knob requires a package that is not installed; before anything is measured.
    """
    how = resolve(plan_fit, FitSettings, settings, fields)
    knobs, kind = how.knobs, current_value("kind", kind, OLD_KINDS, above=2)
    check_budget(kind, budget)
    if isinstance(make, nn.Module):
        raise ValueError(f"make: expected a function that loads the model, got a model ({type(make).__name__})")
    check_given(calibration, tuning, tokenizer, texts)
    chosen = chosen_knobs(knobs, kind)
    intact = make()
    stack = find_decoder_layers(intact, layers_path)
    if knobs is None:
        chosen = [knob for knob in chosen if KNOBS[knob].concerns(stack)]
    calibration, tuning = calibration_and_tuning(
        stack.model, calibration, tuning, tokenizer, texts, samples, fields, how.tuning_samples
    )
    notes = left_out(chosen, stack, knobs is not None)
    levels = {knob: KNOBS[knob].levels(intact, layers_path) for knob in chosen if knob not in notes}
    target = Budget(kind, budget, size_of(intact, layers_path), exclusive(stack), fixed_share(stack, kind))
    if levels:
        least = {knob: KNOBS[knob].left(stack, found[-1]) for knob, found in levels.items()}
        target.check_reach(least, ROUNDING, list(notes.values()), combined=how.n_verified > 0)
    work = fingerprint(Journals(journal or "", intact, calibration).inputs, digest_batches(tuning))
    del intact, stack
    trials = Trials(make, calibration, tuning, journal, work, layers_path, target.intact)
    search = Search(trials, target, levels, knobs is not None, list(notes.values()))
    if search.is_met_intact():
        return search.plan()
    search.measure_alone(show_progress)
    search.check_reach(combined=how.n_verified > 0)
    search.verify(how.n_verified, show_progress)
    return search.plan()
