"""The command line: parses arguments, runs a command, and reports errors in one line."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from data_prep.cores import available_cores
from data_prep.errors import DataPrepError, InputError
from data_prep.inspection.dataset import Dataset
from data_prep.inspection.overview import left_out_line, print_contents, print_outcome
from data_prep.inspection.stats import write_stats
from data_prep.inspection.verify import DECODE, verify
from data_prep.recipe import ENCODINGS, MODES, TRANSFORMS, Recipe
from data_prep.sources import LABELS, SPLITS, Split, Wanted, open_source, split_called
from data_prep.write.build import build

INTERRUPTED = 130  # exit code of a shell for Ctrl-C

DESCRIPTION = """\
Images as they lie on disk -> tar shards for the trainer. Run again after any interruption.

For a finished folder: python -m data_prep verify|inspect|stats DIR"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors, without the usage."""

    def error(self, message: str) -> NoReturn:  # noqa: D102 - see argparse
        raise InputError(f"{message}; see {self.prog} --help")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the description's line breaks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m data_prep`; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = COMMANDS.get(arguments[0]) if arguments else None
        return run_build(arguments) if command is None else command(arguments[1:])
    except DataPrepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; run again to go on from here", file=sys.stderr)
        return INTERRUPTED


def run_build(argv: Sequence[str]) -> int:
    """`SRC OUT`: build a dataset, and print the summary."""
    options = _parsed_with_workers(_build_parser(), argv, "processes; the bytes do not depend on it")
    start = time.monotonic()
    if not 0 <= options.max_reject_fraction <= 1:
        raise InputError(f"--max-reject-fraction {options.max_reject_fraction:g}: must lie in [0, 1]")
    if options.out.resolve().is_relative_to(Path(options.src).resolve()):
        raise InputError(f"{options.out}: lies in the source folder; give a folder outside it")
    wanted = Wanted(**{field.name: getattr(options, field.name) for field in fields(Wanted)})
    source = open_source(options.src, wanted)
    for line in [*(source.notice or "").splitlines(), *left_out_line(source.left_out)]:
        print(f"note: {line}", file=sys.stderr)
    recipe = Recipe(
        image_size=options.size,
        transform=options.transform,
        encoding=options.format,
        mode=options.mode or source.natural_mode,
        shard_samples=options.shard_samples,
        upscale=options.upscale,
    )
    outcome = build(
        source, recipe, options.out, workers=options.workers, max_reject_fraction=options.max_reject_fraction
    )
    print_outcome(
        outcome.manifest,
        options.out,
        reasons=outcome.reasons,
        already_finished=outcome.already_finished,
        seconds=time.monotonic() - start,
    )
    return 0


def run_verify(argv: Sequence[str]) -> int:
    """`verify DIR`: print each fault as a line; returns 0 if there is none, otherwise 2."""
    parser = _dataset_parser("verify", "Check every byte of a finished dataset against its manifest and index.")
    parser.add_argument("--decode", choices=DECODE, default="sample", help="which images to decode as well")
    options = _parsed_with_workers(parser, argv)
    faults = verify(options.dir, decode=options.decode, workers=options.workers)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        return InputError.exit_code
    print(f"{options.dir}: no fault found")
    return 0


def run_inspect(argv: Sequence[str]) -> int:
    """`inspect DIR`: print the content of a dataset."""
    options = _dataset_parser("inspect", "Tell what is in a finished dataset.").parse_args(argv)
    print_contents(Dataset.open(options.dir))
    return 0


def run_stats(argv: Sequence[str]) -> int:
    """`stats DIR`: write stats.npz, and print its scalar values."""
    parser = _dataset_parser("stats", "Write the pixel statistics of a finished dataset to DIR/stats.npz.")
    options = _parsed_with_workers(parser, argv)
    stats = write_stats(Dataset.open(options.dir), workers=options.workers)
    print(f"images  {stats.count}")
    print(f"mean    {', '.join(f'{value:.4f}' for value in stats.channel_mean)}   of each channel, pixels in [-1, 1]")
    print(f"std     {', '.join(f'{value:.4f}' for value in stats.channel_std)}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "verify": run_verify,
    "inspect": run_inspect,
    "stats": run_stats,
}


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m data_prep", description=DESCRIPTION, formatter_class=Formatter)
    add = parser.add_argument
    add(
        "src",
        metavar="SRC",
        help="LSUN's LMDB, a folder, .zip, .tar, .tfrecords, .parquet, CIFAR-10 (see docs/data.md)",
    )
    add("out", metavar="OUT", type=Path, help="a new or empty folder, or one to resume")
    add("--size", type=_side, default=Recipe.image_size, help="side of the square images in pixels")
    add("--transform", choices=TRANSFORMS, default=Recipe.transform, help="whose way to that size (see docs/data.md)")
    add("--format", choices=ENCODINGS, default=Recipe.encoding, help="webp and png are lossless, jpeg is q95 4:4:4")
    add("--mode", choices=MODES, help="colour or grey (default: RGB, but L for embedded:mnist5k)")
    add("--split", type=_split, default="train", help=f"which part, of a source that has parts: {', '.join(SPLITS)}")
    add("--labels", choices=LABELS, default="auto", help="none: images alone, without labels, captions, ...")
    add("--image-column", metavar="NAME", help="of a parquet file with several (default: the one called image)")
    add(
        "--caption-column",
        metavar="NAME",
        help="of metadata.csv, .jsonl or parquet (default: text or caption, or .txt)",
    )
    add("--pair", metavar="NAME", help="a second image to each: a folder, an ending of names or a parquet column")
    add("--shard-samples", type=int, default=Recipe.shard_samples, help="sources to a shard")
    add("--max-reject-fraction", type=float, default=0.01, help="fail where more of the sources are unusable")
    add("--upscale", action="store_true", help="enlarge images smaller than --size instead of rejecting them")
    return parser


def _dataset_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m data_prep {command}", description=description, formatter_class=Formatter)
    parser.add_argument("dir", metavar="DIR", type=Path, help="a folder that data_prep has finished")
    return parser


def _side(text: str) -> int:
    """The side of a square, as `24` or `24x24`."""
    width, _, height = text.lower().partition("x")
    if height and width.isdecimal() and height.isdecimal() and int(width) != int(height):
        raise argparse.ArgumentTypeError(
            f"{text} is not supported, as images are square; give one side, such as {width}"
        )
    try:
        return int(width if width == height else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no side in pixels; give a number such as 256") from error


def _split(text: str) -> Split:
    split = split_called(text)
    if split is None:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SPLITS)}")
    return split


def _parsed_with_workers(
    parser: argparse.ArgumentParser, argv: Sequence[str], what: str = "threads"
) -> argparse.Namespace:
    """The options, with --workers. Raises InputError for fewer than one."""
    parser.add_argument("--workers", type=int, default=available_cores(), help=what)
    options = parser.parse_args(argv)
    if options.workers < 1:
        raise InputError(f"--workers {options.workers}: must be at least 1")
    return options
