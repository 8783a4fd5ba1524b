"""Look at checkpoints: `python -m trainer.checkpoint list runs/lsun256`.

list      what there is: when it was saved, by what, whether it is whole, why it is kept, what was set aside
verify    read every byte; exit code 1 where any is damaged or its weights are not finite
inspect   one checkpoint: counters, identity, tensors
diff      what two checkpoints do not have in common; exit code 1 where they are not equal

RUN is a run's folder; A, B and CHECKPOINT are a run's folder (its newest checkpoint) or a checkpoint's (step-...).
"""

import sys
from pathlib import Path

if not __package__:  # run by path, Python looks in trainer/ first, where a module could shadow a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
from dataclasses import asdict
from typing import Any

from trainer.errors import CheckpointError, exit_clearly, printable
from trainer.inspection import compare, describe, folders, listing


def parse_arguments() -> argparse.Namespace:
    """The command line; `command` is the function to call."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("list", help="what there is, and whether it is whole")
    one.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    one.add_argument("--quick", action="store_true", help="look at names and sizes only; flipped bits are not found")
    one.set_defaults(command=list_runs)

    one = commands.add_parser("verify", help="read every byte of checkpoints and snapshots of averages")
    one.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="or a checkpoint")
    one.add_argument("--step", type=step_or_all, metavar="N|all", help="only that checkpoint (default: all there is)")
    one.set_defaults(command=verify)

    one = commands.add_parser("inspect", help="counters, identity, tensors")
    one.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    one.add_argument("--step", type=int, metavar="N", help="of a run (default: the newest)")
    one.add_argument("--tensors", action="store_true", help="norm, min, max and NaN count of each tensor")
    one.set_defaults(command=inspect)

    one = commands.add_parser("diff", help="what two checkpoints do not have in common")
    one.add_argument("first", type=Path, metavar="A")
    one.add_argument("second", type=Path, metavar="B")
    one.set_defaults(command=diff)

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="for programs")
    return parser.parse_args()


def step_or_all(text: str) -> int | None:
    """A step, or None for all."""
    return None if text == "all" else int(text)


def list_runs(arguments: argparse.Namespace) -> int:
    """Print a table for each run."""
    listed = [listing.list_run(run, quick=arguments.quick) for run in arguments.runs]
    _show(arguments, [asdict(one) for one in listed], "\n".join(map(listing.as_text, listed)))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Print a line for each folder; 1 where one is damaged, or holds weights that nothing can be drawn from."""
    paths: list[Path] = []
    for run in arguments.runs:
        single = arguments.step is not None or not (run / "checkpoints").is_dir()
        paths += [folders.find(run, arguments.step)] if single else folders.of_run(run)
    if not paths:
        raise CheckpointError(f"{', '.join(map(str, arguments.runs))}: holds no checkpoint")
    found = {}
    for path in paths:
        damages = folders.damages(path)
        useless = [] if damages else describe.unusable_weights(path)
        found[str(path)] = damages or useless
        if not arguments.json:
            state = f"damaged: {'; '.join(damages)}" if damages else "; ".join(["whole", *useless])
            print(printable(f"{path}: {state}"), flush=True)
    if arguments.json:
        print(json.dumps(found, indent=1))
    return 1 if any(found.values()) else 0


def inspect(arguments: argparse.Namespace) -> int:
    """Print what one checkpoint holds."""
    about = describe.describe(folders.find(arguments.checkpoint, arguments.step), tensors=arguments.tensors)
    _show(arguments, about, describe.as_text(about))
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Print the differences of two checkpoints; 1 where there are any."""
    found = compare.compare(folders.find(arguments.first), folders.find(arguments.second))
    _show(arguments, found, compare.as_text(found))
    return 0 if found["equal"] else 1


def _show(arguments: argparse.Namespace, content: Any, text: str) -> None:
    print(json.dumps(content, indent=1) if arguments.json else printable(text))  # names may be others'


@exit_clearly
def main() -> int:
    """Parse, run."""
    arguments = parse_arguments()
    result: int = arguments.command(arguments)
    return result


if __name__ == "__main__":
    sys.exit(main())
