"""The command line: a table of commands, one pipeline for compressing commands, one file per command."""

from hf_cod.cli.main import main

__all__ = ["main"]
