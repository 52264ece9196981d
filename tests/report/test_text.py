from __future__ import annotations

import pytest

from bptool.report.text import aligned, hanging, next_commands, one_of, quoted, visible


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


@pytest.mark.parametrize("width", [20, 60, 200])
def test_a_sentence_keeps_its_words_and_the_width(width: int) -> None:
    sentence = "outside of it: cuBLAS-workspaces and num_key_value_heads = 32, by PyTorch's account"
    lines = hanging(sentence, width).split("\n")
    assert " ".join(line.strip() for line in lines) == sentence
    assert all(len(line) <= max(width, 4 + len("num_key_value_heads")) for line in lines)
    assert [len(line) - len(line.lstrip()) for line in lines] == [2, *[4] * (len(lines) - 1)]


def test_next_commands() -> None:
    assert next_commands(["a b", "c"]) == "next:\n  a b\n  c"


@pytest.mark.parametrize(
    ("unit", "one"),
    [("tokens", "token"), ("micro-batches", "micro-batch"), ("images", "image"), ("boxes", "box"), ("data", "data")],
)
def test_one_of_many(unit: str, one: str) -> None:
    assert one_of(unit) == one
