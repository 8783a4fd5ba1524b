"""Command-line arguments for classes and guidance."""

import argparse
from pathlib import Path

from trainer.drawing.trained import as_config_error
from trainer.sampling.conditions import Conditions
from trainer.sampling.guidance import Interval
from trainer.sampling.request import RequestError


def interval(text: str) -> Interval:
    """An argument type: two numbers, "0.28,2.9"."""
    low, high = (float(part) for part in text.split(","))
    return low, high


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for classes and guidance."""
    group = parser.add_argument_group("classes and guidance")
    group.add_argument(
        "--classes",
        metavar="WHICH",
        help="of a network that takes labels: uniform (default: drawn for each sample by the seed), balanced (number "
        "modulo classes), or classes that the samples take in turn, 3,5,7",
    )
    group.add_argument(
        "--guidance", type=float, default=1.0, metavar="SCALE", help="s of null + s (class - null); 1 (default): none"
    )
    group.add_argument(
        "--guidance-interval",
        type=interval,
        metavar="LO,HI",
        help="guide only where the noise level sigma = sqrt(1 / abar - 1) is above LO and at most HI",
    )
    group.add_argument(
        "--dynamic-threshold",
        type=float,
        metavar="Q",
        help="scale each x_0 to its quantile Q of absolute values, 0.995, instead of clamping it",
    )
    group.add_argument(
        "--guide",
        type=Path,
        metavar="RUN",
        help="run, or checkpoint in one, whose network guides instead of the null class",
    )
    group.add_argument(
        "--classifier",
        type=Path,
        metavar="RUN",
        help="run, or checkpoint in one, of a classifier of noisy images, whose gradient guides",
    )
    group.add_argument(
        "--classifier-scale", type=float, default=1.0, metavar="S", help="scale of its gradient (default 1)"
    )
    group.add_argument(
        "--low-res-noise",
        type=float,
        default=0.0,
        metavar="LEVEL",
        help="of a network that upsamples, trained with model.low_res_noise: noise what it is given to this level, at "
        "most that of the training (default 0)",
    )


def conditions(arguments: argparse.Namespace) -> Conditions:
    """Classes and guidance, from the arguments of `add_conditions`. Raises ConfigError where they cannot be."""
    try:
        return Conditions(
            classes=arguments.classes,
            guidance=arguments.guidance,
            guidance_interval=arguments.guidance_interval,
            dynamic_threshold=arguments.dynamic_threshold,
            guide=arguments.guide,
            classifier=arguments.classifier,
            classifier_scale=arguments.classifier_scale,
            low_res_noise=arguments.low_res_noise,
        )
    except RequestError as error:
        raise as_config_error(error) from error
