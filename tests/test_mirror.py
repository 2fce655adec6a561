"""`tests/` mirrors the rooms: each module has the test file of its name, or one table says which file tests it."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from hf_cod.cli.main import COMMANDS
from tests.test_imports import CIRCLES_OF_MODELS, MODULES, ROOT, imports_of

TESTS = Path(__file__).parent
# Test file -> the modules that it tests beside the one of its name, through a public door. A new module needs a test
# file of its own name; it comes here only if that would test the same again.
TESTED_BY = {
    "analysis/diagnostics/test_diagnosis.py": (
        "analysis/diagnostics/findings.py analysis/diagnostics/forward_results.py analysis/diagnostics/journaled.py "
        "analysis/diagnostics/applicable.py analysis/diagnostics/more_findings.py "
        "analysis/diagnostics/settings.py"
    ),
    "analysis/diagnostics/test_forward_pass.py": "analysis/diagnostics/forward_measures.py",
    "analysis/diagnostics/test_generation_drop.py": (
        "analysis/generation/decoding.py analysis/generation/prompts.py analysis/generation/settings.py"
    ),
    "analysis/diagnostics/test_more_measures.py": (
        "analysis/diagnostics/attention_sinks.py analysis/diagnostics/causal_score.py "
        "analysis/diagnostics/jacobians.py analysis/diagnostics/logit_lens.py "
        "analysis/diagnostics/massive_activations.py analysis/diagnostics/permutation_score.py "
    ),
    "analysis/diagnostics/test_repeated_layers.py": "layers/streams.py",
    "analysis/diagnostics/test_usefulness.py": "analysis/diagnostics/changed_layers.py",
    "analysis/evaluation/test_lm_eval_tasks.py": "analysis/evaluation/settings.py",
    "analysis/evaluation/test_metrics.py": (
        "analysis/evaluation/choice.py analysis/evaluation/likelihood.py layers/task.py"
    ),
    "analysis/generation/test_sources.py": (
        "analysis/generation/lm_eval_source.py analysis/generation/reasoning_gym_source.py analysis/generation/task.py"
    ),
    "analysis/monitoring/test_callback.py": "analysis/monitoring/settings.py cli/commands/history.py",
    "analysis/statistics/test_input_products.py": "analysis/statistics/matrix_inputs.py",
    "analysis/statistics/test_layer_statistics.py": (
        "analysis/statistics/file_checks.py analysis/statistics/squares_recorder.py"
    ),
    "cli/commands/test_finetune.py": (
        "cli/commands/finetune_memory.py cli/sizes.py cli/training.py training/runs/estimate.py "
        "training/runs/finite.py training/runs/memory.py training/runs/methods.py training/runs/new_adapters.py "
        "training/runs/trainer.py"
    ),
    "cli/commands/test_heal.py": "cli/__init__.py cli/samples.py",
    "cli/commands/test_quantize.py": "cli/explained.py",
    "cli/test_compression.py": "cli/closing.py cli/plan_settings.py cli/settings.py cli/step.py cli/work.py",
    "layers/test_offloading.py": "io/offloaded.py io/offloaded_checkpoint.py layers/hidden_states.py",
    "cli/test_parser.py": "cli/completion.py cli/field_options.py cli/option_groups.py cli/option_names.py",
    "cli/test_validation.py": "io/inputs.py",
    "io/test_files.py": "io/journal.py",
    "io/test_text.py": "io/rows.py",
    "scoring/imports/test_importer.py": (
        "scoring/imports/auto_round.py scoring/imports/mlx.py scoring/imports/numbers.py scoring/imports/table.py"
    ),
    "training/runs/test_training_data.py": "training/runs/packed_rows.py",
    "cli/commands/test_finetune_chat.py": "cli/commands/finetune_trl.py",
    "io/test_whole_checkpoint.py": "io/generation.py io/unread_weights.py",
    "cli/test_terminal.py": "cli/messages.py",
    "layers/test_finished_layers.py": "layers/layer_notes.py",
    "compression/depth/test_criteria.py": (
        "compression/depth/depth_plan.py compression/depth/maps.py compression/depth/protection.py "
        "compression/depth/removal_probe.py compression/depth/search.py"
    ),
    "compression/depth/test_dropper.py": "compression/depth/replacement.py",
    "compression/depth/test_repeater.py": (
        "compression/depth/repeat_plan.py compression/depth/repeat_probe.py compression/depth/repeat_search.py"
    ),
    "compression/search/test_planning.py": (
        "compression/search/evolution.py compression/search/plan_probe.py compression/search/settings.py "
        "compression/search/spaces.py scoring/search_results.py"
    ),
    "compression/experts/test_dropper.py": (
        "compression/experts/expert_plan.py compression/experts/planning.py "
        "compression/experts/settings.py layers/removal/expert_cuts.py layers/removal/experts.py"
    ),
    "compression/export/test_plan.py": "compression/export/settings.py",
    "compression/export/test_compressed_tensors.py": "compression/export/exporter.py compression/export/request.py",
    "compression/export/test_targets.py": (
        "compression/export/auto_round.py compression/export/exl3.py compression/export/gptqmodel.py "
        "compression/export/mlx.py"
    ),
    "compression/fit/test_planning.py": (
        "cli/commands/fit.py compression/fit/budget.py compression/fit/checks.py compression/fit/fit_plan.py "
        "compression/fit/knobs.py "
        "compression/fit/samples.py compression/fit/search.py compression/fit/settings.py compression/fit/trials.py "
        "layers/size.py"
    ),
    "compression/low_rank/test_factorizer.py": (
        "compression/low_rank/rank_plan.py compression/low_rank/rank_report.py compression/low_rank/settings.py "
        "compression/low_rank/spectra.py"
    ),
    "compression/pruning/test_pruner.py": (
        "compression/pruning/methods.py compression/pruning/settings.py layers/checks.py layers/fingerprints.py"
    ),
    "compression/quantization/test_format.py": (
        "compression/quantization/bnb_decoding.py compression/quantization/scales.py functional/bits.py"
    ),
    "compression/quantization/test_experts.py": "compression/quantization/widths.py",
    "compression/quantization/test_linear.py": (
        "compression/quantization/rounding.py compression/quantization/settings.py"
    ),
    "compression/quantization/test_native.py": "compression/quantization/bnb.py",
    "compression/quantization/test_plan.py": (
        "compression/quantization/config.py compression/quantization/quantizable.py"
    ),
    "compression/quantization/test_product.py": "compression/quantization/codes.py",
    "compression/quantization/test_quantize.py": "layers/sequential.py",
    "compression/quantization/test_quantizer.py": "compression/quantization/stored_modules.py",
    "compression/sparse/test_linear.py": "compression/sparse/product.py",
    "compression/sparse/test_quantizer.py": (
        "compression/sparse/checkpoint.py compression/sparse/config.py compression/sparse/packing.py "
        "compression/sparse/settings.py"
    ),
    "compression/width/test_experts.py": "compression/width/selection.py layers/expert_units.py",
    "compression/width/test_narrower.py": (
        "compression/width/gradients.py compression/width/matrices.py "
        "compression/width/methods.py compression/width/planning.py compression/width/settings.py "
        "compression/width/width_plan.py compression/width/width_report.py"
    ),
    "examples/test_pretrain.py": "training/pretraining/checkpoints.py training/pretraining/preparation.py",
    "functional/test_low_rank.py": "functional/randomness.py",
    "io/test_settings.py": "compression/depth/settings.py io/deprecation.py",
    "layers/test_direct_use.py": "layers/meta_weights.py layers/probe_inputs.py layers/watched_weights.py",
    "layers/test_capturing.py": "layers/partial_forward.py",
    "layers/test_layer_calls.py": "layers/input_gradients.py",
    "layers/removal/test_arranging.py": (
        "layers/removal/cache.py layers/removal/changes.py layers/removal/config_surgery.py "
        "layers/removal/ordered_layers.py layers/removal/rebuilding.py"
    ),
    "layers/test_experts.py": "layers/expert_counts.py layers/expert_discovery.py",
    "layers/test_expert_routing.py": "layers/expert_products.py",
    "layers/test_stack.py": "layers/modules.py layers/weights.py",
    "layers/test_unit_discovery.py": (
        "layers/layer_copies.py layers/matrix_calls.py layers/row_owners.py layers/unit_checks.py layers/units.py"
    ),
    "models/test_authors_checkpoints.py": "models/__init__.py models/authors.py",
    "models/test_convert.py": "models/folding.py",
    "models/test_convert_files.py": "models/checkpoint.py",
    "models/test_loading.py": (
        "models/configuration_cod_llama.py models/configuration_cod_mistral.py "
        "models/configuration_cod_olmo.py models/configuration_cod_olmo2.py models/configuration_cod_qwen2.py "
        "models/configuration_cod_qwen3.py models/configuration_cod_vit.py models/configuration_shaped.py "
        "models/families.py models/modeling_cod_llama.py models/modeling_cod_mistral.py "
        "models/modeling_cod_olmo.py models/modeling_cod_olmo2.py models/modeling_cod_qwen2.py "
        "models/modeling_cod_qwen3.py models/modeling_cod_vit.py"
    ),
    "models/test_placements.py": "models/configuration_cod.py models/modeling_cod.py models/modifiers.py",
    "models/test_shapes.py": "models/shaping.py",
    "models/test_training.py": "models/presets.py",
    "reporting/plots/test_figures.py": (
        "reporting/plots/__init__.py reporting/plots/colours.py reporting/plots/expert_panel.py "
        "reporting/plots/generation_panel.py "
        "reporting/plots/names.py reporting/plots/panels.py reporting/plots/trade_off.py "
        "reporting/plots/swap_panel.py reporting/plots/training_panels.py"
    ),
    "reporting/test_comparison.py": "io/report_results.py",
    "reporting/test_model_card.py": "cli/commands/card.py reporting/card_entries.py reporting/settings.py",
    "scoring/test_allocation.py": "scoring/budget_checks.py scoring/layer_scores.py",
    "scoring/test_expert_methods.py": "analysis/statistics/expert_usage.py",
    "scoring/test_methods.py": "scoring/request.py scoring/settings.py",
    "scoring/test_part_plans.py": "scoring/part_methods.py",
    "test_habits.py": "_version.py",
    "test_module.py": "__main__.py",
    "test_pair.py": "cli/commands/demo.py",
    "test_public_api.py": "__init__.py",
    "test_recipients.py": "cli/recorded.py reporting/result_card.py",
    "training/adapters/test_adapter_training.py": "training/adapters/config.py training/owlore/lora_ranks.py",
    "training/adapters/test_adapters.py": (
        "layers/adaptable_banks.py training/adapters/__init__.py training/adapters/export.py "
        "training/adapters/model.py training/adapters/registry.py"
    ),
    "training/healing/test_healer.py": (
        "training/healing/distillation_trainer.py training/healing/healed.py training/healing/objective.py "
        "training/healing/pair.py training/healing/settings.py training/healing/zeros.py"
    ),
    "training/healing/test_recovery.py": "training/healing/masked_adapters.py",
    "training/owlore/test_optimizer.py": (
        "training/owlore/active_layers.py training/owlore/eight_bit.py training/owlore/fitting.py "
        "training/owlore/increment.py "
        "training/owlore/moments.py training/owlore/optimizer_state.py training/owlore/settings.py "
        "training/owlore/trained_increments.py "
        "training/owlore/update_in_backward.py"
    ),
    "training/runs/test_interrupt.py": "io/interruption.py",
    "training/runs/test_checkpoint_of_run.py": (
        "training/owlore/saved_moments.py training/runs/checkpoint_checksums.py"
    ),
    "io/test_output_directory.py": "io/output_manifest.py io/output_checks.py io/directory_lock.py",
}
ELSEWHERE = {module: test for test, modules in TESTED_BY.items() for module in modules.split()}


def has_code(path: Path) -> bool:
    """Whether there is more in the file than a docstring."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(not isinstance(node, ast.Expr) for node in body)


