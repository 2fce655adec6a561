"""Work: the model that a command compresses, its samples, and measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_cod.analysis.evaluation.choice import held_out_perplexity
from hf_cod.cli.parser import model_title
from hf_cod.cli.samples import load_with_tokenizer
from hf_cod.compression.search.planning import search_plan
from hf_cod.compression.search.settings import SearchSettings
from hf_cod.io.models import load_model
from hf_cod.io.quantized import check_unquantized
from hf_cod.io.settings import ModelSettings
from hf_cod.io.text import Batch
from hf_cod.io.whole_checkpoint import WholeCheckpoint
from hf_cod.layers.memory_limit import Copies, MemoryLimit
from hf_cod.layers.running import busy, progress
from hf_cod.layers.speed import Speeds, speeds_of
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import LANGUAGE_MODELS, task_of
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.expert_methods import score_experts
from hf_cod.scoring.expert_scores import ExpertScores
from hf_cod.scoring.imports.importer import import_scores, read_scores
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers
from hf_cod.scoring.settings import EXPERT
from hf_cod.scoring.settings import METHODS as SCORES


class Work:
    """One model during compression; memory never holds two models at once.

    Attributes:
        source: Hub id, directory or GGUF file of the intact model.
        model: the current model; any class of transformers.
        tokenizer: its tokenizer.
        calibration, evaluation: disjoint samples for calibration and for evaluation.
        scores: scores of the layers, from a file or computed; None before that.
        limit: of memory.
        whole: everything that came with the model, for saving it.
        options: keyword arguments of every method: journal, layers_path, show_progress.
        name: name of the model in reports.
    """

    model: Any
    calibration: Sequence[Batch]
    evaluation: Sequence[Batch]

    def __init__(
        self,
        source: str,
        loading: ModelSettings,
        settings: Any,
        journal: Path,
        scores_file: str | None = None,
        limit: int | None = None,
    ) -> None:
        self.scores = None if scores_file is None else read_scores(scores_file)
        self.source, self._loading, self.settings = source, loading, settings
        self.limit = MemoryLimit(limit)
        self.model, self.tokenizer = load_with_tokenizer(source, loading, in_files=limit is not None)
        check_unquantized(self.model, source)
        self.whole = WholeCheckpoint(source, loading, self.model, self.tokenizer)
        self.name = model_title(source)
        self.options: dict[str, Any] = {
            "journal": journal,
            "layers_path": settings.layers_path,
            "show_progress": True,
        }
        if scores_file is not None and self.scores is None:
            self.scores = import_scores(self.model, scores_file, layers_path=settings.layers_path)
        if self.scores is not None:
            self.scores.check(self.stack)

    @property
    def stack(self) -> DecoderLayers:
        """The layers of the current model."""
        return find_decoder_layers(self.model, self.settings.layers_path)

    def check_limit(self, copies: Copies) -> None:
        """Checks that the limit of memory can be kept, once there are samples.

        Args:
            copies: what the change of one matrix takes.

        Raises:
            ValueError: it cannot.
        """
        self.limit.check(self.stack, [*self.calibration, *self.evaluation], copies)

    def renew(self) -> None:
        """Replaces the current model by the intact model."""
        self.model = None
        self.model = self.load()

    def load(self) -> Any:
        """Loads the intact model."""
        with busy(f"loading {self.name}"):
            return load_model(self.source, self._loading, in_files=self.limit.given)[0]

    def reload(self, directory: Path) -> None:
        """Replaces the current model by the saved one."""
        self.model = None
        with busy("loading the saved model"):
            saved = replace(self._loading, revision="main")
            self.model = load_model(str(directory), saved, in_files=self.limit.given)[0]

    def score(self, method: str, **chosen: Any) -> LayerScores:
        """The scores from the file if one was passed, else those computed by a method with the command's settings."""
        if self.scores is None:
            names = [name for name in (*SCORES[method].settings, "layers_path") if hasattr(self.settings, name)]
            own = {name: getattr(self.settings, name) for name in names}
            if own.get("granularity") == EXPERT:  # layers have scores as a whole, beside those of experts
                del own["granularity"]
            chosen = {name: value for name, value in chosen.items() if name in SCORES[method].settings}
            more = {**own, **chosen, "batches": self.calibration, "show_progress": True}
            more["journal"] = self.options["journal"]
            self.scores = score_layers(self.model, method=method, **more)
        return self.scores

    def score_experts(self, method: str) -> ExpertScores:
        """The scores of single experts of the current model."""
        where = {"layers_path": self.settings.layers_path, "show_progress": True}
        return score_experts(self.model, method=method, batches=self.calibration, **where)

    def search(self, kind: str, budget: float, **chosen: Any) -> LayerAllocation:
        """The plan of a search with the command's settings; from the scores of the file if one was passed."""
        settings = SearchSettings(
            kind,
            budget,
            granularity=self.settings.granularity,
            passes=self.settings.search_passes,
            seed=self.settings.seed,
            **chosen,
        )
        return search_plan(self.model, batches=self.calibration, scores=self.scores, settings=settings, **self.options)

    def perplexity(self) -> float | None:
        """Perplexity on the evaluation samples; None for a model that is not a language model."""
        if task_of(self.model) not in LANGUAGE_MODELS:
            return None
        batches = progress(self.evaluation, "perplexity", show=True)
        return held_out_perplexity(self.model, batches, self.settings.layers_path)

    def speed(self, name: str) -> Speeds:
        """Speed of the current model, under this name; empty if it is not requested.

        Memory holds one model at a time, so the intact model is timed before it is changed and the saved one
        afterwards; varying load on the machine affects the comparison.
        """
        if not getattr(self.settings, "speed", False):
            return {}
        with busy("measuring speed"):
            return speeds_of({name: self.stack}, self.evaluation)
