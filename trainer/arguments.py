"""Command-line arguments shared by several programs."""

import argparse
import math
import re
from pathlib import Path
from typing import NoReturn

from typing_extensions import override

from trainer.drawing.cascade import StageRequest
from trainer.drawing.condition_arguments import add_conditions, conditions
from trainer.drawing.trained import TrainedRequest
from trainer.engine.state.ema import power_name
from trainer.errors import ConfigError, brief
from trainer.sampling.request import DEFAULT_SAMPLER, RequestError, ReverseRequest, SamplingRequest

WEIGHTS_HELP = "ema (default): averaged; model: raw; ema-0.1: the average of train.ema_sigma_rel = 0.1"
_MOST_COUNTED = 10**8  # images; their batches are listed in memory


def at_least_one(text: str, least: int = 1, why: str = "") -> int:
    """An argument type: an integer from 1 to a limit."""
    value = int(text)
    if not least <= value <= _MOST_COUNTED:
        raise argparse.ArgumentTypeError(f"{brief(value)}: should be from {least}{why} to {_MOST_COUNTED:,}")
    return value


def at_least_two(text: str) -> int:
    """An argument type: an integer of at least 2, as a standard error requires."""
    return at_least_one(text, 2, ", for a standard error,")


def weights_name(text: str) -> str:
    """Canonical name of weights: ema, model, or ema-0.1 for the average of train.ema_sigma_rel = 0.1."""
    if text in ("ema", "model"):
        return text
    try:
        sigma_rel = float(text.removeprefix("ema-"))
    except ValueError:
        sigma_rel = math.nan
    if not text.startswith("ema-") or not 0 < sigma_rel < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: should be ema, model, or an average of train.ema_sigma_rel, written ema-0.1"
        )
    return power_name(sigma_rel)


def width(text: str) -> float:
    """An argument type: a valid sigma_rel of a power-function profile."""
    value = float(text)
    if not 0 < value < 0.28:
        raise argparse.ArgumentTypeError(f"{text}: should be above 0 and below 0.28")
    return value


def add_trained(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for a run's weights and timesteps."""
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="default: the newest that verifies")
    parser.add_argument("--weights", type=weights_name, default="ema", metavar="NAME", help=WEIGHTS_HELP)
    parser.add_argument(
        "--respacing",
        default="all",
        metavar="SPEC",
        help="timesteps: all (default), 50 (evenly), 10,15,25 (of each third), ddim50, quadratic50 (may be fewer: "
        "none is visited twice), trailing50",
    )
    parser.add_argument(
        "--variance", choices=["small", "large"], help="of the reverse process, where the run's network gives none"
    )


def trained_request(arguments: argparse.Namespace) -> TrainedRequest:
    """The weights, from the arguments of `add_trained`."""
    return TrainedRequest(run=arguments.run, checkpoint=arguments.checkpoint, weights=arguments.weights)


def reverse_request(arguments: argparse.Namespace) -> ReverseRequest:
    """The reverse process, from the arguments of `add_trained`."""
    return ReverseRequest(respacing=arguments.respacing, variance=arguments.variance)


def sampler_option(text: str) -> tuple[str, float]:
    """An argument type: NAME=VALUE, the value a number."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: should be NAME=VALUE with a number, for example eta=0.5"
        ) from error


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the sampler, classes and guidance."""
    add_conditions(parser)
    parser.add_argument(
        "--sampler",
        metavar="NAME",
        default=DEFAULT_SAMPLER,
        help="ddpm (default): ancestral sampling, algorithm 2; ddim: see --eta; ddpm-sigma-hat: DDIM's name for "
        "ancestral sampling with the large variance; dpm-solver++: second order, needs diffusers",
    )
    parser.add_argument(
        "--option",
        type=sampler_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the sampler: a number for one of its keyword arguments; may be repeated",
    )
    parser.add_argument(
        "--eta", type=float, help="as --option eta=: with ddim 0 (default) draws no noise, 1 is ancestral"
    )


def sampling_request(arguments: argparse.Namespace, *, count: int) -> SamplingRequest:
    """The request from the arguments of `add_trained` and `add_sampler`, --seed and --batch.

    Raises ConfigError where they do not go together.
    """
    given = dict(arguments.option)
    if arguments.eta is not None and "eta" in given:
        raise ConfigError(f"--eta {arguments.eta:g}: is --option eta={given['eta']:g} too; give one of them")
    try:
        return SamplingRequest(
            sampler=arguments.sampler,
            options=given if arguments.eta is None else {**given, "eta": arguments.eta},
            respacing=arguments.respacing,
            variance=arguments.variance,
            conditions=conditions(arguments),
            count=count,
            seed=arguments.seed,
            batch=arguments.batch,
        )
    except RequestError as error:
        is_option = error.field in given
        told = f"--option {error.field}={error.value:g}" if is_option else f"--{error.field} {error.value}"
        raise ConfigError(f"{told}: {error.reason}") from error


def add_cascade(parser: argparse.ArgumentParser) -> None:
    """Add the argument for upsamplers, which may be repeated."""
    parser.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="RUN",
        help="enlarge the samples by the network of this run, which upsamples; repeat it to enlarge again. Options "
        "of its own follow a colon, by the names that they have here: --then runs/up:sampler=ddim,respacing=25",
    )


class _StageParser(argparse.ArgumentParser):
    """Parses the options of a stage of a cascade: those of --run, by the same names."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        add_trained(self)
        add_sampler(self)

    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def stage_requests(arguments: argparse.Namespace, base: SamplingRequest) -> list[StageRequest]:
    """The upsamplers, from the argument of `add_cascade`; base: what they enlarge.

    Raises ConfigError where their options cannot be.
    """
    requests = []
    for text in arguments.then:
        run, *options = re.split(r":(?=[\w-]+=)", text, maxsplit=1)
        # A value may have commas: respacing=10,15,25.
        given = [f"--{option}" for part in options for option in re.split(r",(?=[\w-]+=)", part)]
        try:
            stage = _StageParser().parse_args(
                [*given, f"--run={run}"], argparse.Namespace(seed=base.seed, batch=base.batch)
            )
            if stage.classes is not None:
                raise ConfigError(f"--classes {stage.classes}: goes with --run, whose classes its samples keep")
            requests.append(
                StageRequest(trained=trained_request(stage), sampling=sampling_request(stage, count=base.count))
            )
        except ConfigError as error:
            raise ConfigError(f"--then {text}: {error}", agreed=error.agreed) from error
    return requests
