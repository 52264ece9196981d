"""`bptool export`: a run's model for `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bptool.cli.guard import guarded, note
from bptool.cli.words import Debug, Json

_EXAMPLE = """\b
Example:
  bptool export tiny exported/tiny"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("export", epilog=_EXAMPLE)(export)


@guarded
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name below runs/.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; made if it is not there.")],
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a run's newest model for transformers."""
    from bptool.analysis.export import export_run
    from bptool.config.schema import RunSettings
    from bptool.report.export import render
    from bptool.training.run_folder import find_run

    result = export_run(find_run(run, RunSettings().directory), folder, force=force, note=note)
    typer.echo(result.json_text() if json else render(result))
