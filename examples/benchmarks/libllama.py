"""The real llama.cpp, from the npm package of node-llama-cpp, by ctypes: it quantizes a GGUF and computes logits.

The package has libllama and libggml built for x86-64 on Linux, one libggml for each kind of processor, so that no
compiler is required.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from filelock import FileLock
from huggingface_hub import cached_assets_path

PACKAGE, VERSION = "@node-llama-cpp/linux-x64", "3.22.1"
FOLDER = "package/bins/linux-x64"
# ggml.h and llama.h: types of tensors, and of whole files (llama.cpp's own mixtures).
TYPES = {"f16": 1, "q5_0": 6, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14, "iq4_nl": 20}
FILES = {"F16": 1, "Q8_0": 7, "Q5_0": 8, "Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "IQ4_NL": 25}
# Places in llama_context_params: flash_attn_type (0: off), type_k and type_v (0: float32).
EXACT = (52, 104, 108)
QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


class Opaque(ctypes.Structure):
    """A struct that is only passed on, with room for every version; its first fields are known."""

    _fields_ = (("first", ctypes.c_int32 * 9), ("rest", ctypes.c_char * 1000))


class Weights(ctypes.Structure):
    """llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class Override(ctypes.Structure):
    """llama_model_tensor_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class Quantization(ctypes.Structure):
    """llama_model_quantize_params."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int),
        ("output_type", ctypes.c_int),
        ("embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(Weights)),
        ("kv_overrides", ctypes.c_void_p),
        ("types", ctypes.POINTER(Override)),
        ("prune_layers", ctypes.POINTER(ctypes.c_int32)),
    )


class Tokens(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embedding", ctypes.c_void_p),
        ("position", ctypes.POINTER(ctypes.c_int32)),
        ("n_sequences", ctypes.POINTER(ctypes.c_int32)),
        ("sequence", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def _fetched() -> Path:
    """Folder with the package's contents; unpacked aside and renamed, since several processes may fetch it at once."""
    home = Path(cached_assets_path(library_name="hf_cod", namespace="packages", subfolder=f"node-llama-cpp-{VERSION}"))
    with FileLock(home / "lock"):
        if not (home / FOLDER).is_dir():
            npm = shutil.which("npm")
            if npm is None:
                raise RuntimeError(f"expected npm, to fetch {PACKAGE}, got none")
            with tempfile.TemporaryDirectory(dir=home) as scratch:
                command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent"]
                done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"expected the npm package {PACKAGE}, got: {done.stderr.strip()}")
                with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                    archive.extractall(scratch, filter="data")
                (Path(scratch) / "package").rename(home / "package")
    return home


@cache
def library() -> ctypes.CDLL:
    """Fetches the package once, and loads the library, which logs nothing then.

    Raises:
        RuntimeError: npm or the package is not there.
    """
    folder = _fetched() / FOLDER
    (file,) = folder.glob("libllama.v*.so")
    llama = ctypes.CDLL(str(file))
    (ggml,) = folder.glob("libggml.v*.so")
    ctypes.CDLL(str(ggml)).ggml_backend_load_all_from_path(str(folder).encode())
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(llama, name).restype = Opaque
    llama.llama_model_quantize_default_params.restype = Quantization
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_logits", "llama_get_memory"):
        getattr(llama, name).restype = ctypes.c_void_p
    llama.llama_model_get_vocab.restype = ctypes.c_void_p
    llama.llama_log_set(QUIET, None)
    llama.llama_backend_init()
    return llama


def quantize(
    source: Path,
    target: Path,
    file_type: str,
    *,
    types: Mapping[str, str] | None = None,
    others: str | None = None,
    imatrix: Mapping[str, np.ndarray] | None = None,
    requantize: bool = False,
    pure: bool = False,
) -> Path:
    """As llama-quantize.

    Args:
        source: a GGUF.
        target: the new file.
        file_type: a name of `FILES`.
        types: regular expression for names of tensors -> type, the first match wins.
        others: type of the embedding and the head.
        imatrix: name of a tensor -> mean of the squares of its inputs, (in,).
        requantize: whether tensors of the source may be quantized.
        pure: whether all matrices get the type of the file, without llama.cpp's mixture.

    Raises:
        RuntimeError: llama.cpp failed.
    """
    llama = library()
    params = llama.llama_model_quantize_default_params()
    params.threads, params.file_type, params.allow_requantize, params.pure = 1, FILES[file_type], requantize, pure
    if others is not None:
        params.output_type = params.embedding_type = TYPES[others]
    if types:
        params.types = (Override * (len(types) + 1))(*((p.encode(), TYPES[kind]) for p, kind in types.items()))
    if imatrix:
        kept = {name: np.ascontiguousarray(values, np.float32) for name, values in imatrix.items()}
        pointer = ctypes.POINTER(ctypes.c_float)
        rows = ((name.encode(), values.ctypes.data_as(pointer), values.size) for name, values in kept.items())
        params.imatrix = (Weights * (len(kept) + 1))(*rows)
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"{source}: expected llama.cpp to write {file_type}, got an error")
    return target


def types_of(file: Path) -> dict[str, str]:
    """The lines of tensor-types.txt."""
    return dict(line.rsplit("=", 1) for line in file.read_text(encoding="utf-8").splitlines())


class Llama:
    """A GGUF in llama.cpp."""

    def __init__(self, file: Path, length: int, exact: bool = False) -> None:
        """Loads a file for sequences of up to this number of tokens; `exact`: keys and values are not rounded."""
        self.library = llama = library()
        self.model = ctypes.c_void_p(
            llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        )
        if not self.model:
            raise RuntimeError(f"{file}: expected a GGUF that llama.cpp loads, got an error")
        params = llama.llama_context_default_params()
        # Context, batch, physical batch, sequences, snapshots, outputs, outputs of a sequence, and threads twice.
        params.first[:] = [length, length, length, 1, 0, length, length, 1, 1]
        if exact:
            for place in EXACT:
                ctypes.c_int32.from_address(ctypes.addressof(params) + place).value = 0
        self.context = ctypes.c_void_p(llama.llama_init_from_model(self.model, params))
        vocabulary = ctypes.c_void_p(llama.llama_model_get_vocab(self.model))
        self.tokens = int(llama.llama_vocab_n_tokens(vocabulary))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of each position of one sequence, (T, vocabulary)."""
        llama, count = self.library, len(ids)
        llama.llama_memory_clear(ctypes.c_void_p(llama.llama_get_memory(self.context)), True)
        integers, zero = ctypes.c_int32 * count, (ctypes.c_int32 * 1)(0)
        one = ctypes.cast(zero, ctypes.POINTER(ctypes.c_int32))
        sequences = (ctypes.POINTER(ctypes.c_int32) * count)(*[one] * count)
        wanted = (ctypes.c_int8 * count)(*[1] * count)
        positions = integers(*range(count))
        batch = Tokens(count, integers(*ids), None, positions, integers(*[1] * count), sequences, wanted)
        if llama.llama_decode(self.context, batch):
            raise RuntimeError(f"expected logits of {count} tokens, got an error of llama.cpp")
        found = ctypes.cast(llama.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(found, (count, self.tokens)).copy()

    def close(self) -> None:
        """Frees the memory."""
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)
