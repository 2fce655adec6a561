"""Groups of options in `--help`, in their order: first what a first run needs, then what is rarely changed."""

from __future__ import annotations

# argparse's own group, which is the first one.
FIRST = "options"
# Title -> options, in their order in all commands that have them.
GROUPS = {
    FIRST: (
        *("html", "space", "upload"),
        *("to", "text", "teacher", "memory", "parameter_share", "bits", "sparsity", "pattern", "n_removed", "share"),
        *("start", "end", "search", "length"),
        *(
            "min_sparsity",
            "metrics",
            "tasks",
            "method",
            "criterion",
            "score",
            "experts",
            "scores",
            "statistics",
            "imatrix",
            "plan",
            "tokens",
            "steps",
        ),
        *(
            "passes",
            "learning_rate",
            "device",
            "output",
            "estimate",
            "print_trl",
            "plan_only",
            "explain",
        ),
        *("name", "license", "language", "sources", "where", "comparison", "labels", "norm_type", "post_layers"),
    ),
    "model and text": (
        *("dtype", "trust_remote_code", "revision", "layers_path", "teacher_dtype", "teacher_revision"),
        "max_memory",
        *("text_column", "text_split", "text_config", "chat_template", "eval_text"),
    ),
    "samples": (
        *("sequence_length", "max_samples", "tuning_samples", "eval_samples", "batch_size", "micro_batch_size"),
        *("pack", "seed"),
    ),
    "scores and the plan by layer": (
        "threshold",
        "per_module",
        "granularity",
        "search_passes",
        "target",
        "pruner",
        "spread",
        "baseline",
        "force",
    ),
    "settings of the method": (
        *(
            "include",
            "exclude",
            "token",
            "drop_metric",
            "max_prompts",
            "max_new_tokens",
            "temperature",
            "stop_early",
            "full_rank_share",
            "factor_share",
            "compensation",
            "expert_basis",
        ),
        *("channel_multiple", "replacement", "protect", "times", "merge", "rounding", "block", "group_size"),
        *("embedding_bits", "search_embedding", "gguf"),
        *("double_quant", "skip"),
        *("knobs", "n_verified"),
        *("recover_steps", "recover_rank", "recover_learning_rate"),
        *("temperature", "label_weight", "hidden_weight", "teacher_layers"),
        *("lora_rank", "n_active", "interval", "rank", "scale", "floor", "deselected", "train_embeddings", "moments"),
        "fused",
    ),
    "training": ("checkpointing", "bf16", "max_grad_norm", "save_every", "log_every"),
    "measurements and plots": ("speed", "plots", "plot_format"),
}
_TITLES = {name: title for title, names in GROUPS.items() for name in names}
_ORDER = [*_TITLES]


def in_order(name: str) -> tuple[int, int]:
    """Sort key of an option: its group, and its place there; options that are in no group end the first one."""
    place = _ORDER.index(name) if name in _TITLES else len(_ORDER)
    return [*GROUPS].index(group_of(name)), place


def group_of(name: str) -> str:
    """Title of the group of an option."""
    return _TITLES.get(name, FIRST)
