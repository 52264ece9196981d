"""Every error that bptool raises on purpose, and the exit code that each one means.

    BptoolError
    ├── AnswerIsNo                 1    the question was answered, and the answer is no
    │   └── NonFiniteError              a loss or a gradient is NaN or infinite
    ├── UsageError                 2    the command line, a config, a target or its data is wrong
    │   ├── ConfigError                 all the mistakes of one config, together
    │   ├── TargetError                 the target cannot be found, or its own code failed
    │   ├── DataError                   a text, token file or tokenizer cannot be used
    │   └── ResumeError                 a run cannot be continued as asked
    └── EnvironmentFailure         3    the machine said no
        ├── DeviceError                 no such device, or it cannot do this precision
        ├── OutOfMemory                 host or device memory is exhausted
        ├── StorageError                no space, no permission, a file that cannot be read or written
        ├── RunInUse                    another process writes this run's folder
        └── CheckpointError             no valid checkpoint is left

    130 is an interrupted run (Ctrl-C, SIGTERM); 70 is a defect of bptool itself, so that a crash never reads as 1.

A message says what is wrong and where; `remedy` says what to do about it. Only `bptool.cli` turns them into text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import ClassVar

EXIT_OK = 0
EXIT_DEFECT = 70
EXIT_INTERRUPTED = 130


class BptoolError(Exception):
    """What a user can be told without a traceback.

    Args:
        message: what is wrong, and where (file, key, step).
        remedy: what to do about it; a command is given ready to paste.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class AnswerIsNo(BptoolError):
    """The question was answered, and the answer is no."""

    exit_code = 1


class NonFiniteError(AnswerIsNo):
    """A loss or a gradient is NaN or infinite; the update that it belongs to was not applied."""


class UsageError(BptoolError):
    """The command line, a config, a target or its data is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """All the mistakes of one config, together.

    Args:
        source: the file or command line that the settings came from.
        problems: one line for each mistake: the key, what was found, what is allowed.
    """

    def __init__(self, source: str, problems: Sequence[str], remedy: str = "") -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]), remedy)
        self.problems = tuple(problems)


class TargetError(UsageError):
    """The target cannot be found, or its own code failed."""


class DataError(UsageError):
    """A text, token file or tokenizer cannot be used."""


class ResumeError(UsageError):
    """A run cannot be continued as asked."""


class EnvironmentFailure(BptoolError):
    """The machine said no."""


class DeviceError(EnvironmentFailure):
    """No such device, or it cannot do what was asked."""


class OutOfMemory(EnvironmentFailure):
    """Host or device memory is exhausted."""


class StorageError(EnvironmentFailure):
    """No space, no permission, or a file that cannot be read or written."""


class RunInUse(EnvironmentFailure):
    """Another process writes this run's folder."""


class CheckpointError(EnvironmentFailure):
    """No valid checkpoint is left."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the allowed word that looks most like `word`, or nothing when none does."""
    candidates = list(allowed)
    matches = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if not matches:  # a whole dotted key can be far from `word` where its last part is near
        tails = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
        matches = [tails[m] for m in difflib.get_close_matches(word.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)]
    return f", did you mean '{matches[0]}'?" if matches else ""
