"""The icicle: slabs, read back, are as wide as their shares."""

from __future__ import annotations

import json
from xml.etree.ElementTree import Element

import pytest
from web_page import WebPage

from bptool.report.html.elements import markup
from bptool.report.html.icicle import Icicle, Slab, icicle

LEAF = Slab("leaf", "a.leaf", 10, [0, 10], [["1"], ["2"], ["3"]])
PICTURE = Icicle(
    identity="time",
    description="What takes how long.",
    root=Slab(
        "all",
        "everything",
        40,
        [30, 10],
        [["30 s"], ["10 s"], ["40 s"]],
        [
            Slab("a", "a", 20, [10, 10], [["10 s"], ["10 s"], ["20 s"]], [LEAF]),
            Slab("b", "b", 10, [10, 0], [["x"]] * 3),
        ],
    ),
    kinds=[("forward", "c-forward"), ("dgrad", "c-dgrad")],
    headings=["time"],
)


def slabs(figure: Element) -> list[Element]:
    return [svg for svg in figure.iter("svg") if svg.get("class") == "slab"]


def percent(element: Element, name: str) -> float:
    return float((element.get(name) or "0%").removesuffix("%"))


def test_by_hand() -> None:
    found = {s.findtext("title"): (percent(s, "x"), percent(s, "width"), s.get("y")) for s in slabs(icicle(PICTURE))}
    assert found == {
        "all: 100.0%": (0, 100, "0"),
        "a: 50.0%": (0, 50, "36"),
        "leaf: 25.0%": (0, 25, "72"),
        "b: 25.0%": (50, 25, "36"),
    }


def test_strips_are_shares_by_kind() -> None:
    root, _, leaf, b = slabs(icicle(PICTURE))

    def strips(slab: Element) -> list[tuple[str | None, float, float]]:
        found = [rect for rect in slab.iter("rect") if (rect.get("class") or "").startswith("strip")]
        return [(rect.get("class"), percent(rect, "x"), percent(rect, "width")) for rect in found]

    assert strips(root) == [("strip c-forward", 0, 75), ("strip c-dgrad", 75, 25)]
    assert strips(leaf) == [("strip c-dgrad", 0, 100)]
    assert strips(b) == [("strip c-forward", 0, 100)]


def test_the_read_out_without_a_script() -> None:
    words = [word for word in WebPage(markup(icicle(PICTURE))).words if word.strip()]
    begin = words.index("everything")
    assert words[begin - 1 :] == [
        *("all", "everything", "back to the whole", "time"),
        *("forward", "30 s", "dgrad", "10 s", "together", "40 s"),
    ]


def test_what_the_script_reads() -> None:
    (block,) = icicle(PICTURE).iter("script")
    data = json.loads(block.text or "")
    assert data["words"] == [["all 100.0%", "all"], ["a 50.0%", "a"], ["leaf 25.0%", "leaf"], ["b 25.0%", "b"]]
    assert (data["left"], data["width"], data["level"]) == ([0, 0, 0, 0.5], [1, 0.5, 0.25, 0.25], [0, 1, 2, 1])
    assert data["figures"][2] == [["1"], ["2"], ["3"]]


def test_names_that_do_not_fit_are_not_shown_and_specks_not_drawn() -> None:
    parts = [Slab(name, "", weight, [0, 0], [["x"]] * 3) for name, weight in (("wide", 90), ("mid", 4), ("narrow", 1))]
    speck = Slab("speck", "", 0.001, [0, 0], [["x"]] * 3)
    picture = Icicle("i", "", Slab("all", "", 100, [1, 1], [["x"]] * 3, [*parts, speck]), PICTURE.kinds, ["time"])
    found = {slab.findtext("title"): slab.findtext("text") for slab in slabs(icicle(picture))}
    assert found == {"all: 100.0%": "all 100.0%", "wide: 90.0%": "wide 90.0%", "mid: 4.0%": "mid", "narrow: 1.0%": ""}


def test_a_row_of_figures_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        icicle(Icicle("i", "", LEAF, PICTURE.kinds[:1], ["time"]))
