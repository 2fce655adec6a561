"""Work: the model that a command compresses, its samples, and what is measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_cod.analysis.evaluation.choice import held_out_perplexity
from hf_cod.cli.parser import model_title
from hf_cod.cli.samples import load_with_tokenizer
from hf_cod.io.models import load_model
from hf_cod.io.settings import ModelSettings
from hf_cod.io.text import Batch
from hf_cod.layers.running import busy, progress
from hf_cod.layers.speed import Speeds, speeds_of
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import LANGUAGE_MODELS, task_of
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.methods import score_layers


class Work:
    """One model that is being compressed; memory never holds two.

    Attributes:
        source: where the intact model comes from: Hub id, directory or GGUF file.
        model: the model as it is now; any class of transformers.
        tokenizer: its tokenizer.
        calibration, evaluation: samples to work on, and others to measure on.
        source: Hub id, directory or GGUF file that it was loaded from.
        scores: of the layers, given or found; None as long as there are none.
        options: keyword arguments that every method takes: journal, layers_path, show_progress.
        name: what reports call the model.
    """

    model: Any
    calibration: Sequence[Batch]
    evaluation: Sequence[Batch]

    def __init__(
        self, source: str, loading: ModelSettings, settings: Any, journal: Path, scores_file: str | None = None
    ) -> None:
        self.scores = None if scores_file is None else LayerScores.load(scores_file)
        self.source, self._loading, self.settings = source, loading, settings
        self.model, self.tokenizer = load_with_tokenizer(source, loading)
        self.name = model_title(source)
        self.options: dict[str, Any] = {
            "journal": journal,
            "layers_path": settings.layers_path,
            "show_progress": True,
        }
        if self.scores is not None:
            self.scores.check(self.stack)

    @property
    def stack(self) -> DecoderLayers:
        """The layers of the model as it is now."""
        return find_decoder_layers(self.model, self.settings.layers_path)

    def renew(self) -> None:
        """Loads the intact model in the place of a changed one."""
        self.model = None
        self.model = self.load()

    def load(self) -> Any:
        """The intact model, loaded anew."""
        with busy(f"loading {self.name}"):
            return load_model(self.source, self._loading)[0]

    def reload(self, directory: Path) -> None:
        """Loads what was saved in the place of what was changed."""
        self.model = None
        with busy("loading what was saved"):
            self.model = load_model(str(directory), replace(self._loading, revision="main"))[0]

    def score(self, method: str, **chosen: Any) -> LayerScores:
        """The scores that were given, or those that are found by a method, with the command's settings of it."""
        if self.scores is None:
            own = {name: getattr(self.settings, name) for name in ("threshold", "per_module", "seed", "layers_path")}
            more = {**own, **chosen, "batches": self.calibration, "show_progress": True}
            self.scores = score_layers(self.model, method=method, **more)
        return self.scores

    def perplexity(self) -> float | None:
        """On the samples to measure on; None for a model that is no language model."""
        if task_of(self.model) not in LANGUAGE_MODELS:
            return None
        batches = progress(self.evaluation, "perplexity", show=True)
        return held_out_perplexity(self.model, batches, self.settings.layers_path)

    def speed(self, name: str) -> Speeds:
        """Of the model as it is now, under that name; empty where it is not asked for.

        With one model in memory at a time, the intact one is timed before it is changed and what was saved afterwards:
        what else the machine does in between is in the figures.
        """
        if not getattr(self.settings, "speed", False):
            return {}
        with busy("measuring speed"):
            return speeds_of({name: self.stack}, self.evaluation)
