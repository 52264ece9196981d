"""`bptool train`: learn, and be able to stop and resume."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from bptool.cli.guard import guarded, note, say
from bptool.cli.words import Debug, Json, Keys, Words, split_words
from bptool.errors import EXIT_INTERRUPTED, UsageError

_EXAMPLE = """\b
Examples:
  bptool train
  bptool train gpt2 data.source=my_text.txt training.micro_batch_size=2
  bptool train --resume tiny training.steps=1200"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("train", epilog=_EXAMPLE)(train)


@guarded
def train(
    words: Words = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="Continue a run: its folder or its name.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a run of the same name.")] = False,
    keys: Keys = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model that can be stopped, killed and resumed.

    Its memory is predicted and measured. Exit codes: 0 done, 1 the loss or a gradient is no longer finite, 2 a wrong
    command line or config, 3 the machine said no (memory, disk, device), 130 stopped by Ctrl-C or SIGTERM.
    """
    target, overrides = split_words(words)
    if resume and force:
        raise UsageError("--resume and --force exclude each other", "--resume continues a run, --force overwrites it")

    from bptool.training.interruption import leave, watching
    from bptool.training.opening import open_new, open_resumed

    opened = open_resumed(resume, target, overrides, note) if resume else open_new(target, overrides, note, force=force)
    say(f"{opened.folder.path}: reading the data, predicting the memory")

    def interrupted(number: int) -> None:
        opened.folder.__exit__(KeyboardInterrupt, None, None)
        leave("interrupted")

    # What the user's own code prints must not end up in the middle of our result.
    with opened.folder, watching(interrupted), redirect_stdout(sys.stderr):
        from bptool.analysis.train import Trainer
        from bptool.report.train.console import render, render_plan
        from bptool.report.train.listeners import run_listeners
        from bptool.training.user_code import users_errors

        with users_errors(opened.code):
            trainer = Trainer(opened, note)
            say(render_plan(trainer.plan))
            with run_listeners(trainer, opened) as listeners:
                result = trainer.train(listeners)
    typer.echo(result.json_text() if json else render(result))
    if result.status == "interrupted":
        raise typer.Exit(EXIT_INTERRUPTED)
