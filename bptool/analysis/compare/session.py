"""What the jobs of one session have in common, and how rows are named to the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bptool.analysis.compare.entries import Header
from bptool.analysis.compare.job import Job, JobKind, Outcome
from bptool.analysis.compare.row_process import run_job
from bptool.analysis.question import Question
from bptool.config.axes import labels

_LEAST_WARMUP, _LEAST_COMPILED_WARMUP = 2, 3
"""Steps: the last of them is measured, and must be a steady one; a compiled step is compiled in the first, and what it
found out in that may have it compiled once more."""


@dataclass(frozen=True)
class Session:
    """One sitting over a grid.

    Attributes:
        questions: each row's; None where its settings contradict each other.
        folder: of its own files, gone when it ends.
        stopped: whether the user wants to stop.
        done: told a line of each thing that was found.
    """

    questions: Sequence[Question | None]
    header: Header
    folder: Path
    stopped: Callable[[], bool]
    done: Callable[[str], None]
    _noted: set[str] = field(default_factory=set)

    def run(self, kind: JobKind, question: Question, reference: Path | None = None) -> Outcome | None:
        """What comes of a job; None where the user stopped it. Its notes are told, each once."""
        job = Job(
            kind=kind,
            target=question.target,
            settings=list(question.settings),
            device=question.machine.device,
            folder=str(self.folder),
            warmup=self._warmup,
            steps=self.header.steps,
            sequences=self._sequences,
            reference=str(reference or ""),
        )
        outcome = run_job(job, time_limit_s=self.header.time_limit_s, stopped=self.stopped)
        for note in outcome.notes if outcome else []:
            if note not in self._noted:
                self._noted.add(note)
                self.done(note)
        return outcome

    def label(self, row: int) -> str:
        """A row's settings in few words, as the report has them."""
        return labels(self.header.rows)[row] or "as it is"

    @property
    def _asked(self) -> list[Question]:
        return [question for question in self.questions if question]

    @property
    def _warmup(self) -> int:
        """The same for all rows, so that their last losses are of the same step."""
        compiled = any(question.config.training.compile for question in self._asked)
        return max(self.header.warmup, _LEAST_COMPILED_WARMUP if compiled else _LEAST_WARMUP)

    @property
    def _sequences(self) -> int:
        """Of the batch that all gradients are of: the reference row's micro-batch."""
        reference = self.questions[self.header.reference] or self._asked[0]
        return reference.config.training.micro_batch_size
