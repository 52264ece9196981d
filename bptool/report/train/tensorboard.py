"""A run in TensorBoard: scalars, sampled text, gradient histograms and hyper-parameters, in the run's own folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import summary as summaries

from bptool.config.keys import dotted
from bptool.config.schema import Config
from bptool.report.event_file import EventFile
from bptool.training.loop import Listener

# TensorBoard's own: a tenth wider each, over all that a gradient may be.
_POSITIVE_EDGES = 1e-12 * 1.1 ** np.arange(775)
_EDGES = [*-_POSITIVE_EDGES[::-1], 0.0, *_POSITIVE_EDGES]


class TensorBoard(Listener):
    """Writes events; the x axis is the optimizer step.

    Args:
        first_step: optimizer steps that are done already; what was written of later ones is forgotten.
    """

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        self._events = EventFile(folder, next_step=first_step + 1)
        self._config = config
        self._last: dict[str, float] = {}
        self._last_step = first_step

    def step_done(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the step's scalars."""
        self._events.write(_summary(scalars), step)
        self._last.update(scalars)
        self._last_step = step

    def sampled(self, step: int, text: str) -> None:
        """Write sampled text, as a block that keeps its line breaks."""
        block = "\n".join(f"    {line}" for line in text.split("\n"))
        self._events.write(summaries.text("sample", block), step)

    def gradient(self, name: str, gradient: torch.Tensor, step: int) -> None:
        """Write one gradient's histogram; a gradient that is not finite has none."""
        if torch.isfinite(gradient).all():
            values = gradient.float().cpu().numpy()
            self._events.write(summaries.histogram(f"gradients/{name}", values, _EDGES), step)

    def close(self) -> None:
        """Write the hyper-parameters beside the last figures, and close.

        The three summaries go into the run's own events: `SummaryWriter.add_hparams` would open a second run.
        """
        metrics = {f"hparam/{tag}": self._last[tag] for tag in ("train/loss", "val/loss") if tag in self._last}
        if metrics:
            for summary in summaries.hparams(_plain(dotted(self._config)), metrics):
                self._events.write(summary, self._last_step)
            self._events.write(_summary(metrics), self._last_step)
        self._events.close()


def _summary(scalars: Mapping[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])


def _plain(values: Mapping[str, object]) -> dict[str, bool | int | float | str]:
    return {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in values.items()}
