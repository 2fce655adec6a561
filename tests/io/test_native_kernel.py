"""A compiled kernel is loaded from where nobody else can put one."""

import functools
import os

import pytest
from huggingface_hub import cached_assets_path

from hf_cod.compression.sparse import kernel
from hf_cod.io import native_kernel
from hf_cod.io.native_kernel import others_can_change

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes of POSIX")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The directory of a kernel, in a cache of its own, as the package makes it under an open umask."""
    own = functools.partial(cached_assets_path, assets_dir=tmp_path / "cache")
    monkeypatch.setattr(native_kernel, "cached_assets_path", own)
    before = os.umask(0o022)
    try:
        library = native_kernel._cached("hf_cod_sparse", kernel._SOURCES)
    finally:
        os.umask(before)
    assert tmp_path in library.parents
    library.write_bytes(b"code")
    library.chmod(0o644)
    return library


def test_the_cache_is_ours_alone(cache):
    assert cache.parent.stat().st_mode & 0o777 == 0o700 and others_can_change(cache) is None


@pytest.mark.parametrize("open_to", [0o002, 0o020], ids=["others", "group"])
@pytest.mark.parametrize("which", ["library", "directory", "above"])
def test_whatever_others_can_write_to_is_told(which, open_to, cache, monkeypatch):
    monkeypatch.setattr(native_kernel, "_own_group", lambda group: False)
    path = {"library": cache, "directory": cache.parent, "above": cache.parent.parent}[which]
    path.chmod(path.stat().st_mode | open_to)
    assert others_can_change(cache) == path
    monkeypatch.setattr(native_kernel, "_own_group", lambda group: True)
    assert (others_can_change(cache) is None) == (open_to == 0o020), "a group of one is nobody else"


def test_a_sticky_directory_above_does_no_harm(cache):
    cache.parent.parent.chmod(0o1777)
    assert others_can_change(cache) is None
    cache.parent.chmod(0o1777)
    assert others_can_change(cache) == cache.parent, "in it others could put a library where there is none"


def test_links_and_other_owners_are_told(cache, tmp_path, monkeypatch):
    cache.rename(tmp_path / "elsewhere.so")
    cache.symlink_to(tmp_path / "elsewhere.so")
    assert others_can_change(cache) == cache
    cache.unlink()
    assert others_can_change(cache) is None, "it is not built yet"
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    assert others_can_change(cache) is not None


def test_a_library_that_others_could_have_put_there_is_not_loaded(cache, monkeypatch, caplog):
    built = []
    monkeypatch.setattr(native_kernel, "_build", lambda name, sources, library: built.append(library))
    monkeypatch.setattr(native_kernel, "_loaded", lambda library: pytest.fail(f"loaded {library}"))
    cache.parent.chmod(0o777)
    monkeypatch.setattr(native_kernel, "_cached", lambda name, sources: cache)
    native_kernel.load_native.__wrapped__("hf_cod_test", kernel._SOURCES, "test layers", "dense")
    (library,) = built
    assert library != cache and library.name == cache.name and not library.parent.exists(), "kept nowhere"
    assert "other users can change it" in caplog.text and "HF_ASSETS_CACHE" in caplog.text
