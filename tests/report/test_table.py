"""Tables keep to their width, and say what matters most in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.report.profile.sheets import adding_up
from bptool.report.scale import FLOP_UNITS, SECOND_UNITS, scale_of
from bptool.report.table import labelled, sentence, table

ROWS = [["thing", "a", "bb", "ccc"], ["one", "1", "", "3"], ["another", "10", "", "30"]]


def test_by_hand() -> None:
    assert table(ROWS, width=40, right=(1, 3)).split("\n") == [
        "thing       a  ccc",  # the third column is empty
        "  one       1    3",
        "  another  10   30",
    ]


def test_what_matters_less_goes_first_and_names_are_cut_last() -> None:
    def of(width: int) -> list[str]:
        return table(ROWS, width=width, right=(1, 3), leave_out=[(3,), (1,)]).split("\n")

    assert of(17) == ["thing       a", "  one       1", "  another  10"]
    assert of(12) == ["thing", "  one", "  another"]
    assert of(6) == ["th…g", "  one", "  an…r"]


def test_a_long_name_is_cut_in_its_middle_before_columns_go() -> None:
    rows = [["op", "time"], ["_scaled_dot_product_flash_attention_for_cpu_backward", "9.99 ms"]]
    assert table(rows, width=50, leave_out=[(1,)]).split("\n") == [
        "op                          time",
        "  _scaled_dot_prod…ackward  9.99 ms",
    ]


def test_sentences_are_wrapped_beside_or_below() -> None:
    rows = [["name", ""], ["a", "one two three four five six seven eight"], ["b", ""]]
    beside = ["name", "  a   one two three four five", "      six seven eight", "  b"]
    assert table(rows, width=32, words=True).split("\n") == beside
    below = ["name", "  a", "    one two three four five", "    six seven eight", "  b"]
    assert table(rows, width=28, words=True).split("\n") == below


CELLS = st.lists(st.lists(st.text("abc d", max_size=12), min_size=4, max_size=4), min_size=1, max_size=4)


@given(cells=CELLS, width=st.integers(40, 120))
def test_no_line_is_wider_than_asked(cells: list[list[str]], width: int) -> None:
    rows = [[cell[:8] for cell in row[:3]] + [" ".join(row)] for row in cells]
    text = table(rows, width=width, leave_out=[(2,), (1,)], words=True)
    assert max(map(len, text.split("\n"))) <= width
    names = [("a", " ".join(row)) for row in cells]
    assert max(map(len, labelled(names, width).split("\n"))) <= width
    assert max(map(len, sentence(" ".join(cells[0]), width).split("\n"))) <= width


@pytest.mark.parametrize(
    ("largest", "value", "expected"),
    [
        (6.027e9, 1.604e9, "MFLOP 1,604.00"),
        (9.99e12, 1e6, "GFLOP 0.00"),
        (1e13, 2.5e12, "TFLOP 2.50"),
        (0, 0, "FLOP 0"),
    ],
)
def test_one_unit_for_a_column(largest: float, value: float, expected: str) -> None:
    scale = scale_of(largest, FLOP_UNITS)
    assert f"{scale.unit} {scale.text(value)}" == expected


def test_seconds_have_units_too() -> None:
    assert [scale_of(s, SECOND_UNITS).unit for s in (100.0, 9.9, 0.01, 0.0099, 0.0)] == ["s", "ms", "ms", "µs", "µs"]


@given(
    values=st.lists(st.floats(-3, 3), max_size=12),
    digits=st.integers(1, 5),
)
def test_printed_terms_add_up_to_the_printed_sum(values: list[float], digits: int) -> None:
    total = round(sum(values), digits)
    printed = [round(float(text) * 10**digits) for text in adding_up(values, total, digits)]
    assert sum(printed) == round(total * 10**digits)
    assert all(abs(n - value * 10**digits) <= 1 + 1e-6 for n, value in zip(printed, values, strict=True))


def test_printed_terms_by_hand() -> None:
    """A third three times: rounded each by itself they would be 0.9."""
    assert adding_up([1 / 3, 1 / 3, 1 / 3], 1.0, 1) == ["+0.4", "+0.3", "+0.3"]
    assert adding_up([-0.25, 0.0, 0.5], 0.25, 2) == ["-0.25", "0.00", "+0.50"]
