"""The grid that a command line asks for: its rows, each a Question of its own, and those that cannot be asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bptool.analysis.machine import Machine
from bptool.analysis.question import Question, ask
from bptool.config.asked import read_command_line
from bptool.config.axes import Axis, labels, rows_of, setting, split_axes
from bptool.config.overrides import COMMAND_LINE, parse_overrides
from bptool.config.schema import Config
from bptool.config.target import CodeTarget, resolve_target
from bptool.errors import ConfigError, DeviceError, UsageError
from bptool.training.precision import Precision

_POLICY, _MODE = "activation_checkpoint.policy", "precision.mode"
_POLICIES = ("none", "save_matmuls", "full")
_OF_THE_TRANSFORMER = ("training.micro_batch_size", "training.sequence_length", "training.loss")
_FIRST_WITH_BF16 = (8, 0)
"""Compute capability: Ampere's."""


@dataclass(frozen=True)
class Row:
    """One setting of the grid.

    Attributes:
        settings: the axes' keys and this row's values.
        label: the same in few words.
        question: its step; None where there is none, and `reason` says why.
    """

    settings: dict[str, Any]
    label: str
    question: Question | None
    reason: str = ""


@dataclass(frozen=True)
class Grid:
    """All of them.

    Attributes:
        target, overrides: in the user's words, without the axes.
        name: what a file is named after.
    """

    target: str
    overrides: list[str]
    name: str
    axes: list[Axis]
    rows: list[Row]

    @property
    def question(self) -> Question:
        """The first row's that has one: what all of them have in common can be read there."""
        return next(row.question for row in self.rows if row.question)

    @property
    def machine(self) -> Machine:
        """The one that all rows are for."""
        return self.question.machine


def read_grid(target: str | None, words: Sequence[str], *, device: str = "auto", gpu: str | None = None) -> Grid:
    """The grid of a command line; without axes, a small one of policies and the precisions that the device can do.

    Args:
        device, gpu: as `ask` takes them.

    Raises:
        UsageError: a word or value is wrong, the user's model cannot be had, or no row's settings go together.
        DeviceError: the device can do none of the rows.
    """
    overrides, axes = split_axes(words)
    asker = _Asker(target, overrides, device, gpu)
    axes = axes or asker.usual_axes()
    asker.refuse(axes)
    typed = rows_of(axes)
    asked = [asker.ask([axis.override(row[axis.key]) for axis in axes]) for row in typed]
    if asker.first is None:
        raise ConfigError(COMMAND_LINE, list(dict.fromkeys(asker.problems)))
    if all(question is None for question, _ in asked):
        raise DeviceError("; ".join(dict.fromkeys(reason for _, reason in asked)), "none of the rows can be run here")
    settings = [{axis.key: setting(axis, row[axis.key]) for axis in axes} for row in typed]
    named = zip(settings, labels(settings), asked, strict=True)
    rows = [Row(values, label, question, reason) for values, label, (question, reason) in named]
    return Grid(asker.first.target, overrides, resolve_target(target).name, axes, rows)


class _Asker:
    """Asks for rows, all of them of one machine; a user's model is had once.

    Attributes:
        first: the first row's question that there is.
        problems: of all configs that are wrong.
    """

    def __init__(self, target: str | None, overrides: Sequence[str], device: str, gpu: str | None) -> None:
        self.first: Question | None = None
        self.problems: list[str] = []
        self._target, self._overrides, self._device, self._gpu = target, overrides, device, gpu

    def refuse(self, axes: Sequence[Axis]) -> None:
        """Axes that would change nothing, or everything."""
        problems = [problem for axis in axes for problem in self._pointless(axis)]
        if problems:
            raise ConfigError(COMMAND_LINE, problems)

    def usual_axes(self) -> list[Axis]:
        """What nobody asked for and everybody wants to know, but for what is settled already."""
        self.first = self._question(self._overrides)
        settled = parse_overrides(self._overrides)
        axes = [Axis(_POLICY, _POLICIES), Axis(_MODE, _modes(self.first.machine))]
        left = [axis for axis in axes if axis.key not in settled]
        if not left:
            raise UsageError(
                "there is one row only, and nothing to compare it with",
                "give a key several values, such as activation_checkpoint.policy=none,full",
            )
        return left

    def ask(self, words: Sequence[str]) -> tuple[Question | None, str]:
        """The question with these further overrides, or why there is none."""
        try:
            question = self._question([*self._overrides, *words])
        except ConfigError as error:
            self.problems += error.problems
            return None, "; ".join(error.problems)
        self.first = self.first or question
        reason = unsupported(question.config, question.machine)
        return (None, reason) if reason else (question, "")

    def _question(self, overrides: Sequence[str]) -> Question:
        if self.first is None:
            return ask(self._target, overrides, command="compare", device=self._device, gpu=self._gpu)
        if self.first.code is None:
            question = ask(self._target, overrides, command="compare", device=self._device, gpu=self._gpu)
            return replace(question, machine=self.first.machine)
        asked = read_command_line(self._target, overrides, command="compare")
        return replace(self.first, settings=asked.overrides, config=asked.config)

    def _pointless(self, axis: Axis) -> Iterator[str]:
        if axis.key == "training.device":
            yield "training.device: all rows are run on one device; compare devices with a file each, by --device"
        elif axis.key.startswith("run.") and axis.key != "run.seed":
            yield f"{axis.key}: names a run, and changes nothing that is compared"
        elif isinstance(resolve_target(self._target), CodeTarget) and axis.key in _OF_THE_TRANSFORMER:
            yield f"{axis.key}: {self._target} brings its own batches and loss, and this changes nothing there"


def unsupported(config: Config, machine: Machine) -> str:
    """Why the machine cannot do this precision; empty where it can."""
    try:
        Precision(config.precision, torch.device(machine.device))
    except DeviceError as error:
        return error.message
    gpu, mode = machine.gpu, config.precision.mode
    if gpu and gpu.capability < _FIRST_WITH_BF16 and (mode == "tf32" or mode.startswith("bf16")):
        has = ".".join(map(str, gpu.capability))
        return f"precision.mode = '{mode}' needs compute capability 8.0; {gpu.name} has {has}"
    return ""


def _modes(machine: Machine) -> tuple[str, ...]:
    if machine.gpu is None:
        return "fp32", "bf16-mixed"
    return ("fp32", "tf32", "bf16-mixed") if machine.gpu.capability >= _FIRST_WITH_BF16 else ("fp32", "fp16-mixed")
