"""The command line: parse, wire, run, and say in one line what went wrong."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from data_prep.build import Outcome, build
from data_prep.errors import DataPrepError, InputError
from data_prep.recipe import ENCODINGS, MODES, RESAMPLES, Recipe
from data_prep.sources import open_source

INTERRUPTED = 130  # what a shell reports for Ctrl-C


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours: one line, without the usage."""

    def error(self, message: str) -> NoReturn:  # noqa: D102 - see argparse
        raise InputError(f"{message}; see python -m data_prep --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m data_prep`; return its exit code."""
    try:
        run(_parser().parse_args(argv))
    except DataPrepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; run again to go on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


def run(options: argparse.Namespace) -> None:
    """Do what the parsed command line says, and print the summary."""
    start = time.monotonic()
    if not 0 <= options.max_reject_fraction <= 1:
        raise InputError(f"--max-reject-fraction {options.max_reject_fraction:g}: must lie in [0, 1]")
    if options.workers < 1:
        raise InputError(f"--workers {options.workers}: must be at least 1")
    if options.out.resolve().is_relative_to(Path(options.src).resolve()):
        raise InputError(f"{options.out}: lies in the source folder; give a folder outside it")
    source = open_source(options.src)
    if source.notice:
        print(source.notice)
    recipe = Recipe(
        image_size=options.size,
        resample=options.resample,
        encoding=options.format,
        mode=options.mode or source.natural_mode,
        shard_samples=options.shard_samples,
        upscale=options.upscale,
    )
    outcome = build(
        source, recipe, options.out, workers=options.workers, max_reject_fraction=options.max_reject_fraction
    )
    _print_summary(outcome, options.out, time.monotonic() - start)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m data_prep",
        description="Images as they lie on disk -> tar shards for the trainer. Run again after any interruption.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="a folder, a .zip archive, or embedded:mnist5k")
    add("out", metavar="OUT", type=Path, help="a new or empty folder, or one to resume")
    add("--size", type=int, default=Recipe.image_size, help="side of the square images in pixels")
    add("--resample", choices=RESAMPLES, default=Recipe.resample, help="filter for images of another size")
    add("--format", choices=ENCODINGS, default=Recipe.encoding, help="webp and png are lossless, jpeg is q95 4:4:4")
    add("--mode", choices=MODES, help="colour or grey (default: RGB, but L for embedded:mnist5k)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; the bytes do not depend on it")
    add("--shard-samples", type=int, default=Recipe.shard_samples, help="sources to a shard")
    add("--max-reject-fraction", type=float, default=0.01, help="fail where more of the sources are unusable")
    add("--upscale", action="store_true", help="enlarge images smaller than --size instead of rejecting them")
    return parser


def _print_summary(outcome: Outcome, out: Path, seconds: float) -> None:
    manifest = outcome.manifest
    if outcome.already_finished:
        print(f"{out}: already finished, nothing to do")
    size = sum(shard.bytes for shard in manifest.shards)
    print(f"read      {manifest.samples + manifest.rejected}")
    print(f"written   {manifest.samples} images of {len(manifest.classes) or 'no'} classes")
    print(f"rejected  {manifest.rejected}")
    for reason, count in outcome.reasons.most_common():
        print(f"          {count} {reason}")
    print(f"shards    {len(manifest.shards)}, {size:,} bytes")
    print(f"seconds   {seconds:.1f}")
