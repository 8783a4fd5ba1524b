"""Compute a step again that was not finite: `python trainer/replay.py RUN/nonfinite/step-00000123.json`.

Prints the loss of each sample, those that are not finite, the first module whose output or gradient is not, and the
gradient's norm by module. Exit code 0: not finite again; 1: finite this time; 2: it could not be computed.
"""

import sys
from pathlib import Path

if not __package__:  # run by path, Python looks in trainer/ first, where a module could shadow a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

import torch

from trainer.errors import exit_clearly
from trainer.inspection.replaying import as_text, replay


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, metavar="DUMP", help="RUN/nonfinite/step-....json")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="whose weights (default: the run's newest before the step)"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: a GPU if there is one; give the one the step ran on"
    )
    return parser.parse_args()


@exit_clearly
def main() -> int:
    """Parse, run, print."""
    arguments = parse_arguments()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    result = replay(arguments.dump, checkpoint=arguments.checkpoint, device=device)
    print(as_text(result))
    return 1 if result.outcome.finite else 0


if __name__ == "__main__":
    sys.exit(main())
