"""What the columns of a report's table by layer mean; shown below the table."""

from __future__ import annotations

from collections.abc import Iterable

# Measure in `RunReport.layers` -> its meaning.
MEANINGS = {
    "added_share": "variance of what the layer adds, as a share of the variance of its output",
    "angular_distance": "angle between the layer's input and output, divided by pi",
    "bits": "stored bits per weight, scales included",
    "block_influence": "1 - cosine of the layer's input and output",
    "chain_loss": "rise of the loss of the intact model's own answers without the layer, in nats per token",
    "cost": "by the criterion, what removing the layer costs",
    "error": "lost share of the energy of the matrices' outputs, mean over the changed matrices",
    "four": "number of matrices stored in 4 bits; the others are stored in 3",
    "full_rank_share": "rank that is kept, as a share of the full rank",
    "gradient_norm": "norm of the gradient of the loss by the layer's weights",
    "layer_drop": "metric of the model without the layer, minus that of the intact model",
    "max_abs": "largest magnitude in the layer's output",
    "mean": "mean of the layer's output",
    "parameter_share": "share of the weights that is kept",
    "parameters": "number of weights in the layer's matrices",
    "reference_loss": "rise of the loss of the tasks' reference answers without the layer, in nats per token",
    "removed": "1 if the layer was removed",
    "runs": "how often the layer runs",
    "score": "importance of the layer by the score in the settings; higher is more important",
    "share_of_channels": "share of the MLP's channels that is kept",
    "share_of_expert_channels": "share of each expert's channels that is kept",
    "share_of_heads": "share of the attention heads that is kept",
    "sparsity": "share of the weights that are zero",
    "target": "share of zeros that was planned",
    "task_accuracy": "mean score of the answers that are generated without the layer, minus that of the intact model",
    "teacher_layer": "layer of the teacher whose output the layer is trained to match",
    "trained": "number of steps in which the layer was trained",
    "variance": "variance of the layer's output over tokens and channels",
}


def legend(names: Iterable[str]) -> list[str]:
    """One line for each known measure: its name as the table prints it, and its meaning."""
    return [f"{name.replace('_', ' ')}: {MEANINGS[name]}" for name in names if name in MEANINGS]
