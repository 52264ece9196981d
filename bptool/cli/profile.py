"""`bptool profile`: where do forward, backward and recomputation go?"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bptool.cli.garbage import collecting_seldom
from bptool.cli.guard import guarded, note, say
from bptool.cli.refusals import refuse_device, refuse_files
from bptool.cli.words import Debug, Device, Force, GpuName, Html, Json, Keys, Steps, WarmUp, Words, split_words
from bptool.errors import EXIT_INTERRUPTED, UsageError

if TYPE_CHECKING:
    from bptool.analysis.profile.answers import Profiled
    from bptool.analysis.profile.result import ProfileResult

_EXAMPLE = """\b
Examples:
  bptool profile
  bptool profile gpt2 training.micro_batch_size=2 --html gpt2.html
  bptool profile llama3-405b --gpu h100 --count
  bptool profile my_model.py:vit --trace vit.json"""

Count = Annotated[bool, typer.Option("--count", help="Count only, on tensors without values; run nothing.")]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="Write a recorded step as a Chrome trace, for Perfetto.")
]
Board = Annotated[
    Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write the timed steps as TensorBoard scalars.")
]


@dataclass(frozen=True)
class _Files:
    """What is to be written."""

    html: Path | None
    trace: Path | None
    tensorboard: Path | None

    def shown(self) -> Iterator[Path]:
        """What TensorBoard would show already."""
        if self.tensorboard:
            yield from sorted(self.tensorboard.glob("events.out.tfevents.*"))[:1]

    def given(self) -> list[str]:
        """The options of the two files."""
        return [option for option, file in {"--html": self.html, "--trace": self.trace}.items() if file]

    def about_time(self) -> Iterator[str]:
        """The options that need a step that is run."""
        if self.trace:
            yield "--trace"
        if self.tensorboard:
            yield "--tensorboard"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("profile", epilog=_EXAMPLE)(profile)


@guarded
def profile(
    words: Words = None,
    device: Device = "auto",
    gpu: GpuName = None,
    steps: Steps = 10,
    warmup: WarmUp = 3,
    count: Count = False,
    html: Html = None,
    trace: TraceFile = None,
    tensorboard: Board = None,
    force: Force = False,
    keys: Keys = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show where forward, backward and recompute go.

    The trainer's own step, counted in FLOPs exactly and timed. Exit codes: 0 done, 2 a wrong command line, config or
    model, 3 the machine said no, 130 stopped by Ctrl-C, after printing what was gathered.
    """
    target, overrides = split_words(words)
    files = _Files(html, trace, tensorboard)
    _refuse(device, gpu, steps, warmup)
    _refuse_files(files, count=count, force=force)

    # A real step is to meet the garbage collector as the trainer's does.
    with collecting_seldom() if count else nullcontext():
        from bptool.analysis.profile.answers import profile as profiled_step
        from bptool.analysis.profile.measuring import Plan
        from bptool.analysis.question import ask
        from bptool.report.step_progress import counting_steps

        with redirect_stdout(sys.stderr), counting_steps() as done:  # what the user's own code prints is not our result
            question = ask(target, overrides, command="profile", device=device, gpu=gpu)
            profiled = profiled_step(question, Plan(steps=steps, warmup=warmup, measure=not count), done)
    for warning in profiled.result.warnings:
        say(f"warning: {warning}")
    _write(files, profiled)
    typer.echo(profiled.result.json_text() if json else _text(profiled.result, files.given()))
    if profiled.result.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def _refuse(device: str, gpu: str | None, steps: int, warmup: int) -> None:
    refuse_device(device, gpu)
    if steps < 1:
        raise UsageError(f"--steps {steps}: a median needs a step at least", "--count runs none, and counts FLOPs")
    if warmup < 0:
        raise UsageError(f"--warmup {warmup} is less than none", "--warmup 0 times the first step too")


def _refuse_files(files: _Files, *, count: bool, force: bool) -> None:
    for option in files.about_time() if count else ():
        raise UsageError(f"{option} shows measured time, and --count runs nothing", f"leave out --count, or {option}")
    refuse_files({"--html": files.html, "--trace": files.trace}, force=force)
    for file in files.shown() if not force else ():
        raise UsageError(f"{file} exists already", "choose another name, or overwrite it with --force")


def _write(files: _Files, profiled: Profiled) -> None:
    """Write what was asked for, and say what it is good for."""
    result = profiled.result
    if files.html:
        from bptool.files import replace_text
        from bptool.report.profile.page import render_page

        replace_text(files.html, render_page(result, command=shlex.join(["bptool", *sys.argv[1:]])))
        say(f"wrote {files.html}")
    if files.trace and not profiled.trace:
        note("no step was recorded: --trace wrote nothing")
    if files.tensorboard and not result.time:
        note("no step was timed: --tensorboard wrote nothing")
    if files.trace and profiled.trace:
        from bptool.report.profile.console import asked
        from bptool.report.profile.trace import write_trace

        write_trace(files.trace, profiled.trace, name=asked(result))
        say(f"wrote {files.trace}: open it at ui.perfetto.dev, which reads it in the browser")
    if files.tensorboard and result.time:
        from bptool.report.profile.tensorboard import write_scalars

        write_scalars(files.tensorboard, result)
        say(f"wrote {files.tensorboard}: tensorboard --logdir {shlex.quote(str(files.tensorboard))}")


def _text(result: ProfileResult, given: list[str]) -> str:
    """The report with its picture, as wide as the terminal, coloured where a person reads it."""

    from rich.console import Console

    from bptool.report.profile.console import render
    from bptool.report.profile.cost_tree import cost_tree
    from bptool.report.profile.icicle import icicle
    from bptool.report.text import terminal_width

    console = Console()
    width = terminal_width(least=40)
    drawn = icicle(cost_tree(result.modules), width=width, colored=console.is_terminal and not console.no_color)
    with console.capture() as capture:
        console.print(drawn, end="", soft_wrap=True)
    return render(result, width=width, picture=capture.get(), given=given)
