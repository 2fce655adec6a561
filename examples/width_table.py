"""Perplexity of a narrowed model: methods x scores x shares of parameters removed, with one calibration for all.

    python examples/width_table.py --model DIRECTORY_OR_HUB_ID --text TEXT --output table

All settings (OWL's threshold M, lambda of each score) are chosen on the first half of the text; all reported
perplexities are of the second half, or with --report-text of another text. Shares are of the parameters of the layers'
matrices, which are removed in complete groups of heads and multiples of channels. With --heal each model is then
trained on the first text to match the intact model, and measured again. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

from owl_table import cut_samples, table_parser
from rank_table import Candidate, candidates, fill_table
from table_healing import Healing, add_healing

from hf_cod import LayerAllocation, LayerScores, allocate, narrow, score_layers
from hf_cod.compression.width.methods import COMPENSATIONS, METHODS
from hf_cod.compression.width.settings import CHANNEL_MULTIPLE
from hf_cod.io.models import ModelSettings, load_model

SCORES = ("uniform", "owl", "angular", "auto")


class Bench:
    """A model, which is copied for each cell of the table, and the samples of both halves of the text."""

    figures = ("kept",)

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, tokenizer = load_model(arguments.model, ModelSettings(dtype=arguments.dtype))
        self.calibration, self.tuning, self.report = cut_samples(tokenizer, arguments)
        self.healing = Healing(self.model, tokenizer, arguments)
        self.compensation, self.multiple = arguments.compensation, arguments.multiple
        self.found: dict[tuple, LayerScores] = {}

    def tried(self, method: str, score: str, kept: float) -> list[Candidate]:
        """The candidates of a score; auto has its own search, on the tuning samples."""
        return [(score, None, None)] if score == "auto" else candidates(score, kept)

    def plan(self, method: str, candidate: Candidate, kept: float) -> LayerAllocation:
        """The share of weights that each layer keeps."""
        score, threshold, spread = candidate
        options: dict[str, Any] = {} if threshold is None else {"threshold": threshold}
        options |= {"target": 1 - kept} if score == "auto" else {}
        key = (score, *options.values())
        if key not in self.found:
            self.found[key] = score_layers(self.model, method=score, batches=self.calibration, **options)
        return allocate(self.found[key], "parameter_share", kept, spread)

    def make(self, method: str, plan: LayerAllocation) -> tuple[Any, list[float]]:
        """The narrowed model, and the share of parameters that it keeps."""
        model: Any = copy.deepcopy(self.model)
        options: dict[str, Any] = {"batches": self.calibration, "channel_multiple": self.multiple}
        report = narrow(model, plan, method, self.compensation, **options)
        return model, [report.results["parameter_share"]]


def main() -> None:
    """Parses the arguments, and computes the table."""
    parser = table_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--compensation", default="least_squares", choices=list(COMPENSATIONS))
    parser.add_argument("--multiple", type=int, default=CHANNEL_MULTIPLE, help="multiple of the number of channels")
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    add_healing(parser)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.2, 0.4, 0.6])
    parser.add_argument("--output", default="width-table", help="directory for table.md, table.json and the journal")
    arguments = parser.parse_args()
    fill_table(Bench(arguments), arguments)


if __name__ == "__main__":
    main()
