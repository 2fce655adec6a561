"""One file a command: its settings, and what it does with them. The table of commands is in `cli/main.py`."""
