"""TensorBoard's event files, written at once: no queue, no thread, so an error is ours and a kill loses nothing."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from bptool.files import writing


class EventFile:
    """The events of one sitting of a run, each handed to the kernel before the call returns.

    TensorBoard reads a folder's event files in the order of their names, which begin with the time, and forgets
    whatever earlier ones hold from `next_step` on: the steps of a killed sitting that this one runs again.

    Raises:
        StorageError: here and in `write`, where the file cannot be written.
    """

    def __init__(self, folder: Path, next_step: int) -> None:
        seconds = int(time.time())
        self._path = folder / f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.0"
        with writing(self._path, then="resume the run"):
            self._file = self._path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=next_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, summary: Summary, step: int) -> None:
        """Add a summary of optimizer step `step`."""
        self._write(Event(summary=summary, step=step))

    def close(self) -> None:
        """Close the file."""
        with writing(self._path, then="resume the run"):
            self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with writing(self._path, then="resume the run"):
            self._records.write(event.SerializeToString())
            self._file.flush()
