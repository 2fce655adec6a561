"""One file per command, with its settings and its code. The table of commands is in `cli/main.py`."""
