"""What a run was asked for, by the names used in messages: recorded when it begins, compared when it is given again."""

import json
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.format import Manifest
from data_prep.output import whole_file
from data_prep.recipe import Recipe
from data_prep.sources import Source

SOURCE, MEMBERS = "a source", "the members"
NAMES = ("--size", "--transform", "--format", "--mode", "--shard-samples", "--upscale", SOURCE, MEMBERS)
BEGUN_NAME = "begun.json"


def parameters_of(source: Source, recipe: Recipe, members: dict[str, int]) -> dict[str, Any]:
    """Every parameter that determines the bytes; members: as `Manifest.members`."""
    options = recipe.image_size, recipe.transform, recipe.encoding, recipe.mode, recipe.shard_samples, recipe.upscale
    return dict(zip(NAMES, (*options, source_facts(source, members), members), strict=True))


def parameters_of_finished(manifest: Manifest) -> dict[str, Any]:
    """The same of a finished dataset."""
    encoding, shard_samples, upscale = (manifest.options.get(name) for name in ("format", "shard_samples", "upscale"))
    options = manifest.image_size, manifest.transform, encoding, manifest.mode, shard_samples, upscale
    return dict(zip(NAMES, (*options, manifest.source, manifest.members), strict=True))


def source_facts(source: Source, members: dict[str, int]) -> dict[str, Any]:
    """`Manifest.source` of a dataset with these members."""
    facts = {"kind": source.kind, "files": len(source.names), "fingerprint": source.fingerprint}
    further = source.further_fingerprint if members else ""
    return facts | ({"further_fingerprint": further} if further else {})


def check_same_run(out: Path, begun: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise InputError with the first parameter in which `asked` differs from what `out` was `begun` with.

    Images alone, as by earlier versions, stay so, and facts of a source that those did not record are not compared.
    """
    for name, value in asked.items():
        found = begun.get(name)
        if name == SOURCE and isinstance(found, dict) and found.items() <= value.items():
            continue
        if found != value and (name != MEMBERS or found):
            raise InputError(
                f"{out}: was made with {name} {found!r}, this run says {value!r}; "
                "give the same again, or another folder"
            )


def begin_or_resume(out: Path, staging: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Record the parameters of this run, or check that they equal those of the run being resumed. Returns the latter.

    Raises InputError where they differ or cannot be read.
    """
    note = staging / BEGUN_NAME
    if note.exists():
        try:
            begun = dict(json.loads(note.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{note}: cannot be read ({error}); remove {out} and run again") from error
        check_same_run(out, begun, asked)
        return {MEMBERS: {}, **begun}
    with whole_file(note, staging) as stream:
        stream.write(json.dumps(asked).encode())
    return asked
