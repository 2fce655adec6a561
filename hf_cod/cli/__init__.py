"""The command line: a table of commands, one pipeline for those that compress, one file a command."""

from hf_cod.cli.main import main

__all__ = ["main"]
