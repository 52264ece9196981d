"""Sortable tables and stacked bars, as they read without a script."""

from __future__ import annotations

import pytest

from bptool.report.html.parts import Column, Piece
from bptool.report.html.sortable import Figure, sortable_table
from bptool.report.html.stacks import Stack, Stacks, stacked_bars

COLUMNS = [Column("row", "number"), Column("name"), Column("time", "number")]
ROWS = [
    [Figure("1", 1.0), Figure("b", "b"), Figure("2.00 s", 2.0, note="1.00×")],
    [Figure("2", 2.0), Figure("a", "a", kind="bad"), Figure("nan", float("nan"))],
    [Figure("3", 3.0), Figure("c", "c"), Figure("", None)],
]


def test_keys_that_order_a_table() -> None:
    table = sortable_table(COLUMNS, ROWS, emphasized=1)
    rows = list(table.iter("tr"))[1:]
    assert [[cell.get("data-key") for cell in row] for row in rows] == [
        *(["1.0", "b", "2.0"], ["2.0", "a", None], ["3.0", "c", None])
    ]
    assert [row.get("class") for row in rows] == [None, "chosen", None]
    assert [head.get("aria-sort") for head in next(table.iter("tr"))] == ["ascending", None, None]
    assert [button.get("disabled") for button in table.iter("button")] == ["", "", ""]
    assert rows[0][2][0].text == "1.00×"


BARS = Stacks(
    description="Two rows.",
    stacks=[
        Stack("1", "row 1", [Piece("a 30", 30.0, "c-a"), Piece("b 10", 10.0, "c-b")], "40", 50.0),
        Stack("2", "row 2", [Piece("a 20", 20.0, "c-a")], "20", None),
    ],
    kinds=[("a", "c-a"), ("b", "c-b")],
    mark_name="measured",
    limit=(25.0, "limit 25"),
    hint="Point.",
)


def test_bars_share_one_scale() -> None:
    """The longest reaches to the mark at 50, so one is 2%."""
    figure = stacked_bars(BARS)
    styles = [
        (span.get("class"), float((span.get("style") or "").split(":")[1].removesuffix("%")))
        for span in figure.iter("span")
        if span.get("style")
    ]
    assert styles == [
        *(("piece c-a", 60.0), ("piece c-b", 20.0), ("limit fit", 50.0), ("limit", 100.0)),
        *(("piece c-a", pytest.approx(40.0)), ("limit fit", 50.0)),
    ]
    words = list(figure.itertext())
    assert "measured" in words
    assert "limit 25" in words
