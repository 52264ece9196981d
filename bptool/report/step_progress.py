"""How many steps of a measurement are done: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def counting_steps(word: str = "step", *, before: str = "") -> Iterator[Callable[[int, int], None]]:
    """Call what it gives with the number of steps that are done, and of how many. It is gone when it is left.

    Args:
        word: what is counted.
        before: what goes on until the first is counted, where that is something else.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    if not console.is_terminal:
        yield lambda number, total: None
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(before or word, total=None)
        yield lambda number, total: progress.update(
            task, completed=number, total=total, description=f"{word} {number}/{total}"
        )
