"""How many steps of a measurement are done: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def counting_steps(word: str = "step") -> Iterator[Callable[[int, int], None]]:
    """Call what it gives with the number of steps that are done, and of how many. It is gone when it is left.

    Args:
        word: what is counted.
    """
    console = Console(stderr=True)
    columns = (TextColumn(word), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    if not console.is_terminal:
        yield lambda number, total: None
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("steps", total=None)
        yield lambda number, total: progress.update(task, completed=number, total=total)
