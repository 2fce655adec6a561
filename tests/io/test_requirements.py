"""The lowest versions in install lines are those that pyproject.toml declares."""

import re
from pathlib import Path

import pytest

import hf_cod
from hf_cod.io import requirements
from hf_cod.io.requirements import requirement

DECLARED = (Path(hf_cod.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture
def fresh():
    """What is read once a process is read again, and not kept."""
    requirements._declared.cache_clear()
    yield
    requirements._declared.cache_clear()


@pytest.mark.parametrize("package", ["transformers", "torch", "peft", "bitsandbytes"])
def test_a_dependency_has_its_declared_bound(package, fresh):
    (bound,) = re.findall(rf'"{package}>=([\d.]+)', DECLARED)
    assert requirement(package) == f"{package}>={bound}"


def test_this_package_has_the_version_in_use():
    assert requirement("hf_cod") == f"hf_cod>={hf_cod.__version__}"
    assert requirement("hf_cod", "recovery", "data") == f"hf_cod[recovery,data]>={hf_cod.__version__}"
    assert requirement("unheard-of") == "unheard-of"


@pytest.mark.parametrize("other", [None, '[project]\nname = "another"\n'])
def test_an_installed_package_reads_its_metadata(other, fresh, tmp_path, monkeypatch):
    """Not the pyproject.toml of another project that happens to be there."""
    if other is not None:
        (tmp_path / "pyproject.toml").write_text(other)
    monkeypatch.setattr(requirements, "SOURCE", tmp_path / "pyproject.toml")
    lines = ["transformers<6,>=9.1", "peft>=8.2; extra == 'recovery'", "rich"]
    monkeypatch.setattr(requirements, "requires", {"hf_cod": lines}.get)
    assert [requirement(name) for name in ("transformers", "peft", "rich")] == [
        "transformers>=9.1",
        "peft>=8.2",
        "rich",
    ]


def test_a_copy_without_metadata_names_no_versions(fresh, tmp_path, monkeypatch):
    def none(name):
        raise requirements.PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "SOURCE", tmp_path / "pyproject.toml")
    monkeypatch.setattr(requirements, "requires", none)
    assert requirement("transformers") == "transformers"
