"""The formulas as one would write them down: slow, whole, one layer and one sample at a time."""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_cod.layers.stack import find_decoder_layers


def hidden_states(model, batch):
    """[x^0, ..., x^L]: what enters the first layer and what leaves each layer, read by plain hooks."""
    states, handles = [], []
    layers = list(find_decoder_layers(model))
    first = lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    after = lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
    handles.append(layers[0].register_forward_pre_hook(first, with_kwargs=True))
    handles += [layer.register_forward_hook(after) for layer in layers]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return [x.double() for x in states]


def kept_positions(mask, row, length):
    return list(range(length)) if mask is None else [t for t in range(length) if mask[row, t]]


def angle(x, y):
    cosine = torch.dot(x, y) / (x.norm() * y.norm())
    return math.acos(max(-1.0, min(1.0, float(cosine)))) / math.pi


def angular_matrix(states, mask, token):
    """L x L, [l][n - 1]."""
    L = len(states) - 1
    matrix = torch.full((L, L), math.nan, dtype=torch.float64)
    for l in range(L):  # noqa: E741
        for n in range(1, L - l + 1):
            per_sample = []
            for s in range(len(states[0])):
                kept = kept_positions(mask, s, states[0].shape[1])
                kept = {"last": kept[-1:], "first": kept[:1], "all": kept}[token]
                angles = [angle(states[l][s, t], states[l + n][s, t]) for t in kept]
                per_sample.append(sum(angles) / len(angles))
            matrix[l, n - 1] = sum(per_sample) / len(per_sample)
    return matrix


def block_influence(states, mask):
    result = []
    for x, y in itertools.pairwise(states):
        samples = []
        for s in range(len(x)):
            kept = kept_positions(mask, s, x.shape[1])
            cosines = [float(torch.dot(x[s, t], y[s, t]) / (x[s, t].norm() * y[s, t].norm())) for t in kept]
            samples.append(1 - sum(cosines) / len(cosines))
        result.append(sum(samples) / len(samples))
    return result


def real_tokens(x, mask):
    rows = [x[s, t] for s in range(len(x)) for t in kept_positions(mask, s, x.shape[1])]
    return torch.stack(rows)


def perplexity(model, batch):
    with torch.no_grad():
        logits = model(**batch).logits.double()
    total, count = 0.0, 0
    for s in range(len(logits)):
        for t in range(logits.shape[1] - 1):
            if batch["attention_mask"][s, t + 1]:
                total -= float(logits[s, t].log_softmax(-1)[batch["input_ids"][s, t + 1]])
                count += 1
    return math.exp(total / count)


