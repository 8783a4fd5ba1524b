"""A run as one HTML page that needs nothing else: `python trainer/report.py runs/lsun256`."""

import sys
from pathlib import Path

if not __package__:  # run by path, Python looks in trainer/ first, where a module could shadow a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from trainer.errors import TrainerError, exit_clearly
from trainer.reporting.page import render
from trainer.reporting.run_files import read_run


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder; it may be training, or never have")
    parser.add_argument("--out", type=Path, metavar="HTML", help="default: RUN/report.html")
    return parser.parse_args()


@exit_clearly
def main() -> int:
    """Read, draw, write."""
    arguments = parse_arguments()
    out = arguments.out or arguments.run / "report.html"
    page = render(read_run(arguments.run))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as fault:
        raise TrainerError(f"{out}: cannot be written ({fault.strerror})") from fault
    print(f"{out}: {len(page) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
