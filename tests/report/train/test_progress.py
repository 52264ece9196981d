from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from bptool.report.train.progress import LiveProgress, ProgressLines, describe, progress_listener

SCALARS = {"train/loss": 2.34567, "train/lr": 1.2e-3, "train/grad_norm": 1.0, "perf/tokens_per_s": 31234.0}


class Clock:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(total: int, seconds_a_step: float, evaluated: int = 0, first: int = 0) -> list[str]:
    """What is printed in a run of `total` steps, with a line at most every 10 s."""
    clock, screen = Clock(), io.StringIO()
    listener = ProgressLines(Console(file=screen, width=40), "tokens", interval_s=10, clock=clock)
    listener.started(first_step=first, total_steps=total)
    for step in range(first + 1, total + 1):
        clock.now += seconds_a_step
        listener.step_done(step, SCALARS | ({"val/loss": 3.25} if step == evaluated else {}))
    return screen.getvalue().splitlines()


def test_figures() -> None:
    assert describe(SCALARS, "tokens") == "loss 2.3457  lr 1.20e-03  31.23K tokens/s"
    assert describe(SCALARS | {"perf/mfu": 0.6249}, "images") == "loss 2.3457  lr 1.20e-03  31.23K images/s  MFU 62%"


def test_a_line_at_most_every_interval_and_one_for_the_last_step() -> None:
    lines = lines_of(total=100, seconds_a_step=4)
    assert [int(line.split("/")[0].removeprefix("step")) for line in lines] == [1, *range(4, 100, 3), 100][: len(lines)]
    assert lines[0].startswith("step   1/100  loss 2.3457")
    assert lines[-1].startswith("step 100/100  loss")


def test_an_evaluation_has_its_line() -> None:
    lines = lines_of(total=50, seconds_a_step=0.1, evaluated=7)
    assert [line.partition("  loss")[0] for line in lines] == ["step  1/50", "step  7/50", "step 50/50"]
    assert "val loss 3.2500" in lines[1]


def test_time_left_is_that_of_this_sitting() -> None:
    """90 steps were done before; the 10 that are left take 60 s each."""
    lines = lines_of(total=100, seconds_a_step=60, first=90)
    assert lines[0].endswith("9m 00s left")
    assert lines[4].endswith("5m 00s left")
    assert "left" not in lines[-1]


def test_long_lines_are_not_broken_and_texts_not_touched() -> None:
    screen = io.StringIO()
    listener = ProgressLines(Console(file=screen, width=20, emoji=False), "tokens")
    listener.started(first_step=0, total_steps=9)
    listener.sampled(1, "[bold]x[/bold] :smile: " + "y" * 50 + "\x1b[31m")
    listener.noted("a note [red] that is longer than twenty characters")
    assert screen.getvalue().splitlines() == [
        "sample at step 1",
        "  | [bold]x[/bold] :smile: " + "y" * 50 + "\\x1b[31m",
        "note: a note [red] that is longer than twenty characters",
    ]


def test_the_last_sample_is_left_to_the_report() -> None:
    screen = io.StringIO()
    listener = ProgressLines(Console(file=screen), "tokens")
    listener.started(first_step=0, total_steps=3)
    listener.sampled(3, "the end")
    assert screen.getvalue() == ""


class TestLive:
    @pytest.fixture
    def screen(self) -> io.StringIO:
        return io.StringIO()

    @pytest.fixture
    def bar(self, screen: io.StringIO) -> Iterator[LiveProgress]:
        console = Console(file=screen, force_terminal=True, width=100, color_system=None)
        bar = LiveProgress(console, "tokens")
        bar.started(first_step=0, total_steps=40)
        yield bar
        bar.close()

    def test_what_happened_scrolls_above_it(self, bar: LiveProgress, screen: io.StringIO) -> None:
        bar.step_done(7, SCALARS | {"val/loss": 3.25})
        bar.saved(7, Path("runs/a/checkpoints/step-00000007"))
        bar.sampled(7, "def f[0]")
        bar.noted("[odd]")
        for words in (
            *("step  7  val loss 3.2500", "step  7  checkpoint runs/a/checkpoints/step-00000007"),
            *("sample at step 7", "  | def f[0]", "note: [odd]"),
        ):
            assert words in screen.getvalue()

    def test_it_moves(self, bar: LiveProgress, screen: io.StringIO) -> None:
        bar.step_done(8, SCALARS)
        bar.close()
        assert " 8/40" in screen.getvalue()
        assert "loss 2.3457" in screen.getvalue()

    def test_at_the_end_no_time_is_left_and_the_cursor_is_back(self, bar: LiveProgress, screen: io.StringIO) -> None:
        bar.step_done(40, SCALARS)
        bar.close()
        assert "left" not in screen.getvalue().rpartition("40/40")[2]
        assert screen.getvalue().endswith("\x1b[?25h\n")


class TestNobodyReads:
    def test_a_terminal_gets_the_bar_and_a_pipe_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert isinstance(progress_listener("tokens"), ProgressLines)
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert isinstance(progress_listener("tokens"), LiveProgress)

    def test_a_reader_that_leaves_does_not_end_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Closed(io.StringIO):
            def write(self, text: str) -> int:
                raise BrokenPipeError

        monkeypatch.setattr("sys.stderr", Closed())
        listener = progress_listener("tokens")
        listener.started(first_step=0, total_steps=2)
        listener.step_done(1, SCALARS)
        listener.step_done(2, SCALARS)
        listener.close()