def without_layer(model, index):
    """A copy in which layer `index` hands its input on."""
    model = copy.deepcopy(model)
    layer = find_decoder_layers(model)[index]
    forward = layer.forward

    def passing(*args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if isinstance(forward(*args, **kwargs), tuple) else hidden

    layer.forward = passing
    return model


def outlier_ratio(matrices, M):
    """OWL's D of one layer from whole matrices [(W (out, in), X (tokens, in))]: A laid out, all matrices together."""
    A = torch.cat([(W.double().abs() * X.double().norm(dim=0)).flatten() for W, X in matrices])
    return float((M * A.mean() < A).double().mean())


def linear_inputs(model, batches, index):
    """Name -> (weight (out, in), inputs (tokens, in)) of each plain Linear or Conv1D of a layer, without padding."""
    found, handles = {}, []
    layer = f"{find_decoder_layers(model).layers_path}.{index}."
    for name, module in model.named_modules():
        if name.startswith(layer) and isinstance(module, (nn.Linear, Conv1D)):
            W = module.weight.detach()
            found[name] = (W.T if isinstance(module, Conv1D) else W, [])
            keep = lambda m, args, rows=found[name][1]: rows.append(args[0].detach())  # noqa: E731
            handles.append(module.register_forward_pre_hook(keep))
    for batch in batches:
        with torch.no_grad():
            model(**batch)
        for _, rows in found.values():
            x, mask = rows.pop(), batch.get("attention_mask")
            x = x if x.dim() == 3 else x.unflatten(0, batch["input_ids"].shape)
            rows.insert(0, real_tokens(x, mask))
    for handle in handles:
        handle.remove()
    return {name: (W, torch.cat(rows)) for name, (W, rows) in found.items()}


def _least(values, count):
    """The positions of the `count` least values, the first ones of equal values."""
    return sorted(range(len(values)), key=lambda i: (values[i], i))[:count]


def wanda_mask(W, s, S):
    """Row by row; each row ends where the zeros so far are the share S of the weights so far, rounded."""
    mask, done = torch.zeros_like(W, dtype=torch.bool), 0
    for i, row in enumerate(W):
        scores = [abs(float(w)) * float(x) for w, x in zip(row, s, strict=True)]
        count = math.floor((i + 1) * W.shape[1] * S + 0.5) - done
        for j in _least(scores, count):
            mask[i, j] = True
        done += count
    return mask


def magnitude_mask(W, S):
    mask = torch.zeros(W.numel(), dtype=torch.bool)
    for i in _least([abs(float(w)) for w in W.flatten()], math.floor(W.numel() * S + 0.5)):
        mask[i] = True
    return mask.view(W.shape)


def group_mask(scores, N, M):
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        for start in range(0, len(row), M):
            for j in _least(row[start : start + M], M - N):
                mask[i, start + j] = True
    return mask


def optimal_brain_surgeon(W, H, S, pattern, damping, block):
    """SparseGPT column by column in float64: for each column the whole inverse of what is left of H, anew."""
    W = W.clone()
    rows, columns = W.shape
    H = H + damping * H.diagonal().mean() * torch.eye(columns, dtype=H.dtype)
    left = [torch.linalg.inv(H[j:, j:]) for j in range(columns)]
    block = block if pattern is None else max(1, block // pattern[1]) * pattern[1]
    mask, done = torch.zeros_like(W, dtype=torch.bool), 0
    for j in range(columns):
        if pattern is None and j % block == 0:
            here = range(j, min(j + block, columns))
            cost = [float(W[i, k] ** 2 / left[k][0, 0]) for i in range(rows) for k in here]
            count = math.floor(here.stop * rows * S + 0.5) - done
            for place in _least(cost, count):
                mask[place // len(here), j + place % len(here)] = True
            done += count
        elif pattern is not None and j % pattern[1] == 0:
            group = range(j, j + pattern[1])
            cost = torch.stack([W[:, k] ** 2 / left[k][0, 0] for k in group], 1)
            mask[:, j : group.stop] = group_mask(cost, *pattern)
        for i in range(rows):
            if mask[i, j]:
                W[i, j:] -= W[i, j] / left[j][0, 0] * left[j][0]
                W[i, j] = 0
    return W


def whitened_svd(W, H, r, damping):
    """The matrix of rank r nearest to W by || (W - .) L ||_F, L L^T = H + damping mean(diag H) I, and the squares of
    the singular values of W L: by an SVD and an inverse, as the formula says.
    """
    L = torch.linalg.cholesky(H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype))
    U, S, V = torch.linalg.svd(W @ L, full_matrices=False)
    return U[:, :r] * S[:r] @ V[:r] @ torch.linalg.inv(L), S.square()


def oats(W, H, r, per_row, iterations):
    """S and L of OATS' alternation: an SVD an iteration, row after row."""
    D = H.diagonal().sqrt()
    S = torch.zeros_like(W)
    for _ in range(iterations):
        U, values, V = torch.linalg.svd(W * D - S, full_matrices=False)
        L = U[:, :r] * values[:r] @ V[:r]
        S = torch.zeros_like(W)
        for i, row in enumerate(W * D - L):
            top = row.abs().topk(per_row).indices
            S[i, top] = row[top]
    return S / D, L / D


def routed_experts(model, batch):
    """Name of the experts -> for each expert (tokens (n,), gate weights (n,), x (n, d), what it adds (n, d)), in the
    order of the tokens: written out for each kind of code, from what enters the modules of the model.
    """
    called, handles = {}, []
    for name, module in model.named_modules():
        keep = lambda m, args, out, name=name: called.update({name: (args, out)})  # noqa: E731
        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Experts" in kind and kind.startswith("Llama4"):
            found[name] = _weighted_inputs(module, *called[name.removesuffix("experts") + "router"])
        elif kind == "DbrxExperts":
            found[name + ".mlp"] = _by_index(_dbrx_expert(module.mlp), module.num_experts, *called[name][0])
        elif kind in ("JetMoeMoE", "JetMoeMoA"):
            sorted_by = called[name + ".router"][1]
            outputs = (called[f"{name}.{part}"] for part in ("input_linear", "output_linear"))
            found[name] = _sorted(sorted_by, *outputs)
        elif kind.endswith("Experts") and hasattr(module, "has_gate"):
            found[name] = _by_index(_expert_of_bank(module), module.num_experts, *called[name][0])
    return found


def _by_index(f, count, hidden, index, weights):
    """sum_k w_k f_e(x), of experts e that each token names."""
    hidden, found = hidden.reshape(-1, hidden.shape[-1]), []
    for expert in range(count):
        rows = [(t, weights[t, k]) for t in range(len(hidden)) for k in range(index.shape[1]) if index[t, k] == expert]
        tokens = torch.tensor([t for t, _ in rows], dtype=torch.long)
        w = torch.stack([w for _, w in rows]) if rows else torch.zeros(0)
        found.append((tokens, w, hidden[tokens], w[:, None] * f(expert, hidden[tokens])))
    return found


def _expert_of_bank(bank):
    def f(expert, x):
        def times(x, key):
            W = getattr(bank, key)[expert].detach()
            y = x @ (W if bank.is_transposed else W.T)
            return y + getattr(bank, f"{key}_bias")[expert].detach() if bank.has_bias else y

        return times(bank._apply_gate(times(x, "gate_up_proj")), "down_proj")

    return f


def _dbrx_expert(mlp):
    def f(expert, x):
        rows = slice(expert * mlp.ffn_hidden_size, (expert + 1) * mlp.ffn_hidden_size)
        w1, v1, w2 = (getattr(mlp, key).detach()[rows] for key in ("w1", "v1", "w2"))
        return (mlp.activation_fn(x @ w1.T) * (x @ v1.T)) @ w2

    return f


def _weighted_inputs(bank, router_inputs, router_outputs):
    """Llama 4: f_e(w_e x), with the gate weight on the input."""
    (hidden,), (scores, _) = router_inputs, router_outputs
    found = []
    for expert in range(len(bank.down_proj)):
        tokens = scores[:, expert].nonzero().flatten()
        w = scores[tokens, expert]
        x = hidden[tokens] * w[:, None]
        gate, up = (x @ bank.gate_up_proj[expert].detach()).chunk(2, -1)
        found.append((tokens, w, x, (up * bank.act_fn(gate)) @ bank.down_proj[expert].detach()))
    return found


def _sorted(sorted_by, first, last):
    """JetMoe: rows sorted by expert; the last product, times the gate weights."""
    _, tokens, weights, sizes, _ = sorted_by
    ((x, _), _), (_, y) = first, last
    parts = zip(*(one.split(sizes) for one in (tokens, weights, x, y)), strict=True)
    return [(t, w, x, w[:, None] * y) for t, w, x, y in parts]


def expert_scores(model, batch, threshold=5.0):
    """Method -> name of the experts -> one score per expert, from what `routed_experts` has."""
    stack = find_decoder_layers(model)
    real = batch["attention_mask"].bool().flatten()
    matrices = {name: W for index in range(len(stack)) for name, W in stack.matrices(index)}
    sets = {experts.name: experts for index in range(len(stack)) for experts in stack.expert_sets(index)}
    found = {"reap": {}, "router_weight": {}, "frequency": {}, "owl": {}}
    inputs = inputs_of_experts(model, batch)
    for name, routed in routed_experts(model, batch).items():
        for method in found:
            found[method][name] = []
        for expert, (tokens, weights, _, added) in enumerate(routed):
            kept = real[tokens]
            n = int(kept.sum())
            norms = added[kept].double().norm(dim=1)
            found["reap"][name].append(float(norms.mean()) if n else 0.0)
            found["router_weight"][name].append(float(weights[kept].double().sum()) / int(real.sum()))
            found["frequency"][name].append(n / int(real.sum()))
            parts = [(matrices[m.name][expert], inputs[m.name, expert]) for m in sets[name].matrices] if n else []
            parts = [(W, x[real[at]]) for W, (x, at) in parts]
            found["owl"][name].append(outlier_ratio(parts, threshold) if n else 0.0)
    return found


def inputs_of_experts(model, batch):
    """(matrix, expert) -> (its inputs, their tokens): those of later matrices follow from those of the first."""
    stack, found = find_decoder_layers(model), {}
    routed = routed_experts(model, batch)
    modules = dict(model.named_modules())
    for experts in (one for index in range(len(stack)) for one in stack.expert_sets(index)):
        for expert, (tokens, _, x, _) in enumerate(routed[experts.name]):
            for matrix in experts.matrices[:-1]:
                found[matrix.name, expert] = x, tokens
            first = x.double() @ experts.matrices[0].read(expert).double().T
            bank = modules[experts.places[0]]
            if experts.matrices[0].bias is not None:
                first = first + experts.matrices[0].bias[expert].detach().double()
            if len(experts.matrices) == 3:  # DBRX
                inner = bank.activation_fn(first) * (x.double() @ experts.matrices[1].read(expert).double().T)
            elif hasattr(bank, "_apply_gate"):
                inner = bank._apply_gate(first)
            elif hasattr(bank, "act_fn"):
                gate, up = first.chunk(2, -1)
                inner = up * bank.act_fn(gate)
            else:
                inner = _jetmoe_inner(model, experts, expert, first, batch)
            found[experts.matrices[-1].name, expert] = inner.detach(), tokens
    return found


def _jetmoe_inner(model, experts, expert, first, batch):
    """In the MLP a gated activation; in attention, what attention makes of the queries, as the model has it."""
    around = model.get_submodule(experts.name)
    if hasattr(around, "activation"):
        gate, up = first.chunk(2, -1)
        return around.activation(gate) * up
    seen = []
    handle = around.output_linear.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    ((x, sizes),) = seen
    return x.split(sizes)[expert]
