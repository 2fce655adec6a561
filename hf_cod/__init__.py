"""See, cure and use the Curse of Depth: every layer of a deep language model earns its place."""

__version__ = "0.1.0"
