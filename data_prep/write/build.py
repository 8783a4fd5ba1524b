"""Builds a dataset: plans the shards, writes the missing ones, merges their results, writes the manifest."""

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataPrepError, InputError
from data_prep.format import (
    CONTACT_SHEET_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    NAMES_NAME,
    REJECTS_NAME,
    SOURCE_ENCODING,
    FormatError,
    Manifest,
    ShardRecord,
    check_files,
    index_dtype,
    load_index,
    load_manifest,
    sha256_of,
)
from data_prep.inspection.contact_sheet import contact_sheet
from data_prep.inspection.dataset import Dataset
from data_prep.output import check_ours, claimed, discard_staging, whole_file
from data_prep.progress import WorkProgress
from data_prep.recipe import Recipe
from data_prep.sources import Source
from data_prep.write.convert import codec_versions
from data_prep.write.disk import check_room, readable
from data_prep.write.members import members_of
from data_prep.write.parameters import (
    MEMBERS,
    begin_or_resume,
    check_same_run,
    parameters_of,
    parameters_of_finished,
    source_facts,
)
from data_prep.write.workers import write_shards
from data_prep.write.writer import ShardPlan, ShardResult, is_whole, load_result


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished dataset. `reasons` counts the rejects; `already_finished`: it was complete before this run."""

    manifest: Manifest
    reasons: Counter[str]
    already_finished: bool


@dataclass(kw_only=True)
class Merged:
    """The combined results of the shards."""

    shards: list[ShardRecord] = field(default_factory=list)
    samples: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    shorter_sides: Counter[int] = field(default_factory=Counter)  # by the largest power of two that is not larger
    further: Counter[str] = field(default_factory=Counter)  # samples that have a further member, by its name


def build(source: Source, recipe: Recipe, out: Path, *, workers: int, max_reject_fraction: float) -> Outcome:
    """Complete the dataset in `out`, reusing what an earlier run with the same parameters left.

    `max_reject_fraction` in [0, 1] is the share of sources that may be rejected. Raises InputError where `out` holds
    another dataset, belongs to another run or to no run of data_prep, and DataPrepError where it cannot be written, a
    worker dies or too many images are rejected.
    """
    parameters = parameters_of(source, recipe, members_of(source, recipe))
    if (out / MANIFEST_NAME).exists():
        return _check_finished(out, source, parameters)
    check_ours(out)
    with claimed(out) as staging:
        if (out / MANIFEST_NAME).exists():  # the run that held the lock has finished it
            return _check_finished(out, source, parameters)
        # Also compared when resuming: shards by two versions of Pillow would not be reproducible from the source.
        members = begin_or_resume(out, staging, {**parameters, "the libraries": codec_versions()})[MEMBERS]
        _tell_of_images_alone(out, source, members)
        plans = plan_shards(source, recipe.shard_samples, members)
        missing = _missing(plans, out, staging, workers)
        if missing:
            _check_room(missing, recipe, out, begun=len(missing) < len(plans))
            done = len(source.names) - sum(len(plan.source.names) for plan in missing)
            with WorkProgress(total=len(source.names), done=done, what="writing", unit="img") as progress:
                for sources in write_shards(missing, recipe, out, staging, workers):
                    progress.update(sources)
        merged = _merge(plans, out, staging, members)
        _check_rejects(merged, len(source.names), max_reject_fraction, out)
        manifest = _manifest(merged, source, recipe, out, members)
        with whole_file(out / CONTACT_SHEET_NAME, staging) as stream:
            stream.write(contact_sheet(Dataset(folder=out, manifest=manifest, index=load_index(out, manifest))))
        with whole_file(out / MANIFEST_NAME, staging) as stream:
            stream.write(manifest.to_json().encode())
        discard_staging(out)
    return Outcome(manifest=manifest, reasons=merged.reasons, already_finished=False)


def plan_shards(source: Source, shard_samples: int, members: dict[str, int]) -> list[ShardPlan]:
    """Divide the sorted sources into shards of `shard_samples`; the last one may be smaller."""
    return [
        ShardPlan(number=number, first_key=start, source=source.part(start, start + shard_samples), members=members)
        for number, start in enumerate(range(0, len(source.names), shard_samples))
    ]


def _missing(plans: list[ShardPlan], out: Path, staging: Path, workers: int) -> list[ShardPlan]:
    """The shards to write: missing ones, and those changed since they were written, which are reported."""
    begun = [plan for plan in plans if (staging / plan.result_name).exists()]
    whole, changed = set(), []
    with (
        ThreadPoolExecutor(workers) as pool,  # threads, since hashing releases the GIL
        WorkProgress(total=len(begun), what="checking what is there", unit="shard") as progress,
    ):
        for plan, good in zip(begun, pool.map(lambda plan: is_whole(plan, out, staging), begun)):
            progress.update()
            if good:
                whole.add(plan.number)
            elif (out / plan.tar_name).exists():
                changed.append(out / plan.tar_name)
    for path in changed:
        print(f"{path}: changed since it was written; it will be written anew")
    return [plan for plan in plans if plan.number not in whole]


def _check_finished(out: Path, source: Source, parameters: dict[str, Any]) -> Outcome:
    """The outcome of the run that finished `out`; InputError where that was another dataset or is damaged now."""
    try:
        manifest = load_manifest(out)
        check_files(out, manifest)
    except FormatError as error:
        raise InputError(f"{error}; remove {out} and run again") from error
    check_same_run(out, parameters_of_finished(manifest), parameters)
    _tell_of_images_alone(out, source, manifest.members)
    discard_staging(out)  # left by a run that was killed after writing the manifest
    return Outcome(manifest=manifest, reasons=_reasons(out / REJECTS_NAME), already_finished=True)


def _tell_of_images_alone(out: Path, source: Source, members: dict[str, int]) -> None:
    """Print a line where a dataset was begun as images alone, and stays so, though its source has more by now."""
    if source.members and not members:
        print(
            f"{out}: was begun as images alone and stays so; its source also has {', '.join(source.members)}, "
            "which another folder would keep"
        )


def _reasons(path: Path) -> Counter[str]:
    """Number of rejects by reason, from the list of a finished dataset. Raises InputError where it cannot be read."""
    try:
        with path.open() as lines:
            return Counter(str(json.loads(line)["reason"]) for line in lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove {path.parent} and run again") from error


def _check_room(missing: list[ShardPlan], recipe: Recipe, out: Path, *, begun: bool) -> None:
    """Report the estimated size. Raises InputError where the disk has less; a new run then leaves no file behind."""
    try:
        room = check_room(missing, recipe, out)
    except InputError:
        if not begun:
            discard_staging(out)
        raise
    print(f"{out}: about {readable(room.needed)} to write, {readable(room.free)} free", flush=True)


def _merge(plans: list[ShardPlan], out: Path, staging: Path, members: dict[str, int]) -> Merged:
    """Write index, names and rejects of the whole dataset."""
    merged = Merged()
    rows = [np.empty(0, index_dtype(members))]
    with whole_file(out / NAMES_NAME, staging) as names, whole_file(out / REJECTS_NAME, staging) as rejects:
        for plan in plans:  # their results one at a time, since all may not fit into memory
            result = load_result(plan, out, staging)
            if result is None or result.sources != len(plan.source.names):
                raise DataPrepError(f"{staging / plan.result_name}: does not account for all sources of the shard")
            for rejected in result.rejects:
                rejects.write(json.dumps(asdict(rejected)).encode() + b"\n")
                merged.reasons[rejected.reason] += 1
            if result.record is None:
                continue
            names.writelines(json.dumps(sample.name).encode() + b"\n" for sample in result.samples)
            rows.append(_index_rows(result, len(merged.shards), members))
            merged.shards.append(result.record)
            merged.samples += len(result.samples)
            merged.kept += sum(sample.kept for sample in result.samples)
            sides = [min(sample.width, sample.height) for sample in result.samples]
            merged.shorter_sides.update(1 << side.bit_length() - 1 for side in sides)
            merged.further.update(name for sample in result.samples for name in sample.further)
    with whole_file(out / INDEX_NAME, staging) as stream:
        np.save(stream, np.concatenate(rows))
    return merged


def _index_rows(result: ShardResult, shard: int, members: Iterable[str]) -> np.ndarray[Any, np.dtype[np.void]]:
    """Rows of the index for a shard, (samples,) of `index_dtype(members)`."""
    rows = [
        (shard, s.offset, s.length, s.crc32, s.label, s.key, *(tuple(s.further.get(m, (0, 0, 0))) for m in members))
        for s in result.samples
    ]
    return np.array(rows, index_dtype(members))


def _check_rejects(merged: Merged, read: int, max_reject_fraction: float, out: Path) -> None:
    """Raise DataPrepError where more were rejected than allowed, or all."""
    rejected = merged.reasons.total()
    if merged.samples + rejected != read:
        raise DataPrepError(
            f"{out}: read {read} but wrote {merged.samples} and rejected {rejected}; please report this"
        )
    if merged.samples and rejected <= max_reject_fraction * read:
        return
    reason, count = merged.reasons.most_common(1)[0]
    raise DataPrepError(
        f"{out / REJECTS_NAME}: {rejected} of {read} images rejected ({count} times: {reason}), which is more than "
        f"--max-reject-fraction {max_reject_fraction:g} allows; see the file"
    )


def _manifest(merged: Merged, source: Source, recipe: Recipe, out: Path, members: dict[str, int]) -> Manifest:
    left_out = {rule: count for rule, count in sorted(source.left_out.items()) if count}
    return Manifest(
        image_size=recipe.image_size,
        mode=recipe.mode,
        encoding=SOURCE_ENCODING if recipe.keeps_bytes else recipe.encoding,
        transform=recipe.transform,
        members=members,
        samples=merged.samples,
        rejected=merged.reasons.total(),
        classes=list(source.classes),
        source=source_facts(source, members),
        shards=merged.shards,
        index_sha256=sha256_of(out / INDEX_NAME),
        names_sha256=sha256_of(out / NAMES_NAME),
        options={"format": recipe.encoding, "shard_samples": recipe.shard_samples, "upscale": recipe.upscale},
        report={
            "kept": merged.kept,
            "shorter_sides": {str(side): count for side, count in sorted(merged.shorter_sides.items())},
            **({"left_out": left_out} if left_out else {}),
            **({"members": {name: merged.further[name] for name in members}} if members else {}),
        },
    )
