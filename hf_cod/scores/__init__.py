"""How much each layer matters: LayerScores, and one table of ways to find them."""

from hf_cod.scores.layer_scores import LayerScores
from hf_cod.scores.methods import METHODS, ScoreSettings, score_layers
from hf_cod.scores.pruning_probe import PRUNERS

__all__ = ["METHODS", "PRUNERS", "LayerScores", "ScoreSettings", "score_layers"]
