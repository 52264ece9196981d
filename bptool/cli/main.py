"""`bptool`: the commands, each in its own file. Nothing here imports torch."""

from __future__ import annotations

import typer

from bptool import __version__
from bptool.cli import compare, export, gradcheck, memory_estimate, profile, sample, train

app = typer.Typer(
    name="bptool",
    help="See, predict, check and choose what backpropagation costs when you train a transformer.",
    epilog="""\b
Example, a first run that learns Python from its own standard library:
  bptool train""",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain: examples stay on their line, ready to paste
    pretty_exceptions_enable=False,
)
for command in (train, memory_estimate, profile, compare, gradcheck, sample, export):
    command.register(app)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bptool {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """The options that come before a command."""
