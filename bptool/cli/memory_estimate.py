"""`bptool memory-estimate`: will it fit, what fills the memory, and what would make it fit?"""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bptool.cli.garbage import collecting_seldom
from bptool.cli.guard import guarded, say
from bptool.cli.refusals import refuse_device, refuse_files
from bptool.cli.words import Debug, Device, Force, GpuName, Html, Json, Keys, Words, split_words
from bptool.errors import AnswerIsNo

if TYPE_CHECKING:
    from bptool.analysis.memory.estimate import Simulated
    from bptool.analysis.memory.result import MemoryEstimate

_EXAMPLE = """\b
Examples:
  bptool memory-estimate llama3-8b --gpu h100
  bptool memory-estimate gpt2 --gpu rtx4090 --fit 12GiB
  bptool memory-estimate my_model.py:vit --validate"""

Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="SIZE",
        help="A capacity, such as 24GiB: which settings fit it, the largest micro-batch, the longest sequence.",
    ),
]
WhatIf = Annotated[bool, typer.Option("--what-if", help="What each switch would save, simulated.")]
Explain = Annotated[bool, typer.Option("--explain", help="The closed forms, each beside what was counted.")]
Validate = Annotated[bool, typer.Option("--validate", help="Run two real steps too, and measure the second.")]
Snapshot = Annotated[
    Path | None, typer.Option("--snapshot", metavar="FILE", help="Write a snapshot for PyTorch's memory viewer.")
]
SnapshotDiff = Annotated[
    Path | None,
    typer.Option("--snapshot-diff", metavar="FILE", help="Compare with a snapshot that PyTorch dumped on a GPU."),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("memory-estimate", epilog=_EXAMPLE)(memory_estimate)


@guarded
def memory_estimate(
    words: Words = None,
    device: Device = "auto",
    gpu: GpuName = None,
    fit: Fit = None,
    what_if: WhatIf = False,
    explain: Explain = False,
    validate: Validate = False,
    html: Html = None,
    snapshot: Snapshot = None,
    snapshot_diff: SnapshotDiff = None,
    force: Force = False,
    keys: Keys = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Predict the memory of a training step.

    The trainer's own step is simulated, for this machine or for a GPU that is not there; nothing is allocated. Exit
    codes: 0 it fits, 1 it does not, 2 a wrong command line, config or model, 3 the machine said no.
    """
    target, overrides = split_words(words)
    refuse_device(device, gpu)
    refuse_files({"--html": html, "--snapshot": snapshot}, force=force)

    # A real step is to meet the garbage collector as the trainer's does.
    with nullcontext() if validate else collecting_seldom():
        from bptool.analysis.memory.answers import Further, answer, ask

        with redirect_stdout(sys.stderr):  # what the user's own code prints is not our result
            question = ask(target, overrides, device=device, gpu=gpu, capacity=fit)
            limits = fit is not None
            further = Further(what_if, limits, explain, validate, snapshot_diff)
            result, step = answer(question, further)
        if html:
            _write_page(html, result, step)
        if snapshot:
            _write_snapshot(snapshot, step)
        typer.echo(result.json_text() if json else _text(result, step))
    if result.fits is False:
        raise typer.Exit(AnswerIsNo.exit_code)


def _write_page(path: Path, result: MemoryEstimate, step: Simulated) -> None:
    from bptool.analysis.memory.simulation import STEADY
    from bptool.analysis.memory.timeline import timeline
    from bptool.files import replace_text
    from bptool.report.memory.page import render_page

    command = shlex.join(["bptool", *sys.argv[1:]])
    asked = " ".join([result.target, *result.settings])
    replace_text(path, render_page(result, timeline(step.trace, STEADY), target=asked, command=command))
    say(f"wrote {path}")


def _write_snapshot(path: Path, step: Simulated) -> None:
    from bptool.analysis.memory.estimate_snapshot import write_snapshot

    write_snapshot(step.written_out()[0], path)
    say(f"wrote {path}: open it at pytorch.org/memory_viz, which reads it in the browser")


def _text(result: MemoryEstimate, step: Simulated) -> str:
    """The report with its picture, coloured where a person reads it."""

    from rich.console import Console

    from bptool.analysis.memory.simulation import STEADY
    from bptool.analysis.memory.timeline import timeline
    from bptool.report.memory.console import render
    from bptool.report.memory.picture import picture
    from bptool.report.text import terminal_width

    console = Console()
    width = min(terminal_width(unknown=80, least=1), 100)
    drawn = picture(timeline(step.trace, STEADY), width=width, colored=console.is_terminal and not console.no_color)
    with console.capture() as capture:
        console.print(drawn, end="", soft_wrap=True)
    return render(result, capture.get(), width)
