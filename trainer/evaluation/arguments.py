"""Command-line arguments that several programs share."""

import argparse
from pathlib import Path

from trainer.evaluation.trained import TrainedRequest


def at_least_one(text: str) -> int:
    """An argument that counts."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: should be at least 1")
    return value


def at_least_two(text: str) -> int:
    """As many as a standard error needs."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value}: should be at least 2, for a standard error")
    return value


def add_trained(parser: argparse.ArgumentParser) -> None:
    """Which weights of which run."""
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="default: the newest that verifies")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged or raw (default ema)")
    parser.add_argument(
        "--respacing",
        default="all",
        metavar="SPEC",
        help="timesteps: all (default), 50 (evenly), 10,15,25 (of each third), ddim50, quadratic50, trailing50",
    )
    parser.add_argument(
        "--variance", choices=["small", "large"], help="of the reverse process, where the run's network gives none"
    )


def trained_request(arguments: argparse.Namespace) -> TrainedRequest:
    """What `add_trained` read."""
    return TrainedRequest(
        run=arguments.run,
        checkpoint=arguments.checkpoint,
        weights=arguments.weights,
        respacing=arguments.respacing,
        variance=arguments.variance,
    )
