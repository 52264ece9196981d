"""The one place where errors become text and exit codes."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import typer

from bptool.errors import EXIT_DEFECT, EXIT_INTERRUPTED, EXIT_OK, BptoolError, EnvironmentFailure

Command = TypeVar("Command", bound=Callable[..., Any])


def guarded(command: Command) -> Command:
    """Wrap a command so that its errors are said in plain words; its `debug` argument asks for the traceback too."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output has seen enough. Python would fail once more when it flushes stdout at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_OK) from None
        except BaseException as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            raise typer.Exit(_explain(error)) from None

    return run  # type: ignore[return-value]


def say(words: str) -> None:
    """Words about the data, for the person at the terminal, if there still is one."""
    with suppress(BrokenPipeError):
        typer.echo(words, err=True)


def note(message: str) -> None:
    """Something that the user should know and that stops nothing."""
    say(f"note: {message}")


def _explain(error: BaseException) -> int:
    """Say what is wrong and what to do about it; returns the exit code."""
    if isinstance(error, BptoolError):
        say(f"error: {error.message}")
        if error.remedy:
            say("\n".join(f"  {line}" for line in error.remedy.splitlines()))
        return error.exit_code
    if isinstance(error, OSError | MemoryError):  # where nobody could say more about it
        say(f"error: the machine said no: {str(error) or type(error).__name__}")
        return EnvironmentFailure.exit_code
    say(f"error: bptool failed in a way it should not: {type(error).__name__}: {error}")
    say("  this is a defect of bptool; the same command with --debug shows where")
    return EXIT_DEFECT
