from __future__ import annotations

import pytest

from bptool.report.text import aligned, next_commands, one_of, quoted, visible


def test_columns_are_as_wide_as_the_longest_label() -> None:
    assert aligned([("a", "1"), ("long label", "2"), ("", "3")]) == "  a           1\n  long label  2\n              3"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, tab\tand\nline", "plain, tab\tand\nline"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x00\x0e\r\x7f\x9b", "\\x00\\x0e\\x0d\\x7f\\x9b"),
        ("naïve 日本語 \ufffd", "naïve 日本語 \ufffd"),
    ],
)
def test_no_control_character_reaches_a_terminal(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_quoted_text_keeps_its_lines_and_is_marked_on_each() -> None:
    assert quoted("def f():\n\n  pass") == "  | def f():\n  |\n  |   pass"
    assert quoted("one\x0bline\u2028only") == "  | one\\x0bline\u2028only"
    assert quoted("") == "  |"


def test_next_commands() -> None:
    assert next_commands(["a b", "c"]) == "next:\n  a b\n  c"


@pytest.mark.parametrize(
    ("unit", "one"),
    [("tokens", "token"), ("micro-batches", "micro-batch"), ("images", "image"), ("boxes", "box"), ("data", "data")],
)
def test_one_of_many(unit: str, one: str) -> None:
    assert one_of(unit) == one
