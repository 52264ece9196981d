"""`python -m bptool`, and the console script."""

from __future__ import annotations

import io
import sys

from bptool.training.interruption import leave, watching


def main() -> None:
    """Run the command line: Ctrl-C is met from here on, and no terminal is too old for a text."""
    with watching(lambda number: leave("interrupted")):
        from bptool.cli.main import app

        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        app()


if __name__ == "__main__":
    main()
