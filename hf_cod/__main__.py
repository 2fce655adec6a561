"""python -m hf_cod: the command line, where hf-cod is not on the path."""

import sys

from hf_cod.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
