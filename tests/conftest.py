"""Shared fixtures, and what is marked by what it uses: other families, real models, fresh processes."""

from __future__ import annotations

import gc
import os
import signal

# Before torch: spinning threads make tiny forward passes many times slower on a loaded machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what the tests need from outside comes from packages
os.environ.setdefault("MPLBACKEND", "agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has its own core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import real_models
from tests.tiny_models import DEFAULT_FAMILIES, FAMILIES, MIXTURES

REAL = {"smollm2", "mpnet", "dinov2", "photograph", "brown_text"}  # the fixtures that are downloaded


def pytest_collection_modifyitems(items):
    """Marks each test that uses a real model or text, and of each test over families the cases beside the default."""
    by_test: dict[str, list[str]] = {}
    for item in items:
        if REAL.intersection(item.fixturenames):
            item.add_marker(pytest.mark.real)
        if family := family_of(item):
            by_test.setdefault(item.nodeid.partition("[")[0], []).append(family)
    for item in items:
        if (family := family_of(item)) and family not in default_of(by_test[item.nodeid.partition("[")[0]]):
            item.add_marker(pytest.mark.families)


def pytest_collection_finish():
    """What was imported stays; otherwise each full collection of garbage would walk through it."""
    gc.collect()
    gc.freeze()


def family_of(item) -> str | None:
    """The family of a test's case, if it has one by that name."""
    family = item.callspec.params.get("family") if hasattr(item, "callspec") else None
    return family if isinstance(family, str) and family in FAMILIES else None


def default_of(families: list[str]) -> set[str]:
    """Those of the default families, and in the place of a mixture that is not among them another one."""
    default = {family for family in families if family in DEFAULT_FAMILIES}
    mixtures = [family for family in families if family in MIXTURES]
    if mixtures and not default.intersection(MIXTURES):
        default.add(mixtures[0])
    return default or {families[0]}


# A busy machine says nothing of what is tested: neither how long an example took nor how long it took to draw one.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _coarse_pictures():
    """Pictures of few pixels, which are drawn in a third of the time."""
    from hf_cod.reporting.plots import figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 30)
        yield


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    """A mode that goes on watching each operation would slow all that follows, and keep it from being compiled."""
    yield
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.fixture
def ctrl_c():
    """Ctrl-C does what it does in a terminal; a run of the tests in the background begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def smollm2() -> str:
    return real_models.smollm2()


@pytest.fixture(scope="session")
def mixture() -> str:
    return real_models.mixture()


@pytest.fixture(scope="session")
def mpnet() -> str:
    return real_models.mpnet()


@pytest.fixture(scope="session")
def dinov2():
    return real_models.dinov2()


@pytest.fixture(scope="session")
def photograph():
    return real_models.photograph()


@pytest.fixture(scope="session")
def brown_text() -> str:
    return real_models.brown_text()
