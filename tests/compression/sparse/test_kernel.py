import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_cod.compression.sparse import kernel
from hf_cod.io import native_kernel
from tests.fresh_processes import run_fresh

# What a machine without a kernel prints, computes and keeps.
WITHOUT = """
import gc
import torch
from hf_cod import SparseLinear
from hf_cod.compression.sparse import kernel, product
linear = torch.nn.Linear(65, 37)
linear.weight.data *= torch.rand(37, 65) > 0.7
packed = SparseLinear.from_linear(linear)
for tokens in (1, 40):
    x = torch.randn(2, tokens, 65).requires_grad_()
    torch.testing.assert_close(packed(x), linear(x))
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand_as(x))
assert kernel.load_kernel() is None
assert len(product._dense_matrices) == 1, "one dense copy, made once"
first = product._dense_matrices[packed.values][1]
packed.values.mul_(2)
torch.testing.assert_close(packed(x) - packed.bias, 2 * (linear(x) - linear.bias))
del packed
gc.collect()
assert not len(product._dense_matrices), "the copy goes with its layer"
"""
WITH = """
import torch
from hf_cod import SparseLinear
linear = torch.nn.Linear(65, 37)
packed = SparseLinear.from_linear(linear)
x = torch.randn(2, 65)
torch.testing.assert_close(packed(x), linear(x), atol=1e-5, rtol=1e-5)
from hf_cod.compression.sparse.kernel import load_kernel
assert load_kernel() is not None
"""


def run(code: str, **changes: str):
    return run_fresh(code, environment={"OMP_NUM_THREADS": "1", **changes})


@pytest.mark.process
@pytest.mark.parametrize("missing", ["compiler", "ninja", "cache"])
def test_without_what_the_build_needs_it_says_so_once_and_computes_densely(missing, tmp_path):
    cache = tmp_path / "cache"
    changes = {"HF_ASSETS_CACHE": str(cache), "CXX": sys.executable}
    if missing == "ninja":
        changes = {"HF_ASSETS_CACHE": str(cache), "PATH": str(tmp_path)}
    elif missing == "cache":
        cache.write_text("a file where the directory should be")
    code = WITHOUT if missing != "ninja" else "import sys\nsys.modules['ninja'] = None\n" + WITHOUT
    done = run(code, **changes)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no kernel for sparse layers") == 1
    assert "apt install g++" in done.stderr and "pip install ninja" in done.stderr and "dense" in done.stderr


# A compiler that answers as the real one does, but hands out what that one has made before.
STAND_IN = """#!/bin/sh
case "$*" in *" -c "* | *-shared*) ;; *) exec c++ "$@" ;; esac
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out="$2" ;;
    -MF) echo "kernel.o:" > "$2" ;;
    -shared) shared=yes ;;
  esac
  shift
done
if [ "$shared" ]; then cp LIBRARY "$out"; else : > "$out"; fi
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in passes for g++")
@pytest.mark.parametrize("compiler", ["stand-in", pytest.param("real", marks=pytest.mark.slow)])
def test_it_is_built_once_and_found_again_without_a_compiler(compiler, tmp_path):
    """What compiles for half a minute the real compiler has made of the same sources, when other tests asked for it."""
    cache, changes = tmp_path / "cache", {}
    if compiler == "stand-in":
        assert kernel.load_kernel() is not None
        made = native_kernel._cached("hf_cod_sparse", kernel._SOURCES)
        (tmp_path / "g++").write_text(STAND_IN.replace("LIBRARY", f"'{made}'"))
        (tmp_path / "g++").chmod(0o755)
        changes = {"CXX": str(tmp_path / "g++")}
    first = run(WITH, HF_ASSETS_CACHE=str(cache), **changes)
    assert first.returncode == 0 and "building the kernel" in first.stderr, first.stderr
    again = run(WITH, HF_ASSETS_CACHE=str(cache), CXX="no-such-compiler", PATH="")
    assert again.returncode == 0 and "kernel" not in again.stderr, again.stderr
    left = [path for path in cache.rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["hf_cod_sparse.so"], "nothing but the library"


@pytest.mark.parametrize("instructions, warnings", [(["portable"], 1), (["avx2", "portable"], 0)])
def test_a_processor_on_which_packing_makes_slower_is_told_so_once(instructions, warnings, monkeypatch, caplog):
    found = SimpleNamespace(instructions=lambda dtype: instructions)
    monkeypatch.setattr(kernel, "load_native", lambda *arguments: found)
    kernel.load_kernel.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "hf_cod"):
            assert kernel.load_kernel() is found and kernel.load_kernel() is found
    finally:
        kernel.load_kernel.cache_clear()
    assert caplog.text.count("neither AVX-512 nor AVX2") == warnings


def test_this_processor_is_asked_for_what_it_has():
    """A machine with AVX2 must not fall to plain C++, which is several times slower than a dense product."""
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("no /proc/cpuinfo")
    flags = Path("/proc/cpuinfo").read_text()
    found = kernel.load_kernel().instructions(torch.float32)
    assert ("avx2" in found) == (" avx2 " in flags) and ("avx512" in found) == (" avx512bw " in flags)
