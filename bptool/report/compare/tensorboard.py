"""A comparison in TensorBoard: a run for each row, whose settings and figures its HParams tab sets side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from torch.utils.tensorboard import summary as summaries

from bptool.analysis.compare.result import CompareResult, CompareRow
from bptool.files import writing
from bptool.report.event_file import EventFile
from bptool.units import gib

_METRICS = (
    "memory/peak_allocated_gib",
    "perf/step_s",
    "perf/tokens_per_s",
    "perf/recompute_flops_share",
    "gradients/relative_error",
    "train/loss",
)
_STEP = 1
_LONGEST_NAME = 80  # of a folder: file systems allow 255 bytes

_Plain = bool | int | float | str


def write_rows(folder: Path, result: CompareResult) -> None:
    """Write a run for each row into a folder of its own, such as `01-full-bf16-mixed`.

    What a row has no figure for is left out; a row that is not `ok` is a session that failed.

    TensorBoard takes the table's columns from whichever run it reads first, so each names those of all rows.

    Args:
        folder: made where there is none. Events that lie there already are out of sight.

    Raises:
        StorageError: it could not be written.
    """
    settings = _settings(result)
    everything = {key: value for row in settings for key, value in row.items()}
    experiment = summaries.hparams(everything, dict.fromkeys(_METRICS, 0.0))[0]
    for i, row in enumerate(result.rows):
        _, start, end = summaries.hparams(settings[i], {})
        end = end if row.status == "ok" else _failure()
        place = folder / folder_name(i, row)
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
        events = EventFile(place, next_step=_STEP)
        for summary in (experiment, start, end, _figures(result, row)):
            events.write(summary, _STEP)
        events.close()


def _failure() -> Summary:
    """In place of torch's own end of a session, which always succeeded."""
    info = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_FAILURE)
    content = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info))
    return Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=content)])


def folder_name(i: int, row: CompareRow) -> str:
    """The row's number and its label, in characters that any file system takes."""
    words = re.sub(r"[^A-Za-z0-9_.=]+", "-", row.label).strip("-.")
    return f"{i + 1:02d}-{words}"[:_LONGEST_NAME].rstrip("-.")


def _settings(result: CompareResult) -> list[dict[str, _Plain]]:
    """Each row's settings as TensorBoard takes them: a key whose values are of several kinds holds words."""
    kinds: dict[str, set[type]] = {}
    for row in result.rows:
        for key, value in row.settings.items():
            kinds.setdefault(key, set()).add(_kind(value))
    return [
        {key: v if len(kinds[key]) == 1 and _kind(v) is not object else _words(v) for key, v in row.settings.items()}
        for row in result.rows
    ]


def _kind(value: object) -> type:
    """Whole numbers and others are of one kind to TensorBoard; `object` is what it has no kind for."""
    if isinstance(value, bool | str):
        return type(value)
    return float if isinstance(value, int | float) else object


def _words(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _figures(result: CompareResult, row: CompareRow) -> Summary:
    figures = dict(zip(_METRICS, _amounts(result, row), strict=True))
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in _known(figures)])


def _amounts(result: CompareResult, row: CompareRow) -> Iterator[float | None]:
    """In the metrics' order; predicted ones where nothing was run."""
    measured = result.mode == "measure"
    peak = row.measured_peak_bytes if measured else row.predicted_peak_bytes
    yield None if peak is None else gib(peak)
    yield row.step_s.median if row.step_s else None if measured else row.predicted_step_s
    yield row.tokens_per_s
    yield row.recompute_flops_share
    yield row.gradient_relative_error
    yield row.final_loss


def _known(figures: Mapping[str, float | None]) -> Iterator[tuple[str, float]]:
    for tag, value in figures.items():
        if value is not None:
            yield tag, value
