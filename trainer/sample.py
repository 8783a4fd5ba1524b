"""Draw images from a trained run: `python trainer/sample.py --run runs/demo --n 64`."""

import sys
from pathlib import Path

if not __package__:  # run by path, Python looks in trainer/ first, where a module could shadow a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.errors import exit_clearly
from trainer.launcher.parent import end_with_launcher

if __name__ == "__main__" and (status := exit_clearly(end_with_launcher)()):  # before torch, which takes seconds
    sys.exit(status)

import argparse
from typing import get_args

from trainer.arguments import (
    add_cascade,
    add_sampler,
    add_trained,
    at_least_one,
    sampling_request,
    stage_requests,
    trained_request,
)
from trainer.drawing.draw import draw
from trainer.drawing.outputs import OutputFormat


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_trained(parser)
    parser.add_argument("--n", type=at_least_one, default=64, help="number of images (default 64)")
    add_sampler(parser)
    add_cascade(parser)
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images, on any number of processes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: a folder in RUN/samples named by the above")
    parser.add_argument(
        "--format",
        choices=get_args(OutputFormat),
        default="folder",
        help="folder (default): PNG files; npz: one array as ADM's evaluation reads it; tar: WebDataset shards",
    )
    parser.add_argument("--batch", type=at_least_one, default=16, help="images drawn at a time (default 16)")
    return parser.parse_args()


@exit_clearly
def main() -> int:
    """Parse, wire, run."""
    arguments = parse_arguments()
    sampling = sampling_request(arguments, count=arguments.n)
    then = stage_requests(arguments, sampling)
    draw(trained_request(arguments), sampling, then=then, out=arguments.out, output=arguments.format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
