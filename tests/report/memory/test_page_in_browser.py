"""The page of a memory estimate in a real browser: it loads alone, is read out by pointer and keys, and folds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from headless_browser import Browser, Tab
from memory_estimates import HOSTILE, hostile_estimate, hostile_timeline, small_estimate, small_timeline

from bptool.report.memory.page import render_page
from bptool.report.text import place
from bptool.units import format_bytes

ARROW_RIGHT, ESCAPE, END, ENTER = ("ArrowRight", 39), ("Escape", 27), ("End", 35), ("Enter", 13)
SHOWN = "[...document.querySelectorAll('.tree .tree-row')].filter(e => e.checkVisibility()).length"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "estimate.html"
    path.write_text(render_page(small_estimate(), small_timeline(), target="tiny", command="bptool"), "utf-8")
    return path


@pytest.fixture
def opened(browser: Browser, file: Path) -> Callable[..., Tab]:
    """Opens the page; nothing may complain, whatever the test does."""

    def open_page(**options: bool | int) -> Tab:
        tab = Tab(browser, **options)  # type: ignore[arg-type]
        tab.open(file)
        return tab

    return open_page


def held(tab: Tab) -> str:
    return tab.text("[data-layer=total] td")


def test_it_loads_nothing_and_complains_of_nothing(opened: Callable[..., Tab], file: Path) -> None:
    tab = opened()
    assert tab.requests() == [file.as_uri()]
    assert tab.complaints() == []


def test_complaints_and_requests_are_seen(browser: Browser, tmp_path: Path) -> None:
    """The check above, on a page that breaks the rules."""
    file = tmp_path / "bad.html"
    text = render_page(small_estimate(), small_timeline(), target="tiny", command="bptool")
    file.write_text(text.replace("<header>", '<script>oops()</script><img src="other.png"><header>'), "utf-8")
    tab = Tab(browser)
    tab.open(file)
    told = str(tab.complaints())
    assert "oops is not defined" in told
    assert "Content Security Policy" in told


def test_the_pointer_reads_out_an_instant(opened: Callable[..., Tab]) -> None:
    tab, timeline = opened(), small_timeline()
    peak = timeline.points[timeline.peak]
    assert (tab.text(".moment"), held(tab)) == ("At the peak", format_bytes(peak.total_bytes))
    for across in (0.002, 0.3, 0.77, 0.998):
        index = next(i for i, edge in enumerate(timeline.edges[1:]) if across < edge)
        point = timeline.points[index]
        tab.point_at(".plot", across)
        assert tab.text(".moment") == "Here"
        assert tab.text(".place") == place(point.phase or "after the step", point.op, point.module)
        assert held(tab) == format_bytes(point.total_bytes)
        layers = [tab.text(f"[data-layer='{i}'] td") for i in range(len(point.held_bytes))]
        assert layers == [format_bytes(n_bytes) for n_bytes in point.held_bytes]
        assert tab.value("document.querySelectorAll('.details code').length") == 2 * len(point.largest)
        assert tab.value("document.querySelector('.crosshair').checkVisibility()")
    tab.point_at("h1")
    assert (tab.text(".moment"), held(tab)) == ("At the peak", format_bytes(peak.total_bytes))
    assert tab.complaints() == []


def test_the_script_writes_figures_as_the_page_does(opened: Callable[..., Tab]) -> None:
    tab = opened()
    figures = [0, 1, 1023, 1024, 1536, 7296, 7424, 7429, 2**20 - 1, 2**20, 123_456_789, 2**30, 3 * 2**40 + 2**38]
    assert tab.value(f"{figures}.map(formatBytes)") == [format_bytes(n_bytes) for n_bytes in figures]


def test_the_script_leaves_the_peak_as_it_was_written(opened: Callable[..., Tab]) -> None:
    scripted, plain = opened(), opened(scripts=False)
    assert scripted.text(".read-out") == plain.text(".read-out")


def test_a_click_keeps_an_instant(opened: Callable[..., Tab]) -> None:
    tab = opened()
    tab.point_at(".plot", 0.3, click=True)
    kept = tab.text(".place"), held(tab)
    tab.point_at(".plot", 0.8)
    tab.point_at("h1")
    assert (tab.text(".moment"), (tab.text(".place"), held(tab))) == ("Pinned", kept)
    tab.point_at(".release", click=True)
    assert tab.text(".moment") == "At the peak"
    assert tab.complaints() == []


def test_keys_walk_through_the_step(opened: Callable[..., Tab]) -> None:
    tab, timeline = opened(), small_timeline()
    assert tab.value("document.querySelector('.plot').getAttribute('role')") == "slider"
    tab.value("document.querySelector('.plot').focus()")
    tab.press(*ARROW_RIGHT)
    tab.press(*ARROW_RIGHT)
    point = timeline.points[timeline.peak + 2]
    said = f"{format_bytes(point.total_bytes)}, {place(point.phase or 'after the step', point.op, point.module)}"
    assert tab.value("document.querySelector('.plot').ariaValueText") == said
    tab.press(*END)
    assert held(tab) == format_bytes(timeline.points[-1].total_bytes)
    tab.press(*ESCAPE)
    assert tab.text(".moment") == "At the peak"
    assert tab.complaints() == []


def test_a_phase_shows_its_fullest_instant(opened: Callable[..., Tab]) -> None:
    tab, timeline = opened(), small_timeline()
    for phase, index in timeline.phase_peaks.items():
        tab.point_at(f"[data-instant='{index}']", click=True)
        assert held(tab) == format_bytes(timeline.points[index].total_bytes)
        if index != timeline.peak:
            assert tab.text(".place").startswith(phase)
    assert tab.complaints() == []


@pytest.mark.parametrize("scripts", [True, False])
def test_modules_fold(opened: Callable[..., Tab], scripts: bool) -> None:
    """By the mouse and the keyboard, with a script or none."""
    tab = opened(scripts=scripts)
    before = tab.value(SHOWN)
    tab.point_at("details details > summary", click=True)
    assert tab.value(SHOWN) == before + 2  # blocks: 0 and 1
    tab.value("document.querySelector('details details > summary').focus()")
    tab.press(*ENTER)
    assert tab.value(SHOWN) == before
    tab.press(*ENTER)
    assert tab.value(SHOWN) == before + 2


def test_all_modules_unfold_at_once(opened: Callable[..., Tab]) -> None:
    tab = opened()
    before = tab.value(SHOWN)
    tab.point_at(".unfold", click=True)
    assert tab.value(SHOWN) == tab.value("document.querySelectorAll('.tree .tree-row').length") > before
    tab.point_at(".unfold", click=True)
    assert tab.value(SHOWN) == before


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_sticks_out_at_the_side(opened: Callable[..., Tab], width: int) -> None:
    tab = opened(width=width)
    assert tab.value("document.documentElement.scrollWidth") <= width


def contrast(first: str, second: str) -> float:
    """Of two `rgb()` colours: the contrast ratio of the Web Content Accessibility Guidelines 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_words_can_be_read_in_both_schemes(opened: Callable[..., Tab], dark: bool) -> None:
    """4.5 to 1, what the guidelines ask for; and the schemes are two."""
    tab = opened()
    if dark:
        tab.dark()
    background = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (contrast(background, "rgb(0, 0, 0)") < contrast(background, "rgb(255, 255, 255)")) == dark
    for selector in ("body", ".muted", ".verdict", ".lead", ".limit-label", "button.shows"):
        colour = tab.value(f"getComputedStyle(document.querySelector('{selector}')).color")
        assert contrast(background, colour) >= 4.5, selector


def test_hostile_names_do_nothing(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "hostile.html"
    text = render_page(hostile_estimate(), hostile_timeline(), target=HOSTILE, command=HOSTILE)
    file.write_text(text, "utf-8")
    tab = Tab(browser)
    tab.open(file)
    tab.point_at(".plot", 0.4)
    assert tab.text("h1") == HOSTILE
    assert HOSTILE in tab.text(".place")
    assert HOSTILE in tab.text(".details")
    assert tab.value("document.querySelectorAll('img').length") == 0
    assert tab.requests() == [file.as_uri()]
    assert tab.complaints() == []
