"""Draw images from a trained run: `python trainer/sample.py --run runs/demo --n 64`."""

import sys
from pathlib import Path

if not __package__:  # run by path, Python looks in trainer/ first, where a module could shadow a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from trainer.engine.draw import DrawRequest, draw
from trainer.errors import exit_clearly
from trainer.train import at_least_one


def parse_arguments() -> DrawRequest:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--n", type=at_least_one, default=64, help="number of images (default 64)")
    parser.add_argument("--sampler", choices=["ddpm"], default="ddpm", help="ddpm: ancestral sampling, algorithm 2")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images, on any number of processes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/samples/step-STEP-WEIGHTS-seed-SEED")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="default: the newest that verifies")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged or raw (default ema)")
    parser.add_argument("--batch", type=at_least_one, default=16, help="images drawn at a time (default 16)")
    arguments = parser.parse_args()
    return DrawRequest(
        run=arguments.run,
        count=arguments.n,
        seed=arguments.seed,
        out=arguments.out,
        checkpoint=arguments.checkpoint,
        weights=arguments.weights,
        batch=arguments.batch,
    )


@exit_clearly
def main() -> int:
    """Parse, wire, run."""
    draw(parse_arguments())
    return 0


if __name__ == "__main__":
    sys.exit(main())
