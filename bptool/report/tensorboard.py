"""A run in TensorBoard: scalars, sampled text, gradient histograms and hyper-parameters, in the run's own folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from bptool.config.keys import dotted
from bptool.config.schema import Config
from bptool.training.loop import Listener


class TensorBoard(Listener):
    """Writes events; the x axis is the optimizer step.

    `purge_step` tells TensorBoard to forget what an earlier, killed sitting wrote beyond the step that is resumed from.
    """

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
        self._config = config
        self._last: dict[str, float] = {}

    def step_done(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the step's scalars."""
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        self._last.update(scalars)

    def sampled(self, step: int, text: str) -> None:
        """Write sampled text, as a block that keeps its line breaks."""
        self._writer.add_text("sample", "\n".join(f"    {line}" for line in text.splitlines()), step)

    def gradient(self, name: str, gradient: torch.Tensor, step: int) -> None:
        """Write one gradient's histogram; a gradient that is not finite has none."""
        if torch.isfinite(gradient).all():
            self._writer.add_histogram(f"gradients/{name}", gradient.float(), step)

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint is the moment up to which the curves must hold."""
        self._writer.flush()

    def close(self) -> None:
        """Write the hyper-parameters beside the last figures, and close.

        The three summaries go into the run's own events: `SummaryWriter.add_hparams` would open a second run.
        """
        metrics = {tag: self._last[tag] for tag in ("train/loss", "val/loss") if tag in self._last}
        writer = self._writer.file_writer
        if metrics and writer is not None:
            for summary in hparams(_plain(dotted(self._config)), {f"hparam/{t}": v for t, v in metrics.items()}):
                writer.add_summary(summary)
            for tag, value in metrics.items():
                self._writer.add_scalar(f"hparam/{tag}", value, self._config.training.steps)
        self._writer.close()


def _plain(values: Mapping[str, object]) -> dict[str, bool | int | float | str]:
    return {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in values.items()}
