"""The grammar that all commands share: `bptool COMMAND [TARGET] [KEY=VALUE ...] [OPTIONS]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bptool.errors import UsageError


def _show_keys(asked: bool) -> None:
    if not asked:
        return
    from bptool.config.keys import all_keys, dotted, shown
    from bptool.config.schema import Config

    defaults = dotted(Config())
    for key, text in all_keys().items():
        typer.echo(f"{key} = {shown(defaults[key])}\n    {' '.join(text.split())}")
    raise typer.Exit


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TARGET|KEY=VALUE",
        help="TARGET is what to work on: a preset (tiny if none is given), a TOML file, a run's folder, a Hugging Face"
        " config.json or the folder that holds one, or FILE.py:NAME. KEY=VALUE sets a key of the config on top of it:"
        " optimizer.lr=3e-4.",
        show_default=False,
    ),
]
Keys = Annotated[
    bool,
    typer.Option(
        "--keys", callback=_show_keys, is_eager=True, help="List the config's keys with their defaults, and leave."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
GpuName = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="A GPU that need not be there, to predict for: h100, rtx4090, ..."),
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Timed steps.")]
WarmUp = Annotated[int, typer.Option("--warmup", metavar="N", help="Steps before them, which are not timed.")]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a page with pictures and tables: one file, to read offline."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there: FILE, or what DIR shows.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def split_words(words: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """TARGET (None where there is none) and the overrides; a word with `=` is an override unless such a file exists.

    Raises:
        UsageError: there is more than one TARGET.
    """
    overrides = [word for word in words or () if "=" in word and not Path(word).exists()]
    targets = [word for word in words or () if word not in overrides]
    if len(targets) > 1:
        raise UsageError(
            f"more than one TARGET: {', '.join(targets)}", "settings are KEY=VALUE, without spaces around '='"
        )
    return (targets[0] if targets else None), overrides
