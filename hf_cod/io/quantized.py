"""Models whose weights are already quantized or packed: which commands take them, and what to do for the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hf_cod.io.display import one_line
from hf_cod.models.stored_config import clear_quantized

# quant_method in config.json -> how errors name it.
NAMES = {
    "owl_bnb": "hf-cod quantize",
    "hf_cod_sparse": "hf-cod pack",
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "mxfp4": "MXFP4",
}
# Formats that transformers dequantizes while it loads them on a machine that cannot run them.
_DEQUANTIZED = ("FP8", "MXFP4")


def quantization_of(config: Any) -> str | None:
    """How the weights of a model are stored, by its config or the content of its config.json; None: as plain numbers.

    Args:
        config: the config, or the entries of the file.
    """
    read = config if isinstance(config, Mapping) else vars(config)
    entry = read.get("quantization_config")
    method = entry.get("quant_method") if isinstance(entry, Mapping) else getattr(entry, "quant_method", None)
    if method is None:
        return None
    method = str(getattr(method, "value", method))
    return NAMES.get(method, method)


def check_unquantized(model: Any, source: str, field: str = "model") -> None:
    """Checks that a model, whose weights are to be changed, has plain weights.

    Transformers dequantizes some formats while it loads them, such as FP8 on a machine without GPU; such models pass.

    Args:
        model: the loaded model.
        source: what it was loaded from, for errors.
        field: the name of the model's argument, with which errors begin.

    Raises:
        ValueError: the weights are quantized or packed; says what to do.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{field}: {_expected(quantization_of(model.config), source)}")


def check_unquantized_config(content: Mapping[str, Any], source: str, field: str = "model") -> None:
    """As `check_unquantized`, for a config.json, before the weights are loaded.

    Formats that transformers may dequantize while it loads them pass.

    Raises:
        ValueError: the weights are quantized or packed; says what to do.
    """
    method = quantization_of(content)
    if method not in (None, *_DEQUANTIZED):
        raise ValueError(f"{field}: {_expected(method, source)}")


def _expected(method: str | None, source: str) -> str:
    ours = "import hf_cod; " if method in ("hf-cod quantize", "hf-cod pack") else ""
    return (
        f"expected plain floating-point weights, got weights stored by {method or 'a quantizer'} in {source!r}; use "
        f"the model from before, or a dense copy ({ours}m = AutoModelForCausalLM.from_pretrained({source!r}); "
        "m.dequantize().save_pretrained('dense'), and the tokenizer)"
    )


@contextmanager
def naming_package(config: Any, name: str) -> Iterator[None]:
    """Says of an ImportError while a model is loaded that its quantization requires the package.

    Args:
        config: the model's config.
        name: what is loaded, for errors.

    Raises:
        ImportError: with the format of the weights, and what to do.
    """
    try:
        yield
    except ImportError as error:
        method = quantization_of(config)
        if method is None:
            raise
        raise ImportError(
            f"model: weights stored by {method} in {name!r} require a package that is not installed: {one_line(error)}"
            "; install it, or use the model from before its quantization"
        ) from error


def forget_quantized(model: Any) -> None:
    """Removes all marks of quantization of a model from GGUF: its weights are dequantized, but transformers would
    refuse to save them, and Trainer to train them.
    """
    model.hf_quantizer, model.is_quantized = None, False
    clear_quantized(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
