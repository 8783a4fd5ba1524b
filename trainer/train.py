"""Train a diffusion model: `accelerate launch trainer/train.py --config configs/lsun256.toml`."""

import sys
from pathlib import Path

if not __package__:  # run by path, Python looks in trainer/ first, where a module could shadow a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.errors import exit_clearly
from trainer.launcher.parent import end_with_launcher
from trainer.world import rank

if __name__ == "__main__" and (status := exit_clearly(end_with_launcher)()):  # before torch, which takes seconds
    sys.exit(status)

import argparse
import json
import os

import torch

from trainer.arguments import at_least_one
from trainer.config import Config
from trainer.engine.planning.dry_run import as_text, describe_run
from trainer.engine.planning.estimates import DEVICES, UTILISATION, Hardware
from trainer.engine.planning.find_batch import find_batch, print_trials
from trainer.engine.session import train
from trainer.launcher.settle import load_settled
from trainer.telemetry.profiling import RecordingRequest, StepRange


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="TOML", help="the run's configuration")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="override one field, for example --set train.global_batch=64; may be repeated",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|PATH|URL|none",
        help="auto (default): go on from the run's newest verified checkpoint, or its copy, or start; PATH, "
        "URL: go on from that checkpoint or copy; none: start, and refuse if the run has checkpoints",
    )
    parser.add_argument(
        "--profile",
        metavar="steps=A..B[,ranks=all]",
        help="trace these steps with torch.profiler, of rank 0 or of all, into RUN/profiles",
    )
    parser.add_argument(
        "--memory-snapshot", metavar="steps=A..B[,ranks=all]", help="the same for the history of CUDA's memory"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the configuration, print what it means, and stop")
    parser.add_argument("--world-size", type=at_least_one, metavar="N", help="with --dry-run: processes to plan for")
    parser.add_argument(
        "--find-batch", action="store_true", help="try which train.micro_batch is fastest here, print it, and stop"
    )
    parser.add_argument(
        "--device",
        action="append",
        metavar="NAME",
        help=f"with --dry-run: GPU to estimate the time on, for example h100; may be repeated (default: "
        f"{', '.join(DEVICES)})",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        metavar="U",
        help=f"with --dry-run: share of the GPU's peak to reckon with (default {UTILISATION})",
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON")
    arguments = parser.parse_args()
    if arguments.find_batch and arguments.dry_run:
        parser.error("--find-batch runs the network, --dry-run does not")
    planning = (arguments.world_size, arguments.device, arguments.utilisation)
    if not arguments.dry_run and (arguments.json or any(option is not None for option in planning)):
        parser.error("--json, --world-size, --device and --utilisation go with --dry-run")
    return arguments


def settled_configuration(arguments: argparse.Namespace) -> Config:
    """The configuration, with open fields as the launcher was asked for them; rank 0 prints each decision."""
    config, decisions = load_settled(arguments.config, arguments.set, os.environ, gpus=torch.cuda.is_available())
    if rank() == 0:
        for decision in decisions:
            print(decision, file=sys.stderr, flush=True)
    return config


@exit_clearly
def main() -> int:
    """Parse, wire, run."""
    arguments = parse_arguments()
    config = settled_configuration(arguments)
    trace, memory = (
        StepRange.parse(text) if text is not None else None for text in (arguments.profile, arguments.memory_snapshot)
    )
    if arguments.dry_run:
        hardware = Hardware(
            devices=arguments.device or DEVICES,
            utilisation=arguments.utilisation if arguments.utilisation is not None else UTILISATION,
        )
        plan, fault = describe_run(config, world_size=arguments.world_size, hardware=hardware)
        if rank() == 0:
            print(json.dumps(plan, indent=1) if arguments.json else as_text(plan))
        if fault is not None:
            raise fault
        return 0
    if arguments.find_batch:
        print_trials(find_batch(config))
        return 0
    train(config, resume=arguments.resume, record=RecordingRequest(trace=trace, memory=memory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
