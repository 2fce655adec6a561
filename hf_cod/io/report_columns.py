"""What the columns of a report's table by layer mean; shown below the table."""

from __future__ import annotations

from collections.abc import Iterable

# Measure in `RunReport.layers` -> its meaning.
MEANINGS = {
    "added_share": "variance of what the layer adds, as a share of the variance of its output",
    "angular_distance": "angle between the layer's input and output, divided by pi",
    "attention_sinks": "share of the attention of later tokens that goes to the first token, mean over heads",
    "bits": "stored bits per weight, scales included",
    "block_influence": "1 - cosine of the layer's input and output",
    "causal_score": "relative change of what later layers add, without the layer",
    "chain_loss": "rise of the loss of the intact model's own answers without the layer, in nats per token",
    "cost": "by the criterion, what removing the layer costs",
    "error": "lost share of the energy of the matrices' outputs, mean over the changed matrices",
    "four": "number of matrices stored in 4 bits; the others are stored in 3",
    "full_rank_share": "rank that is kept, as a share of the full rank",
    "gradient_norm": "norm of the gradient of the loss by the layer's weights",
    "jacobian": "distance of the layer's Jacobian from the identity, as a share of the norm of the identity",
    "layer_drop": "metric of the model without the layer, minus that of the intact model",
    "lens_gain": "how much the layer lowers the loss of the logit lens",
    "logit_lens": "loss if norm and head read the layer's output; language models: nats per token",
    "massive_activations": "number of massive entries (above 100 and 1000 medians) in a sample's hidden states",
    "massive_ratio": "largest magnitude in the layer's output, over the median",
    "max_abs": "largest magnitude in the layer's output",
    "mean": "mean of the layer's output",
    "parameter_share": "share of the weights that is kept",
    "parameters": "number of weights in the layer's matrices",
    "permutation_score": "rise of the loss if the layer and the next one are swapped",
    "reference_loss": "rise of the loss of the tasks' reference answers without the layer, in nats per token",
    "removed": "1 if the layer was removed",
    "runs": "how often the layer runs",
    "score": "importance of the layer by the score in the settings; higher is more important",
    "share_of_channels": "share of the MLP's channels that is kept",
    "share_of_expert_channels": "share of each expert's channels that is kept",
    "share_of_heads": "share of the attention heads that is kept",
    "sink_heads": "share of heads that give the first token more than 30 % of their attention",
    "sparsity": "share of the weights that are zero",
    "swap_bottom": "rise of the loss with this layer and all before it from the donor",
    "swap_single": "rise of the loss with this layer from the donor",
    "swap_top": "rise of the loss with this layer and all after it from the donor",
    "target": "share of zeros that was planned",
    "task_accuracy": "mean score of the answers that are generated without the layer, minus that of the intact model",
    "teacher_layer": "layer of the teacher whose output the layer is trained to match",
    "trained": "number of steps in which the layer was trained",
    "usefulness": "rise of the loss with the nearest linear map in the place of the layer",
    "variance": "variance of the layer's output over tokens and channels",
}


def legend(names: Iterable[str]) -> list[str]:
    """One line for each known measure: its name as the table prints it, and its meaning."""
    return [f"{name.replace('_', ' ')}: {MEANINGS[name]}" for name in names if name in MEANINGS]