TO_TEST = {path.relative_to(ROOT).as_posix(): name for name, path in MODULES.items() if has_code(path)}


def mirror(module: str) -> str:
    """`layers/stack.py` -> `layers/test_stack.py`."""
    path = Path(module)
    return (path.parent / f"test_{path.stem.lstrip('_')}.py").as_posix()


def public_names(path: Path) -> set[str]:
    """Functions, classes and constants that a module defines."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if name == "__version__" or not name.startswith("_")}


DEFINED = {name: public_names(path) for name, path in MODULES.items()}
DEFINITIONS = Counter(each for names in DEFINED.values() for each in names)


# What runs a command by its name.
RUNNERS = {"hf_cod.cli.main", "tests.terminals.run_on_terminal"}
# Front doors import all that there is, and say nothing of what a test is about.
IMPORTS = {name: set(imports_of(path)) for name, path in MODULES.items() if name not in ("hf_cod", "hf_cod.models")}


@cache
def words_of(test: str) -> tuple[set[str], set[str]]:
    """What a test file imports or asks a module for, and its strings."""
    names, strings = set(), set()
    for node in ast.walk(ast.parse((TESTS / test).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{a.name}" for a in node.names), *(a.name for a in node.names)}
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value)
    return names, strings


def is_used(name: str, test: str) -> bool:
    """Whether a test file imports a module, names what that module alone defines, or runs it as a command."""
    names, strings = words_of(test)
    own = {each for each in DEFINED[name] if DEFINITIONS[each] == 1}
    commands = {one for one, (module, _) in COMMANDS.items() if name == f"hf_cod.cli.commands.{module}"}
    runs = (RUNNERS & names and commands & strings) or {f"tests.cli.runs.{one}" for one in commands} & names
    if name == "hf_cod.__main__":
        return "run_module" in names and "hf_cod" in strings
    in_code = any(name in string for string in strings)  # that a process of its own runs
    return name in names or in_code or bool(own & names) or bool(runs)


@cache
def doors_of(name: str) -> set[str]:
    """The module, and those that import it, or the other half of its pair: a test goes through the public door."""
    halves = {name}.union(*(pair for pair in CIRCLES_OF_MODELS if name in pair))
    return {name} | {other for other, imports in IMPORTS.items() if halves & imports}


@pytest.mark.parametrize("module", TO_TEST)
def test_every_module_is_tested(module):
    test = ELSEWHERE.get(module, mirror(module))
    assert (TESTS / test).is_file(), f"{module} needs {mirror(module)}, or a place in TESTED_BY"
    assert any(is_used(door, test) for door in doors_of(TO_TEST[module])), f"{test} does not use {module}"


def test_the_table_has_no_stale_lines():
    listed = [module for modules in TESTED_BY.values() for module in modules.split()]
    assert len(listed) == len(set(listed)), [module for module, count in Counter(listed).items() if count > 1]
    assert not set(listed) - TO_TEST.keys(), "modules that are no more"
    assert not [module for module in listed if (TESTS / mirror(module)).is_file()], "they have a test file by now"


def test_a_test_file_that_has_nothing_to_do_with_a_module_is_seen():
    assert not any(is_used(door, "functional/test_ranks.py") for door in doors_of("hf_cod.layers.orientation"))
    assert not any(is_used(door, "cli/commands/test_env.py") for door in doors_of("hf_cod.cli.commands.prune"))
    assert is_used("hf_cod.cli.commands.prune", "cli/commands/test_prune.py")
