"""What an analysis is asked: whose step, with which settings, on which machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bptool.analysis.machine import Machine, machine_named
from bptool.config.asked import read_command_line
from bptool.config.schema import Config
from bptool.config.target import CodeTarget
from bptool.training.user_code import load_workload
from bptool.training.workload import Workload, transformer_workload


@dataclass(frozen=True)
class Question:
    """A step to look at.

    Attributes:
        target, settings: in the user's words.
        code: where the user's own model is; None for the built-in transformer.
        assumptions: what was taken for granted to know the step, in sentences.
    """

    target: str
    settings: tuple[str, ...]
    config: Config
    workload: Workload
    machine: Machine
    code: CodeTarget | None = None
    assumptions: tuple[str, ...] = ()


def ask(
    target_text: str | None, overrides: Sequence[str], *, command: str, device: str = "auto", gpu: str | None = None
) -> Question:
    """The question that a command line asks.

    Args:
        command: its name, for messages.
        device, gpu: as `machine_named` takes them; `training.device` says where `device` is `auto`.

    Raises:
        UsageError: the command line or the config is wrong, or the user's model cannot be had.
    """
    asked = read_command_line(target_text, overrides, command=command)
    named = asked.config.training.device.partition(":")[0] if device == "auto" else device
    machine = machine_named(named, gpu)
    workload = load_workload(asked.code) if asked.code else transformer_workload(asked.config)
    return Question(asked.words, asked.overrides, asked.config, workload, machine, asked.code, asked.notes)
