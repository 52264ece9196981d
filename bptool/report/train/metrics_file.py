"""`metrics.jsonl`: one JSON object a logged step, each step once, whatever was killed or resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from bptool.files import replacing, writing
from bptool.training.loop import Listener

_THEN = "resume the run"


class MetricsFile(Listener):
    """Appends a line a step and hands it to the kernel at once, so that a killed process loses none.

    Raises:
        StorageError: from every method, where the file cannot be written.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Keep the lines of the steps up to `first_step`, which a resumed run has done; drop what came after them."""
        self._path = path
        with writing(path, _THEN):
            _keep_until(path, first_step)
            self._file = path.open("a", buffering=1)

    def step_done(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the step's line; a figure that is not finite is null, as JSON has no other word for it."""
        values = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        with writing(self._path, _THEN):
            self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        with writing(self._path, _THEN):
            self._file.close()


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines() if _step_of(line) <= step]
    with replacing(path, _THEN) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> float:
    """The line's step; beyond all steps for a line that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
