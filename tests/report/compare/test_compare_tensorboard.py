"""A comparison in TensorBoard, read back by TensorBoard's own readers, those of its HParams tab among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from comparisons import comparison, failed_row, hostile_comparison, measured_row, mixed_comparison, small_comparison
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from bptool.analysis.compare.result import CompareRow
from bptool.errors import StorageError
from bptool.report.compare.tensorboard import folder_name, write_rows
from bptool.units import GIB

METRICS = {
    *("memory/peak_allocated_gib", "perf/step_s", "perf/tokens_per_s", "perf/recompute_flops_share"),
    *("gradients/relative_error", "train/loss"),
}


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def session_groups(
    folder: Path, statuses: Sequence[int] = (api_pb2.STATUS_SUCCESS,)
) -> tuple[api_pb2.Experiment, list[api_pb2.SessionGroup]]:
    """The HParams tab's columns and rows, as its server works them out."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = Context(TBContext(data_provider=provider, logdir=str(folder)))
    request_context, identity = RequestContext(), ""
    experiment = context.experiment_from_metadata(
        request_context,
        identity,
        True,
        context.hparams_metadata(request_context, identity),
        context.hparams_from_data_provider(request_context, identity, 0),
    )
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=1000,
        include_metrics=True,
        allowed_statuses=statuses,
        col_params=[api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos],
    )
    groups = Handler(request_context, context, identity, request).run().session_groups
    return experiment, list(groups)


def expected(row: CompareRow) -> dict[str, float | None]:
    assert row.step_s is not None
    assert row.measured_peak_bytes is not None
    return {
        "memory/peak_allocated_gib": row.measured_peak_bytes / GIB,
        "perf/step_s": row.step_s.median,
        "perf/tokens_per_s": row.tokens_per_s,
        "perf/recompute_flops_share": row.recompute_flops_share,
        "gradients/relative_error": row.gradient_relative_error,
        "train/loss": row.final_loss,
    }


def value(group: api_pb2.SessionGroup, key: str) -> object:
    found = group.hparams[key]
    return getattr(found, found.WhichOneof("kind"))


def test_each_row_is_a_run_with_its_figures(tmp_path: Path) -> None:
    result = small_comparison()
    write_rows(tmp_path / "new" / "folder", result)
    folders = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert folders[1] == "02-none-bf16-mixed"
    assert len(folders) == 6
    for row, name in zip(result.rows, folders, strict=True):
        board = read(tmp_path / "new" / "folder" / name)
        assert set(board.Tags()["scalars"]) == METRICS
        figures = {tag: board.Scalars(tag) for tag in METRICS}
        assert {tag: [event.value for event in events] for tag, events in figures.items()} == {
            tag: [pytest.approx(figure)] for tag, figure in expected(row).items()
        }


def test_the_hparams_of_a_run(tmp_path: Path) -> None:
    result = small_comparison()
    write_rows(tmp_path, result)
    for i, row in enumerate(result.rows):
        content = read(tmp_path / folder_name(i, row)).PluginTagToContent(metadata.PLUGIN_NAME)
        tags = {metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG}
        assert set(content) == tags
        start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
        assert (
            start.hparams["activation_checkpoint.policy"].string_value == row.settings["activation_checkpoint.policy"]
        )
        assert start.hparams["training.micro_batch_size"].number_value == 1
        end = metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG])
        assert end.status == api_pb2.STATUS_SUCCESS


def test_the_tab_sets_all_rows_side_by_side(tmp_path: Path) -> None:
    result = small_comparison()
    write_rows(tmp_path, result)
    experiment, groups = session_groups(tmp_path)
    assert {info.name.tag for info in experiment.metric_infos} == METRICS
    assert {info.name for info in experiment.hparam_infos} == set(result.rows[0].settings)
    rows = {
        (value(g, "activation_checkpoint.policy"), value(g, "precision.mode")): {
            metric.name.tag: metric.value for metric in g.metric_values
        }
        for g in groups
    }
    assert rows == {
        (row.settings["activation_checkpoint.policy"], row.settings["precision.mode"]): {
            tag: pytest.approx(figure) for tag, figure in expected(row).items()
        }
        for row in result.rows
    }


