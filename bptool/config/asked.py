"""What a command line asks about: its TARGET, and the config that it makes with the KEY=VALUEs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bptool.config.loading import load
from bptool.config.schema import Config
from bptool.config.target import CodeTarget, Target, resolve_target
from bptool.errors import UsageError


@dataclass(frozen=True)
class Asked:
    """A target with its settings.

    Attributes:
        words, overrides: as the user typed them; the target's own name where nothing was typed.
        notes: what was taken for granted to make the config complete, in sentences.
    """

    words: str
    overrides: tuple[str, ...]
    target: Target
    config: Config
    notes: tuple[str, ...] = ()

    @property
    def code(self) -> CodeTarget | None:
        """The user's own model; None for the built-in transformer."""
        return self.target if isinstance(self.target, CodeTarget) else None


def read_command_line(target_text: str | None, overrides: Sequence[str], *, command: str) -> Asked:
    """The target and config that a command line means.

    Args:
        command: `train`, `profile`, ...: for the remedy.

    Raises:
        UsageError: the config is wrong, or it names the user's own code, which is run only when it is the TARGET.
    """
    target = resolve_target(target_text)
    config, notes = load(target, overrides)
    if config.run.workload and not isinstance(target, CodeTarget):
        raise UsageError(
            f"{target} names the user's own model in run.workload, and code is run only when it is the TARGET",
            f"bptool {command} {config.run.workload}",
        )
    return Asked(target_text or target.name, tuple(overrides), target, config, notes)
