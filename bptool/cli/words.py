"""The grammar that all commands share: `bptool COMMAND [TARGET] [KEY=VALUE ...] [OPTIONS]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bptool.errors import UsageError

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TARGET] [KEY=VALUE ...]",
        help="What to work on (a preset, a TOML file, a Hugging Face config.json or its folder, FILE.py:NAME; none is"
        " the preset tiny) and settings on top of it, such as optimizer.lr=3e-4.",
        show_default=False,
    ),
]
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
