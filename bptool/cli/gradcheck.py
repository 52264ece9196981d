"""`bptool gradcheck`: is my gradient right, and if not, which parameter and where?"""

from __future__ import annotations

import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bptool.cli.guard import guarded, note, say
from bptool.cli.refusals import refuse_files
from bptool.cli.words import Debug, Json, Keys, Words, split_words
from bptool.errors import AnswerIsNo

if TYPE_CHECKING:
    from bptool.analysis.gradcheck.result import GradcheckResult

_EXAMPLE = """\b
Examples:
  bptool gradcheck
  bptool gradcheck gpt2 model.dropout=0.1 --seed 7
  bptool gradcheck my_kernel.py:layer_norm --json
  bptool gradcheck tiny --precision bf16-mixed --html lesson.html
  bptool gradcheck my_kernel.py:layer_norm --mutate"""

Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Of the random directions; a fresh one if not given. It is printed."),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="MODE",
        help="Compare each gradient in this format with float64's too: fp32, tf32, bf16-mixed, bf16 or fp16-mixed.",
    ),
]
Mutate = Annotated[
    bool,
    typer.Option("--mutate", help="Put known bugs into the target's own backward, and tell which the check catches."),
]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a page: every verdict, and the identities as a lesson."),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("gradcheck", epilog=_EXAMPLE)(gradcheck)


@guarded
def gradcheck(
    words: Words = None,
    seed: Seed = None,
    precision: Precision = None,
    mutate: Mutate = False,
    html: Html = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    keys: Keys = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check every gradient against finite differences.

    In float64, with a verdict on each parameter and input, and the smallest error that would have been seen.
    The identities of backpropagation are checked, too, with their figures.
    FILE.py:NAME may return a GradientTarget(function, inputs) too. Exit codes: 0 all are right, 1 one is wrong,
    2 a wrong command line, config or target, 3 the machine said no.
    """
    target, overrides = split_words(words)
    refuse_files({"--html": html}, force=force)

    from bptool.analysis.gradcheck.answers import Listener, Wanted, answer
    from bptool.report.gradcheck.console import render
    from bptool.report.step_progress import counting_steps
    from bptool.report.text import WIDTH, terminal_width

    wanted = Wanted(precision=precision, mutate=mutate)
    with (
        redirect_stdout(sys.stderr),
        counting_steps("bug", before="checking") as done,
    ):  # what the user's own code prints is not our result
        result = answer(target, overrides, wanted, seed=seed, listener=Listener(_expected, done))
    if html:
        _write(html, result)
    width = terminal_width(unknown=WIDTH)
    typer.echo(result.json_text() if json else render(result, width=width))
    if not result.passed:
        raise typer.Exit(AnswerIsNo.exit_code)


def _write(file: Path, result: GradcheckResult) -> None:
    from bptool.files import replace_text
    from bptool.report.gradcheck.page import render_page

    replace_text(file, render_page(result, command=shlex.join(["bptool", *sys.argv[1:]])))
    say(f"wrote {file}")


def _expected(all_s: float, pass_s: float) -> None:
    """Before a long wait, how long it is and what makes it shorter."""
    from bptool.units import format_duration

    note(
        f"a forward and backward takes {format_duration(pass_s)} in float64, so this takes about"
        f" {format_duration(all_s)}; fewer layers or shorter inputs of the same kind have the same formulas"
    )
