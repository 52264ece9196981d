"""The page's shell and parts: well-formed, escaped, and the figures where they belong."""

from __future__ import annotations

import json
import re
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given
from hypothesis import strategies as st
from web_page import WebPage, assert_stands_alone

from bptool.report.html.elements import data_block, element, markup
from bptool.report.html.page import page, section
from bptool.report.html.parts import (
    Column,
    Node,
    Piece,
    Tile,
    bar,
    bullets,
    command_line,
    meter,
    table,
    tiles,
    tree_table,
)

TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


def widths(root: Element, tag: str = "span") -> list[float]:
    styles = [found.get("style", "") for found in root.iter(tag)]
    return [float(width[1]) for style in styles if (width := re.search(r"width:([\d.]+)%", style))]


@given(text=TEXTS, attribute=TEXTS)
def test_whatever_a_text_holds_it_is_text(text: str, attribute: str) -> None:
    found = WebPage(markup(element("p", {"title": attribute}, "before ", element("b", None, text), text, " after")))
    assert [tag for tag, _ in found.elements] == ["p", "b"]
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)
    assert "".join(found.words) == f"before {shown}{shown} after"


def test_a_file_name_that_is_no_text_can_be_written() -> None:
    name = b"caf\xe9.toml".decode(errors="surrogateescape")
    text = page("profile", name, name, [element("p", {"title": name}, name)])
    assert "<h1>caf\\udce9.toml</h1>" in text
    assert text.encode("utf-8")


@given(value=st.recursive(TEXTS | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)))
def test_data_cannot_end_their_block(value: object) -> None:
    text = markup(data_block({"value": value}))
    inside = text.removeprefix('<script type="application/json">').removesuffix("</script>")
    assert "<" not in inside
    assert json.loads(inside) == {"value": value}


def test_a_page_stands_alone() -> None:
    text = page("profile", "<gpt2>", "on a & b", [section("One", "words"), bullets(["a", "b"])])
    assert_stands_alone(text)
    assert text.startswith("<!DOCTYPE html>\n")
    found = WebPage(text)
    assert {"<gpt2>", "<gpt2> · bptool profile", "on a & b", "One", "words"} <= set(found.words)
    assert ("html", {"lang": "en"}) in found.elements


def test_the_check_of_a_page_sees_what_it_looks_for() -> None:
    text = page("profile", "a", "b", [])
    for foreign in ('<img src="a.png">', '<a href="#x">x</a>', "<b>https://x</b>", '<b onclick="x()">x</b>'):
        with pytest.raises(AssertionError):
            assert_stands_alone(text.replace("<header>", f"{foreign}<header>"))
    for broken in ("<p>", "</p>", "<b><i></b></i>"):
        with pytest.raises(AssertionError):
            WebPage(text.replace("<header>", f"{broken}<header>"))
    with pytest.raises(AssertionError):
        assert_stands_alone(text.replace("default-src 'none'", "default-src *"))


def test_tiles() -> None:
    found = WebPage(markup(tiles([Tile("peak", "1 GiB", "in the forward"), Tile("parameters", "5")])))
    assert found.words == ["peak", "1 GiB", "in the forward", "parameters", "5"]
    assert [tag for tag, _ in found.elements].count("dd") == 3  # the second has no note


def test_a_table_names_its_rows_and_columns() -> None:
    columns = [Column("name"), Column("size", "number")]
    found = table(columns, [["a", "1"], ["b", "2"]], emphasized=1)
    assert [(th.text, th.get("scope")) for th in found.iter("th")] == [
        ("name", "col"),
        ("size", "col"),
        ("a", "row"),
        ("b", "row"),
    ]
    assert [(td.text, td.get("class")) for td in found.iter("td")] == [("1", "number"), ("2", "number")]
    assert [tr.get("class") for tr in found.iter("tr")] == [None, None, "emphasized"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        table([Column("a"), Column("b")], [["1"]])


def test_a_bar_is_as_long_as_its_share() -> None:
    assert [widths(bar(share)) for share in (0, 0.25, 1, 1.5, -1)] == [[0], [25], [100], [100], [0]]


def test_a_meter_within_its_limit() -> None:
    found = meter([Piece("a", 1, "c-a"), Piece("b", 2, "c-b")], 4, "capacity")
    assert widths(found) == [25, 50]
    assert "left:100.000%" in markup(found)
    assert WebPage(markup(found)).words == ["a", "b", "capacity"]


def test_a_meter_past_its_limit() -> None:
    found = meter([Piece("a", 6, "c-a"), Piece("b", 2, "c-b")], 4, "capacity")
    assert widths(found) == [75, 25]
    assert "left:50.000%" in markup(found)


def test_a_meter_without_a_limit() -> None:
    found = meter([Piece("a", 1, "c-a"), Piece("b", 3, "c-b")], None, "")
    assert widths(found) == [25, 75]
    assert "limit" not in markup(found)


def test_a_tree_is_open_to_the_levels_asked_for() -> None:
    leaf = Node("leaf", [["1"]])
    root = Node("root", [["3"]], [Node("branch", [["2"]], [Node("twig", [["1"]], [leaf])]), leaf])
    columns = [Column("module"), Column("bytes", "number")]
    for levels, opened in ((1, []), (2, ["root"]), (3, ["root", "branch"]), (9, ["root", "branch", "twig"])):
        found = tree_table(columns, root, levels)
        names = [(d.findtext("summary/span/code"), d.get("open")) for d in found.iter("details")]
        assert [name for name, is_open in names if is_open is not None] == opened
        assert [name for name, _ in names] == ["root", "branch", "twig"]
    assert WebPage(markup(found)).words[3:] == ["root", "3", "branch", "2", "twig", "1", "leaf", "1", "leaf", "1"]


def test_a_command() -> None:
    assert WebPage(markup(command_line("bptool train 'a b'"))).words == ["bptool train 'a b'"]
