"""A run's progress while it goes on: a live bar on a terminal, a line now and then elsewhere. All of it to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from bptool.report.text import quoted
from bptool.training.loop import Listener
from bptool.units import format_count, format_duration


def progress_listener(unit: str) -> Listener:
    """What suits stderr. `unit` is what throughput counts, such as tokens."""
    console = _Console(stderr=True, emoji=False)  # a sampled ":key:" is text
    return LiveProgress(console, unit) if console.is_terminal else ProgressLines(console, unit)


class _Console(Console):
    """One that nobody has to read."""

    def on_broken_pipe(self) -> None:
        """Whoever read left; the run goes on (rich would end the process)."""
        self.quiet = True


def describe(scalars: Mapping[str, float], unit: str) -> str:
    """`loss 1.5821  lr 1.2e-03  31.2K tokens/s  MFU 62%`."""
    parts = [f"loss {scalars['train/loss']:.4f}", f"lr {scalars['train/lr']:.2e}"]
    parts.append(f"{format_count(scalars['perf/tokens_per_s'])} {unit}/s")
    if "perf/mfu" in scalars:
        parts.append(f"MFU {scalars['perf/mfu']:.0%}")
    return "  ".join(parts)


class ProgressLines(Listener):
    """One line at most every `interval_s`, and one for each evaluation and sample."""

    def __init__(
        self, console: Console, unit: str, interval_s: float = 10, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._unit = unit
        self._interval_s = interval_s
        self._clock = clock
        self._last_line_s = -interval_s
        self._total = self._first = 0
        self._start_s = 0.0

    def started(self, *, first_step: int, total_steps: int) -> None:
        """Begin to count."""
        self._first, self._total, self._start_s = first_step, total_steps, self._clock()

    def step_done(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write a line where one is due."""
        now = self._clock()
        due = now - self._last_line_s >= self._interval_s or "val/loss" in scalars or step == self._total
        if not due:
            return
        self._last_line_s = now
        left_s = (now - self._start_s) / (step - self._first) * (self._total - step)
        line = f"step {step:>{len(str(self._total))}}/{self._total}  {describe(scalars, self._unit)}"
        if "val/loss" in scalars:
            line += f"  val loss {scalars['val/loss']:.4f}"
        if step < self._total:
            line += f"  {format_duration(left_s)} left"
        self._print(line)

    def sampled(self, step: int, text: str) -> None:
        """Show sampled text; the last sample is part of the report."""
        if step < self._total:
            self._print(f"sample at step {step}\n{quoted(text)}")

    def noted(self, message: str) -> None:
        """Show a note."""
        self._print(f"note: {message}")

    def close(self) -> None:
        """Keep a distance from the report, where both go to one place."""
        self._print("")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveProgress(Listener):
    """A bar that is drawn in place; evaluations, samples and notes scroll above it."""

    def __init__(self, console: Console, unit: str) -> None:
        self._unit = unit
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            _TimeLeft(),
            console=console,
        )
        self._task = self._progress.add_task("train", figures="", start=False)
        self._total = 0

    def started(self, *, first_step: int, total_steps: int) -> None:
        """Draw the bar."""
        self._total = total_steps
        self._progress.update(self._task, total=total_steps, completed=first_step)
        self._progress.start_task(self._task)
        self._progress.start()

    def step_done(self, step: int, scalars: Mapping[str, float]) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, figures=describe(scalars, self._unit))
        if "val/loss" in scalars:
            self._print(f"step {step:>{len(str(self._total))}}  val loss {scalars['val/loss']:.4f}")

    def sampled(self, step: int, text: str) -> None:
        """Show sampled text; the last sample is part of the report."""
        if step < self._total:
            self._print(f"sample at step {step}\n{quoted(text)}")

    def saved(self, step: int, folder: Path) -> None:
        """Say where the checkpoint is."""
        self._print(f"step {step:>{len(str(self._total))}}  checkpoint {folder}")

    def noted(self, message: str) -> None:
        """Show a note."""
        self._print(f"note: {message}")

    def close(self) -> None:
        """Leave the terminal as it was, at a distance from the report."""
        self._progress.stop()
        self._print("")

    def _print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


class _TimeLeft(ProgressColumn):
    """Time left by the average speed of this sitting."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text(f"{format_duration(left)} left" if left else "")
