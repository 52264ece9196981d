"""The page of a comparison in a real browser: it loads alone, is read out, and its table is put in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from comparisons import HOSTILE, hostile_comparison, large_comparison, mixed_comparison, small_comparison
from headless_browser import Browser, Tab

from bptool.analysis.compare.result import CompareResult
from bptool.report.compare.page import render_page
from bptool.units import format_bytes

ENTER, SPACE = ("Enter", 13), (" ", 32)


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Callable[..., Tab]:
    def open_page(result: CompareResult, **options: bool | int) -> Tab:
        file = tmp_path / "compare.html"
        file.write_text(render_page(result, command="bptool compare"), "utf-8")
        tab = Tab(browser, **options)  # type: ignore[arg-type]
        tab.open(file)
        return tab

    return open_page


def order(tab: Tab) -> list[int]:
    found = tab.value("[...document.querySelectorAll('.sortable tbody tr')].map(r => Number(r.cells[0].textContent))")
    return [int(number) for number in found]


def head(tab: Tab, name: str) -> str:
    """The selector of a column's button."""
    number = tab.value(f"[...document.querySelectorAll('.sorts')].findIndex(e => e.textContent === '{name}')")
    return f".sortable thead th:nth-child({number + 1}) button"


def sorted_by(tab: Tab) -> list[tuple[str, str]]:
    found = tab.value(
        "[...document.querySelectorAll('[aria-sort]')].map(e => [e.innerText, e.getAttribute('aria-sort')])"
    )
    return [(name, direction) for name, direction in found]


@pytest.mark.parametrize("result", [small_comparison(), large_comparison(3), mixed_comparison()])
def test_it_loads_nothing_and_complains_of_nothing(opened: Callable[..., Tab], result: CompareResult) -> None:
    tab = opened(result)
    assert [address.rsplit("/", 1)[1] for address in tab.requests()] == ["compare.html"]
    assert tab.complaints() == []


def test_the_pointer_reads_out_a_row(opened: Callable[..., Tab]) -> None:
    result = small_comparison()
    tab = opened(result)
    hint = tab.text(".scatter .pointed-at")
    for i, row in enumerate(result.rows):
        tab.point_at(f".scatter .dot[aria-label^='Row {i + 1},']")
        said = tab.text(".scatter .pointed-at")
        assert row.measured_peak_bytes is not None
        for told in [*map(str, row.settings.values()), format_bytes(row.measured_peak_bytes), "tokens/s", "loss"]:
            assert told in said
    tab.point_at("h1")
    assert tab.text(".scatter .pointed-at") == hint
    tab.value("document.querySelector('.scatter .dot').focus()")
    assert tab.text(".scatter .pointed-at").startswith("Row ")
    assert tab.complaints() == []


def test_the_pointer_reads_out_a_bar(opened: Callable[..., Tab]) -> None:
    tab = opened(small_comparison())
    tab.point_at(".stack:nth-child(3)")
    assert tab.text(".stacks .pointed-at").startswith("3 · full · fp32: predicted peak 238.25 MiB")
    assert "activations 66.00 MiB" in tab.text(".stacks .pointed-at")
    tab.value("document.querySelector('.stack:nth-child(2)').focus()")
    assert tab.text(".stacks .pointed-at").startswith("2 · none · bf16-mixed")
    assert tab.complaints() == []


def test_a_click_puts_the_rows_in_order(opened: Callable[..., Tab]) -> None:
    result = mixed_comparison()
    tab = opened(result)
    without = [i + 1 for i, row in enumerate(result.rows) if row.status != "ok"]
    assert (order(tab), sorted_by(tab)) == (list(range(1, 12)), [("row", "ascending")])
    by_memory = sorted(range(1, 5), key=lambda n: result.rows[n - 1].measured_peak_bytes or 0)
    tab.point_at(head(tab, "measured peak"), click=True)
    assert (order(tab), sorted_by(tab)) == ([*by_memory, *without], [("measured peak", "ascending")])
    tab.point_at(head(tab, "measured peak"), click=True)
    assert (order(tab), sorted_by(tab)) == ([*by_memory[::-1], *without], [("measured peak", "descending")])
    tab.point_at(head(tab, "settings"), click=True)
    assert order(tab) == [4, 10, 8, 7, 11, 6, 9, 5, 2, 3, 1]
    tab.point_at(head(tab, "row"), click=True)
    assert (order(tab), sorted_by(tab)) == (list(range(1, 12)), [("row", "ascending")])
    assert tab.complaints() == []


def test_keys_put_the_rows_in_order(opened: Callable[..., Tab]) -> None:
    tab = opened(small_comparison())
    tab.value(f"document.querySelector('{head(tab, 'step')}').focus()")
    tab.press(*ENTER)
    assert (order(tab), sorted_by(tab)) == ([2, 6, 4, 1, 5, 3], [("step", "ascending")])
    assert tab.value("document.activeElement.textContent") == "step"
    tab.press(*ENTER)
    assert (order(tab), sorted_by(tab)) == ([3, 5, 1, 4, 6, 2], [("step", "descending")])


def test_without_a_script_all_is_there(opened: Callable[..., Tab]) -> None:
    tab = opened(small_comparison(), scripts=False)
    assert order(tab) == [1, 2, 3, 4, 5, 6]
    assert tab.value("document.querySelectorAll('.sorts:disabled').length") > 5
    assert tab.value("document.querySelectorAll('.dot title').length") == 6


@pytest.mark.parametrize("size", [360, 700, 800, 1280, 1600])
@pytest.mark.parametrize("result", [small_comparison(), large_comparison(3)])
def test_nothing_sticks_out_at_the_side(opened: Callable[..., Tab], result: CompareResult, size: int) -> None:
    tab = opened(result, width=size)
    assert tab.value("document.documentElement.scrollWidth") <= size


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_of_dots_do_not_touch(opened: Callable[..., Tab], dark: bool) -> None:
    """As the browser draws them, in both schemes and on a narrow screen too."""
    for size in (700, 1280):
        tab = opened(large_comparison(3), width=size)
        if dark:
            tab.dark()
        touching = tab.value(
            "(b => b.filter((x, i) => b.some((y, j) => i < j && x.left < y.right && y.left < x.right"
            " && x.top + 3 < y.bottom - 3 && y.top + 3 < x.bottom - 3)).length)"
            "([...document.querySelectorAll('.dot-name')].map(e => e.getBoundingClientRect()))"
        )
        assert touching == 0


def test_hostile_names_do_nothing(opened: Callable[..., Tab]) -> None:
    tab = opened(hostile_comparison())
    tab.point_at(".scatter .dot")
    assert HOSTILE in tab.text(".scatter .pointed-at")
    tab.point_at(head(tab, "settings"), click=True)
    assert tab.value("document.querySelectorAll('img').length") == 0
    assert len(tab.requests()) == 1
    assert tab.complaints() == []
