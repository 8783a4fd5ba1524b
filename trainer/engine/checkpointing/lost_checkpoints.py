"""Finds traces of lost checkpoints in a run's folder: such a run must not silently start from step 0."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.engine.run_dir import marked_step
from trainer.engine.run_folder import RunFolder
from trainer.errors import CheckpointError, ConfigError
from trainer.telemetry.goodput import ENDS, JOURNAL_NAME, read_events
from trainer.telemetry.heartbeat import HEARTBEAT_NAME, read_heartbeat
from trainer.telemetry.metrics import read_metrics


def check_that_it_is_new(folder: RunFolder) -> None:
    """Raise CheckpointError where the folder holds no checkpoint, but traces of some."""
    events = read_events(folder.path)
    told = _by_journal(events) or _by_ends(folder) or _by_steps(folder, events)
    if told is not None:
        raise CheckpointError(
            f"run_dir = {folder.path}: {told}, but checkpoints/ holds none, and starting anew would lose that run; "
            "bring them back, go on from a copy with --resume PATH or URL, choose another run_dir, or begin anew here "
            "with --resume none"
        )


def _by_journal(events: Sequence[Mapping[str, Any]]) -> str | None:
    """Evidence in the journal since the run last started from step 0."""
    told = None
    for event in events:
        name, step, source = event["event"], event.get("step"), event.get("resumed_from")
        if name == "started" and step == 0 and not source:
            told = None
        elif name == "started" and source:
            told = f"{JOURNAL_NAME} tells that it went on from {source}"
        elif event.get("checkpoint") or (name in ("checkpoint", "restored", *ENDS) and step):
            told = f"{JOURNAL_NAME} tells of a checkpoint of step {step}"
    return told


def _by_ends(folder: RunFolder) -> str | None:
    """Evidence in DONE, STOPPED and the last heartbeat: they are written once a checkpoint exists, step 0 excepted."""
    for marker in (folder.done, folder.stopped):
        if step := marked_step(marker):
            return f"{marker.name} tells that step {step} was saved"
    beat = read_heartbeat(folder.path)
    if beat is not None and beat["activity"] in ENDS and beat["step"]:
        return f"{HEARTBEAT_NAME} tells that step {beat['step']} was saved"
    return None


def _by_steps(folder: RunFolder, events: Sequence[Mapping[str, Any]]) -> str | None:
    """Evidence in the logged steps: if a step after the second save was due, the first save completed or failed."""
    step = max((int(record["step"]) for record in read_metrics(folder.logs)), default=0)
    if step and not any(event["event"] == "started" for event in events):
        return f"the logs tell of step {step}, and {JOURNAL_NAME}, which would tell of checkpoints, is gone"
    try:
        config = folder.load_config()
    except ConfigError:
        return None
    every, global_batch = config.checkpoint.every, config.train.global_batch
    if not every.count or config.checkpoint.on_failure == "continue":
        return None
    if (step - 1) * global_batch < 2 * every.images(global_batch):
        return None
    return f'the logs tell of step {step} with checkpoint.every = "{every}"'
