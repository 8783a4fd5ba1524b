"""Entry point of `python -m data_prep`."""

import sys

from data_prep.cli import main
from trainer.errors import exit_clearly

if __name__ == "__main__":  # worker processes import this module too
    sys.exit(exit_clearly(main)())
