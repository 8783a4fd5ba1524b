"""Writer of TensorBoard event files, by whole records.

It replaces torch's SummaryWriter, whose thread ends for good, with a traceback, the first time that a disk is full.
"""

import io
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar

from trainer.telemetry.files import AppendedFile


class EventFile:
    """One process's event file in a folder of logs, created with the first record.

    `goes_on_at`: a step; TensorBoard ignores this and later steps in the folder's older files. Methods raise OSError;
    records that could not be written are kept and written with the next call.
    """

    def __init__(self, folder: Path, *, goes_on_at: int) -> None:
        self._folder = folder
        self._file: AppendedFile | None = None
        self._first = [
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=goes_on_at, session_log=SessionLog(status=SessionLog.START)),
        ]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of a step."""
        self.add(step, *(scalar(name, value) for name, value in values.items()))

    def picture(self, step: int, name: str, pixels: npt.NDArray[np.uint8]) -> None:
        """Write an (H, W, C) picture of a step."""
        self.add(step, image(name, pixels, dataformats="HWC"))

    def add(self, step: int, *summaries: Summary) -> None:
        """Write summaries as made by torch.utils.tensorboard.summary."""
        now = time.time()
        self._write([Event(wall_time=now, step=step, summary=summary) for summary in summaries])

    def flush(self) -> None:
        """Write pending records."""
        self._write([])

    def _write(self, events: Iterable[Event]) -> None:
        file = self._file
        if file is None:
            file = self._file = AppendedFile(_unused_name(self._folder), lines=False)
            events = [*self._first, *events]
        piece = io.BytesIO()
        records = RecordWriter(piece)
        for event in events:
            records.write(event.SerializeToString())
        self._folder.mkdir(exist_ok=True)
        file.append(piece.getvalue())


def _unused_name(folder: Path) -> Path:
    stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    number = 0
    while os.path.lexists(path := folder / f"{stem}.{number}"):
        number += 1
    return path
