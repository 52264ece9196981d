"""What a process of its own is told to do, and what it answers: one JSON line each way."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bptool.analysis.compare.result import Status
from bptool.analysis.result import Record

JobKind = Literal["run", "equality", "reference", "gradient"]


class Job(Record):
    """One thing to find out. The question is asked again in the process, from the words that the user typed.

    Attributes:
        kind: `run`: its steps, timed; `equality`: whether recomputation changes its gradient; `reference`: the gradient
            that others are compared with; `gradient`: the distance from it.
        target, settings, device: as `ask` takes them.
        folder: of this session's own files: tokenizers and reference gradients.
        warmup, steps: of a `run`.
        sequences: of the batch that gradients are of; rows with smaller micro-batches split it.
        reference: the file of the reference gradient, to write or to read.
    """

    kind: JobKind
    target: str
    settings: list[str]
    device: str
    folder: str
    warmup: int = 2
    steps: int = 1
    sequences: int = 1
    reference: str = ""


class Outcome(Record):
    """What came of a job.

    Attributes:
        reason: why it is not `ok`.
        figures: fields of the job's entry.
        notes: what else the user should know.
    """

    status: Status = "ok"
    reason: str = ""
    figures: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
