"""See, cure and use the Curse of Depth: every layer of a deep language model earns its place."""

from hf_cod.models import register as _register

__version__ = "0.1.0"

_register()
