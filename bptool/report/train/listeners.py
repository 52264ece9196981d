"""What shows and writes a run while it goes on: the terminal, metrics.jsonl and TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from bptool.analysis.train import Trainer
from bptool.report.train.metrics_file import MetricsFile
from bptool.report.train.progress import progress_listener
from bptool.report.train.tensorboard import TensorBoard
from bptool.training.loop import Listener
from bptool.training.opening import OpenedRun


@contextmanager
def run_listeners(trainer: Trainer, opened: OpenedRun) -> Iterator[list[Listener]]:
    """The run's listeners, closed at the end however it comes."""
    with ExitStack() as stack:
        listeners: list[Listener] = [MetricsFile(opened.folder.metrics, trainer.first_step)]
        if opened.config.logging.tensorboard:
            board = TensorBoard(opened.folder.path, opened.config, trainer.first_step)
            trainer.write_gradient_histograms(board.gradient)
            listeners.append(board)
        listeners.append(progress_listener(trainer.plan.unit))
        for listener in listeners:
            stack.callback(listener.close)
        yield listeners
