"""Summaries for the terminal: of a run, and of a finished dataset."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.format import CONTACT_SHEET_NAME, UNLABELLED, Manifest
from data_prep.inspection.contact_sheet import contact_sheet
from data_prep.inspection.dataset import Dataset
from data_prep.output import claimed, discard_staging, whole_file

BAR = 40  # characters of the longest bar
CLASSES_SHOWN = 20


def print_outcome(
    manifest: Manifest, out: Path, *, reasons: Counter[str], already_finished: bool, seconds: float
) -> None:
    """Print the summary of a run that completed the dataset in `out`; `reasons` counts the rejects."""
    if already_finished:
        print(f"{out}: already finished, nothing to do")
    left_out = _left_out(manifest)
    print(f"read      {manifest.samples + manifest.rejected + sum(left_out.values())}")
    print(f"written   {manifest.samples} images of {len(manifest.classes) or 'no'} classes")
    _print_samples(manifest)
    print(f"rejected  {manifest.rejected}")
    for reason, count in reasons.most_common():
        print(f"          {count} {reason}")
    _print_files(manifest, left_out)
    print(f"look at   {out / CONTACT_SHEET_NAME}")
    print(f"seconds   {seconds:.1f}")


def print_contents(dataset: Dataset) -> None:
    """Print the content of a finished dataset; makes its contact sheet where that is missing.

    Raises InputError where the sheet has to be made and a sample cannot be read.
    """
    manifest = dataset.manifest
    source = manifest.source
    print(f"images    {manifest.samples}, {manifest.mode} {manifest.image_size}x{manifest.image_size}")
    how = "own files, cropped when read" if manifest.crops else manifest.transform
    print(f"stored    {manifest.encoding}, {how}")
    _print_samples(manifest)
    print(f"source    {source.get('kind')} of {source.get('files')}, fingerprint {str(source.get('fingerprint'))[:16]}")
    print(f"rejected  {manifest.rejected}")
    _print_files(manifest, _left_out(manifest))
    if len(dataset.index):
        lengths = dataset.index["length"]
        print(
            f"an image  {int(lengths.min()):,} to {int(lengths.max()):,} bytes, {float(lengths.mean()):,.0f} on average"
        )
    _print_classes(dataset)
    print(f"identity  {manifest.fingerprint[:16]}")
    print(f"look at   {_existing_contact_sheet(dataset)}")


def left_out_line(left_out: Mapping[str, int]) -> list[str]:
    """A line on files that were left out by rule; empty if there are none."""
    told = ", ".join(f"{count} {rule}" for rule, count in left_out.items() if count)
    return [f"leaves out {told}"] if told else []


def _left_out(manifest: Manifest) -> dict[str, int]:
    """Number of files left out, by rule; empty for datasets written by versions that did not record it."""
    found: dict[str, int] = manifest.report.get("left_out", {})
    return found


def _print_samples(manifest: Manifest) -> None:
    """How many images have the source's bytes, and how many samples have each further member."""
    if manifest.crops:
        kept = manifest.report.get("kept", 0)
        print(f"          {kept} with the source's bytes, {manifest.samples - kept} encoded anew without loss")
    for line, (name, side) in enumerate(manifest.members.items()):
        what = f"{name}, {side}x{side}" if side else name
        print(f"{'' if line else 'members':8}  {manifest.report.get('members', {}).get(name, 0):>9}  {what}")


def _print_files(manifest: Manifest, left_out: Mapping[str, int]) -> None:
    """How many files each rule left out, the sides of the source's images, and the shards."""
    print(f"left out  {sum(left_out.values())}")
    for rule, count in left_out.items():
        print(f"          {count} {rule}")
    counts: dict[str, int] = manifest.report.get("shorter_sides", {})
    for line, (side, count) in enumerate(sorted(counts.items(), key=lambda item: int(item[0]))):
        bar = "#" * max(1, round(BAR * count / max(counts.values())))
        sides = f"{side}-{2 * int(side) - 1}"
        print(f"{'' if line else 'sides':8}  {sides:>11}  {count:>9}  {bar}")
    print(f"shards    {len(manifest.shards)}, {sum(shard.bytes for shard in manifest.shards):,} bytes")


def _print_classes(dataset: Dataset) -> None:
    classes = dataset.manifest.classes
    if not classes:
        print("classes   none")
        return
    counts = Counter(dict(zip(*np.unique(dataset.index["label"], return_counts=True))))
    print(f"classes   {len(classes)}, {counts[UNLABELLED]} images without one")
    for label, name in enumerate(classes[:CLASSES_SHOWN]):
        print(f"{label:>8}  {counts[label]:>9}  {name}")
    if len(classes) > CLASSES_SHOWN:
        print(f"          and {len(classes) - CLASSES_SHOWN} more")


def _existing_contact_sheet(dataset: Dataset) -> Path:
    path = dataset.folder / CONTACT_SHEET_NAME
    if not path.exists():
        sheet = contact_sheet(dataset)
        with claimed(dataset.folder) as staging:
            with whole_file(path, staging) as stream:
                stream.write(sheet)
            discard_staging(dataset.folder)
    return path
