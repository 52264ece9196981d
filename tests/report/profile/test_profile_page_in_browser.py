"""The page of a profile in a real browser: it loads alone, is read out, and widens what is clicked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from headless_browser import Browser, Tab
from profile_records import HOSTILE, hostile_profile, small_profile

from bptool.report.profile.cost_tree import cost_tree
from bptool.report.profile.page import render_page
from bptool.units import format_duration, format_flops

ENTER, ESCAPE = ("Enter", 13), ("Escape", 27)
DOWN, RIGHT, UP = ("ArrowDown", 40), ("ArrowRight", 39), ("ArrowUp", 38)
BY_TIME = "#by-time"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "profile.html"
    path.write_text(render_page(small_profile(), command="bptool profile"), "utf-8")
    return path


@pytest.fixture
def opened(browser: Browser, file: Path) -> Callable[..., Tab]:
    def open_page(**options: bool | int) -> Tab:
        tab = Tab(browser, **options)  # type: ignore[arg-type]
        tab.open(file)
        return tab

    return open_page


def slab(tab: Tab, name: str) -> str:
    """The selector of a module's slab in the picture by time."""
    number = tab.value(
        f"[...document.querySelectorAll('{BY_TIME} .slab')].findIndex(e =>"
        f" e.querySelector('title').textContent.startsWith('{name}:'))"
    )
    return f"{BY_TIME} [data-slab='{number}']"


def width(tab: Tab, name: str) -> float:
    return float(tab.value(f'document.querySelector("{slab(tab, name)}").width.baseVal.value'))


def read_out(tab: Tab) -> list[str]:
    cells = f"[...document.querySelectorAll('{BY_TIME} tbody td')].map(e => e.textContent)"
    found: list[str] = tab.value(cells)
    return [tab.text(f"{BY_TIME} .moment"), *found]


def expected(name: str) -> list[str]:
    """What the read-out says of a module of the record."""
    root = cost_tree(small_profile().modules).shortened()
    (node,) = [n for n in (root, *root.children, *(c for n in root.children for c in n.children)) if n.name == name]
    rows = zip((*node.flops, sum(node.flops)), (*node.seconds, sum(node.seconds)), strict=True)
    return [name, *(text for flops, seconds in rows for text in (format_flops(flops), format_duration(seconds)))]


def test_it_loads_nothing_and_complains_of_nothing(opened: Callable[..., Tab], file: Path) -> None:
    tab = opened()
    assert tab.requests() == [file.as_uri()]
    assert tab.complaints() == []


@pytest.mark.parametrize("scripts", [True, False])
def test_the_whole_is_read_out_at_first(opened: Callable[..., Tab], scripts: bool) -> None:
    assert read_out(opened(scripts=scripts)) == expected("model")


def test_the_pointer_reads_out_a_module(opened: Callable[..., Tab]) -> None:
    tab = opened()
    for name in ("up", "attention", "blocks.0 to 3"):
        tab.point_at(slab(tab, name))
        assert read_out(tab) == expected(name)
    tab.point_at("h1")
    assert read_out(tab) == expected("model")
    assert tab.complaints() == []


def test_a_click_widens_a_module_and_those_around_it(opened: Callable[..., Tab]) -> None:
    tab = opened()
    whole, before = width(tab, "model"), width(tab, "attention")
    assert before < whole / 4
    tab.point_at(slab(tab, "attention"), click=True)
    assert [width(tab, name) for name in ("attention", "blocks.0 to 3", "model")] == [pytest.approx(whole)] * 3
    assert not tab.value(f'document.querySelector("{slab(tab, "loss")}").checkVisibility()')
    assert read_out(tab)[0] == "attention"
    tab.point_at(f"{BY_TIME} .release", click=True)
    assert width(tab, "attention") == pytest.approx(before, abs=0.01)
    assert read_out(tab) == expected("model")
    assert tab.complaints() == []


def test_keys_walk_and_widen(opened: Callable[..., Tab]) -> None:
    tab = opened()
    tab.value(f"document.querySelector('{BY_TIME} .slabs').focus()")
    path = []
    for key in (DOWN, RIGHT, DOWN, RIGHT, UP):
        tab.press(*key)
        path.append(read_out(tab)[0])
    assert path == ["embedding", "blocks.0 to 3", "norm", "attention", "blocks.0 to 3"]
    tab.press(*ENTER)
    assert width(tab, "blocks.0 to 3") == pytest.approx(width(tab, "model"))
    tab.press(*ESCAPE)
    assert read_out(tab) == expected("model")
    assert tab.complaints() == []


@pytest.mark.parametrize("size", [600, 1160])
def test_names_are_shown_where_they_fit(opened: Callable[..., Tab], size: int) -> None:
    tab = opened(width=size)
    clipped = tab.value(
        f"[...document.querySelectorAll('{BY_TIME} .slab text')].filter(e =>"
        " e.getComputedTextLength() > e.parentNode.width.baseVal.value).length"
    )
    assert clipped == 0
    shown = tab.value(f"[...document.querySelectorAll('{BY_TIME} .slab text')].map(e => e.textContent)")
    assert "up 57.7%" in shown
    assert ("norm 8.6%" in shown, "attention" in shown) == (size > 1000, size < 1000)


def test_the_pointer_reads_out_an_operation(opened: Callable[..., Tab]) -> None:
    tab = opened()
    hint = tab.text(".pointed-at")
    tab.point_at(".dot[aria-label^='embedding_dense_backward']")
    assert tab.text(".pointed-at").startswith("embedding_dense_backward: wgrad, 1x, ")
    tab.point_at("h1")
    assert tab.text(".pointed-at") == hint
    assert tab.complaints() == []


@pytest.mark.parametrize("size", [360, 800, 1600])
def test_nothing_sticks_out_at_the_side(opened: Callable[..., Tab], size: int) -> None:
    tab = opened(width=size)
    assert tab.value("document.documentElement.scrollWidth") <= size


def test_hostile_names_do_nothing(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "hostile.html"
    file.write_text(render_page(hostile_profile(), command=HOSTILE), "utf-8")
    tab = Tab(browser)
    tab.open(file)
    tab.point_at(f"{BY_TIME} [data-slab='1']", click=True)
    assert tab.text("h1") == HOSTILE
    assert tab.value("document.querySelectorAll('img').length") == 0
    assert tab.requests() == [file.as_uri()]
    assert tab.complaints() == []
