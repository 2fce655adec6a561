"""Names of options in other tools and in earlier versions of hf_cod."""

# Option name in other tools, or a second name -> name in hf-cod; for commands that have the latter.
ALIASES = {"--output-dir": "--output", "--stack": "--layers-path"}
# Option in scripts of Trainer, TRL or PEFT -> the closest one in hf-cod, which an error about the former names.
ELSEWHERE = {
    "--lr": "--learning-rate",
    "--epochs": "--passes",
    "--num-epochs": "--passes",
    "--num-train-epochs": "--passes",
    "--max-steps": "--steps",
    "--per-device-train-batch-size": "--micro-batch-size",
    "--max-length": "--sequence-length",
    "--max-seq-length": "--sequence-length",
    "--logging-steps": "--log-every",
    "--save-steps": "--save-every",
    "--dataset": "--text",
    "--dataset-name": "--text",
    "--torch-dtype": "--dtype",
    "--gradient-checkpointing": "--checkpointing",
}
# Option name in an earlier version -> current name; accepted for one release, with a warning, by commands that have
# the current name and do not use the earlier one for something else.
RENAMED = {
    "--multiple": "--channel-multiple",
    "--parameters": "--parameter-share",
    "--rank": "--full-rank-share",
    "--rank-share": "--factor-share",
    "--layers": "--n-removed",
    "--minimum": "--min-sparsity",
    "--verify": "--n-verified",
    "--recover": "--recover-steps",
    "--labels": "--label-weight",
    "--hidden": "--hidden-weight",
}
