"""The page of a memory estimate, as text: its figures, its words, and that it stands alone."""

from __future__ import annotations

from typing import Any

import pytest
from memory_estimates import HOSTILE, hostile_estimate, hostile_timeline, small_estimate, small_timeline
from web_page import WebPage, assert_stands_alone

from bptool.analysis.memory.result import Measured, MemoryEstimate, ModuleBytes
from bptool.report.memory.page import render_page
from bptool.units import format_bytes

COMMAND = "bptool memory-estimate tiny"


def rendered(estimate: MemoryEstimate) -> str:
    return render_page(estimate, small_timeline(), target="tiny", command=COMMAND)


def words(estimate: MemoryEstimate) -> list[str]:
    return WebPage(rendered(estimate)).words


def test_it_stands_alone_and_is_small() -> None:
    text = rendered(small_estimate())
    assert_stands_alone(text)
    assert len(text) < 2**20


def test_every_figure_is_there() -> None:
    estimate = small_estimate()
    found = words(estimate)
    for n_bytes in [
        estimate.peak_allocated_bytes,
        estimate.peak_reserved_bytes,
        *estimate.at_peak.model_dump().values(),
        *estimate.maximum.model_dump().values(),
        *(peak.peak_allocated_bytes for peak in estimate.phase_peaks),
        *(change.peak_allocated_bytes for change in estimate.what_if),
    ]:
        assert format_bytes(n_bytes) in found
    for said in ["tiny", COMMAND, "one training step on cpu", "equal to the byte", *estimate.assumptions]:
        assert said in found
    assert {"forward", "backward", "recompute", "clip", "optimizer"} <= set(found)


@pytest.mark.parametrize(
    ("capacity", "fits", "verdict"),
    [
        (2**30, True, "It fits: 12.00 KiB of 1.00 GiB."),
        (2**12, False, "It does not fit: it needs 12.00 KiB, and there are 4.00 KiB."),
        (None, None, "It needs 12.00 KiB."),
    ],
)
def test_the_answer_comes_first(capacity: int | None, fits: bool | None, verdict: str) -> None:
    changes = {"peak_allocated_bytes": 8192, "peak_reserved_bytes": 10240, "overhead_bytes": 2048}
    found = words(small_estimate({**changes, "capacity_bytes": capacity, "fits": fits}))
    assert found.index(verdict) == found.index("one training step on cpu") + 1
    assert ("left over" in found) == (fits is True)
    assert ("missing" in found) == (fits is False)


def test_a_capacity_is_drawn_where_it_is_within_view() -> None:
    peak = small_estimate().peak_allocated_bytes
    for capacity, is_drawn in ((peak // 2, True), (peak * 5 // 4, True), (peak * 40, False)):
        text = rendered(small_estimate({"capacity_bytes": capacity}))
        assert ('class="limit-line"' in text) == is_drawn


def test_changes_come_the_most_saving_first() -> None:
    estimate = small_estimate()
    found = words(estimate)
    best, second = "optimizer.name=sgd precision.mode=bf16", "optimizer.name=adafactor"
    assert found.index(best) < found.index(second)
    saved = format_bytes(estimate.peak_allocated_bytes - estimate.peak_allocated_bytes // 2)
    assert found[found.index(best) + 1 : found.index(second)] == [
        format_bytes(estimate.peak_allocated_bytes // 2),
        saved,
        "50.0%",
    ]


def test_modules_hold_what_is_inside_them() -> None:
    found = words(small_estimate())
    tree = found[found.index("Module by module") :]
    assert tree[tree.index("model") :][:3] == ["model", "10.00 KiB", "3.50 KiB"]
    assert tree[tree.index("blocks") :][:3] == ["blocks", "8.00 KiB", "3.00 KiB"]
    assert tree[tree.index("1") :][:6] == ["1", "4.00 KiB", "2.00 KiB", "attention", "4.00 KiB", "2.00 KiB"]


def test_layers_that_are_alike_say_how_many() -> None:
    layers = [ModuleBytes(name=f"blocks.{i}.norm", parameters_bytes=1024, activations_bytes=0) for i in range(3)]
    found = words(small_estimate({"modules": layers}))
    tree = found[found.index("model") :]
    assert tree[: tree.index("Assumptions") : 3] == ["model", "blocks", "0 to 2 (3 alike)", "norm"]
    assert tree[1] == "3.00 KiB"


def test_what_is_not_known_is_left_out() -> None:
    changes: dict[str, Any] = {
        "measured": None,
        "what_if": [],
        "modules": [],
        "assumptions": [],
        "capacity_bytes": None,
        "fits": None,
    }
    found = words(small_estimate(changes))
    for heading in ("measured peak", "What would change it", "Module by module", "Assumptions"):
        assert heading in words(small_estimate())
        assert heading not in found


def test_an_estimate_that_is_off_says_so() -> None:
    measured = Measured(peak_allocated_bytes=1000, relative_error=-0.0123)
    assert "the estimate is off by -1.23%" in words(small_estimate({"measured": measured}))


def test_an_estimate_says_what_it_was_extended_from() -> None:
    extended = small_estimate({"extrapolated_from_layers": [2, 3, 4]})
    assert "extended from models of 2, 3 and 4 layers" in " ".join(words(extended))
    assert "extended" not in " ".join(words(small_estimate()))


def test_names_are_text_whatever_they_are() -> None:
    text = render_page(hostile_estimate(), hostile_timeline(), target=HOSTILE, command=f"bptool {HOSTILE}")
    assert_stands_alone(text)
    page = WebPage(text)
    assert [tag for tag, _ in page.elements].count("script") == 2  # the chart's data, and the page's own
    assert page.words.count(HOSTILE) >= 3
    assert f"one training step on {HOSTILE}" in page.words


def test_a_model_without_parameters() -> None:
    empty = [ModuleBytes(name="", parameters_bytes=0, activations_bytes=0)]
    assert_stands_alone(rendered(small_estimate({"modules": empty, "peak_allocated_bytes": 0})))
