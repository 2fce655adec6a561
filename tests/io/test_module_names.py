"""Matrices by name, with PEFT as the reference of the rules."""

from types import SimpleNamespace

import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from hf_cod import PruneSettings
from hf_cod.io.module_names import ModuleSettings, matching, without_unset

NAMES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.proj", "p")]
CALLED = {name: {name} for name in NAMES}


def peft(include, exclude):
    config = SimpleNamespace(
        target_modules=include, exclude_modules=exclude, layers_to_transform=None, layers_pattern=None
    )
    return {name for name in NAMES if check_target_module_exists(config, name)}


@pytest.mark.parametrize(
    "exclude", [None, ["mlp.up_proj"], ["p", "layers.3.mlp.proj"], r"model\.layers\.1\..*", r".*p"]
)
@pytest.mark.parametrize(
    "include", [["proj"], ["q_proj", "p"], ["model.layers.1.mlp.up_proj"], r".*\.(1|2)\..*proj", r".*\.layers\.\d\..*"]
)
def test_names_and_expressions_match_as_in_peft(include, exclude):
    found = matching("include", include, CALLED) - (matching("exclude", exclude, CALLED) if exclude else set())
    assert found == peft(include, exclude)


def test_what_matches_nothing_is_named_with_what_is_near():
    with pytest.raises(ValueError, match=r"include: expected .*such as up_proj.*, got 'upproj', which matches none"):
        matching("include", ["q_proj", "upproj"], CALLED)
    with pytest.raises(ValueError, match=r"exclude: .*got 'q_proj', which as a regular expression.*\['q_proj'\]"):
        matching("exclude", "q_proj", CALLED)
    with pytest.raises(ValueError, match=r"exclude: expected .*, got '\.\*mpl\.\*', which matches none"):
        matching("exclude", ".*mpl.*", CALLED)
    with pytest.raises(
        ValueError, match=r"got '\.\*\\\\\.q_proj', which matches none: a list holds names; join .* by \|"
    ):
        matching("include", [r".*\.q_proj", r".*\.k_proj"], CALLED)


@pytest.mark.parametrize(
    "name, given",
    [*((name, given) for name in ("include", "exclude") for given in ("(", "", [""], ["q_proj", ""])), ("include", [])],
)
def test_bad_choices_are_refused_before_a_model_is_seen(name, given):
    with pytest.raises(ValueError, match=f"{name}: expected "):
        PruneSettings(**{name: given})


def test_an_empty_list_excludes_nothing_and_cannot_include():
    assert ModuleSettings(exclude=[]) == ModuleSettings(exclude=()) == ModuleSettings()
    with pytest.raises(ValueError, match=r"include: .*got \[\], which selects no matrix; None selects all"):
        ModuleSettings(include=[])


def test_one_expression_in_a_list_is_an_expression():
    """As the command line passes it; names of modules hold letters, digits, _, - and dots."""
    assert ModuleSettings(include=[r".*\.mlp\..*"]).include == r".*\.mlp\..*"
    assert ModuleSettings(include=["mlp.up_proj"], exclude=("q_proj", "k")).include == ["mlp.up_proj"]


def test_runs_without_a_choice_keep_the_identity_of_an_earlier_version():
    assert without_unset({"include": None, "exclude": ["a"], "bits": None}) == {"exclude": ["a"], "bits": None}