def test_keys_and_kinds_that_differ_between_rows(tmp_path: Path) -> None:
    """Whichever run TensorBoard reads first, it learns of every key; a key of two kinds holds words."""
    rows = [
        measured_row("none", "fp32").model_copy(update={"settings": settings})
        for settings in ({"a": 1, "b": True}, {"a": "auto", "c": None}, {"a": False, "d": [1, 2]})
    ]
    write_rows(tmp_path, comparison(rows))
    experiment, groups = session_groups(tmp_path)
    assert {info.name: info.type for info in experiment.hparam_infos} == {
        "a": api_pb2.DATA_TYPE_STRING,
        "b": api_pb2.DATA_TYPE_FLOAT64,  # torch's hparams takes a bool for a number
        "c": api_pb2.DATA_TYPE_STRING,
        "d": api_pb2.DATA_TYPE_STRING,
    }
    assert {value(group, "a") for group in groups} == {"1", "auto", "false"}


def test_rows_without_figures_have_settings_alone(tmp_path: Path) -> None:
    result = mixed_comparison()
    write_rows(tmp_path, result)
    failed = read(tmp_path / folder_name(5, result.rows[5]))
    assert failed.Tags()["scalars"] == []
    assert metadata.SESSION_START_INFO_TAG in failed.PluginTagToContent(metadata.PLUGIN_NAME)
    assert len(session_groups(tmp_path)[1]) == 4
    assert len(session_groups(tmp_path, [api_pb2.STATUS_FAILURE])[1]) == len(result.rows) - 4


def test_predicted_figures_where_nothing_was_run(tmp_path: Path) -> None:
    row = measured_row("full", "fp32").model_copy(update={"step_s": None, "measured_peak_bytes": None})
    result = comparison([measured_row("none", "fp32")], {"mode": "predict", "rows": [row]})
    write_rows(tmp_path, result)
    board = read(tmp_path / "01-full-fp32")
    assert row.predicted_peak_bytes is not None
    assert board.Scalars("memory/peak_allocated_gib")[0].value == pytest.approx(row.predicted_peak_bytes / GIB)
    assert board.Scalars("perf/step_s")[0].value == pytest.approx(row.predicted_step_s)


def test_written_again_it_replaces_what_was_there(tmp_path: Path) -> None:
    first, second = measured_row("none", "fp32"), measured_row("none", "fp32").model_copy(update={"final_loss": 9.0})
    for row in (first, second):
        for file in tmp_path.glob("*/events*"):  # as if it had been written in an earlier second
            file.rename(file.with_name("events.out.tfevents.0000000001.host.1.0"))
        write_rows(tmp_path, comparison([row]))
    assert len(list(tmp_path.glob("*/events*"))) == 2
    assert [event.value for event in read(tmp_path / "01-none-fp32").Scalars("train/loss")] == [9.0]


def test_folders_are_safe_and_unique() -> None:
    labels = ["../../etc/passwd", "a/b", "a b", "a b", "", "…", "x" * 500, "c:\\d", "-rf", "."]
    names = [folder_name(i, failed_row("failed").model_copy(update={"label": label})) for i, label in enumerate(labels)]
    assert len(set(map(str.lower, names))) == len(names)
    assert all(re.fullmatch(r"\d\d(-[A-Za-z0-9_=][A-Za-z0-9_.=-]*)?", name) and len(name) <= 80 for name in names)
    assert names[:5] == ["01-etc-passwd", "02-a-b", "03-a-b", "04-a-b", "05"]


def test_hostile_names_stay_inside(tmp_path: Path) -> None:
    write_rows(tmp_path / "here", hostile_comparison())
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert len(list((tmp_path / "here").iterdir())) == 2


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        write_rows(tmp_path / "file" / "folder", small_comparison())
