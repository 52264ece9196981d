"""A grid in earnest: gradients first, which refuse rows for little, and then rounds in which each row runs once."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bptool.analysis.compare.entries import GradientComparison, Header, RowRun
from bptool.analysis.compare.gradients import Gradients
from bptool.analysis.compare.journal import Journal
from bptool.analysis.compare.row_worker import FOLDER_PREFIX
from bptool.analysis.compare.session import Session
from bptool.analysis.question import Question
from bptool.training.interruption import StopRequest
from bptool.units import format_duration


def measure_grid(
    questions: Sequence[Question | None], header: Header, journal: Journal, done: Callable[[str], None]
) -> bool:
    """Find out what `journal` does not hold yet, each job in a fresh process, and write it there as it is found.

    A row that the journal says anything but `ok` of is not run. In each round the rows take turns, beginning one
    further than in the last, so that what slows the machine down falls on all of them alike.

    Args:
        questions: each row's; its `settings` are all that the user typed, and the row's own KEY=VALUEs. None where they
            contradict each other.
        done: told a line of each thing that was found.

    Returns:
        Whether the user stopped it.

    Raises:
        StorageError: the journal could not be written.
    """
    with (
        tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as folder,
        StopRequest("stopping; what was finished is kept", "stopped at once; what was finished is kept") as stop,
    ):
        session = Session(questions, header, Path(folder), lambda: bool(stop.reason), done)
        finished = _compare_gradients(session, journal) and _run_rounds(session, journal)
        return not finished


def _compare_gradients(session: Session, journal: Journal) -> bool:
    """Whether all is done."""
    gradients = Gradients(session, journal.entries)
    compared = {entry.row for entry in journal.entries if isinstance(entry, GradientComparison)}
    for row, question in _runnable(session, journal, range(len(session.questions))):
        if row in compared:
            continue
        entry = gradients.compare(row, question)
        if entry is None:
            return False
        journal.append(entry)
        session.done(f"gradient of {session.label(row)}: {_gradient_words(entry)}")
    return not session.stopped()


def _run_rounds(session: Session, journal: Journal) -> bool:
    """Whether all is done."""
    run = {(entry.round, entry.row) for entry in journal.entries if isinstance(entry, RowRun)}
    rounds, count = session.header.rounds, len(session.questions)
    for turn in range(rounds):
        in_turn = [(turn + place) % count for place in range(count)]
        for row, question in _runnable(session, journal, in_turn):
            if (turn, row) in run:
                continue
            outcome = session.run("run", question)
            if outcome is None:
                return False
            entry = RowRun(row=row, round=turn, status=outcome.status, reason=outcome.reason, **outcome.figures)
            journal.append(entry)
            session.done(f"round {turn + 1} of {rounds}: {session.label(row)}, {_run_words(entry)}")
    return not session.stopped()


def _runnable(session: Session, journal: Journal, rows: Sequence[int]) -> Iterator[tuple[int, Question]]:
    """Those of `rows` that nothing is wrong with when their turn comes, until the user stops it."""
    for row in rows:
        question = session.questions[row]
        refused = any(entry.row == row and entry.status != "ok" for entry in journal.entries)
        if session.stopped():
            return
        if question is not None and not refused:
            yield row, question


def _gradient_words(entry: GradientComparison) -> str:
    if entry.status != "ok":
        return f"{entry.status.replace('_', ' ')}: {entry.reason}"
    if entry.relative_error is None:
        return entry.reason
    return f"{entry.relative_error:.1e} from {entry.reference}"


def _run_words(entry: RowRun) -> str:
    if entry.status != "ok":
        return f"{entry.status.replace('_', ' ')}: {entry.reason}"
    return f"{format_duration(statistics.median(step.step_s for step in entry.steps))} a step"
