"""The page of a check: it says what the record says, the worst first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gradcheck_records import HOSTILE, checked
from headless_browser import Browser, Tab
from web_page import WebPage

from bptool.report.gradcheck.page import render_page

COMMAND = "bptool gradcheck w --html w.html"


def words(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(WebPage(page).words))


@pytest.fixture(scope="module")
def text() -> str:
    return words(render_page(checked(), command=COMMAND))


def test_the_answer_comes_first_and_names_what_fails(text: str) -> None:
    answer = "Not right: w (wrong), identity clipping_norm, probe second_call."
    assert text.index(answer) < text.index("Tensor by tensor")
    right = checked().model_copy(update={"passed": True})
    assert "No gradient is wrong." in words(render_page(right, command=COMMAND))


def test_the_wrong_tensor_comes_first_and_where(text: str) -> None:
    table = text[text.index("Tensor by tensor") :]
    assert table.index("at [3, :]") < table.index("2.0e-08")
    assert "4 \u00d7 3 wrong 5.0e-01" in table


def test_the_lesson_has_the_models_figures_and_begins_with_what_fails(text: str) -> None:
    lesson = text[text.index("A lesson") : text.index("Where the gradient comes through")]
    assert lesson.index("clipping norm fails") < lesson.index("logits gradient holds")
    assert "What the model said minus what was right" in lesson
    assert "the figures of logits_gradient" in lesson


def test_each_block_has_two_bars_on_one_scale_the_last_block_first() -> None:
    page = render_page(checked(), command=COMMAND)
    part = page[page.index("Where the gradient comes through") : page.index("What else was tried")]
    assert re.findall(r"blocks\.\d(?=<)", part) == ["blocks.1", "blocks.0"]
    widths = re.findall(r'class="(c-\w+)" style="width:([\d.]+)%', part)
    assert widths == [("c-forward", "100.00"), ("c-dgrad", "12.50"), ("c-forward", "50.00"), ("c-dgrad", "25.00")]


def test_a_bug_that_is_missed_comes_first(text: str) -> None:
    part = text[text.index("Would it have caught a bug?") :]
    assert "of 2 known bugs that change the gradient the check catches 1 (1 do not apply)" in part
    assert part.index("rounded missed 2.0e-08") < part.index("wrong sign caught 2.0e+00")
    assert "1 bugs of functions that it does not call (gelu)" in part


def test_the_parts_of_the_time_add_up(text: str) -> None:
    assert "differences and probes 12.00 s" in text
    assert "identities 6.00 s" in text
    assert "known bugs 12.00 s" in text


def test_the_seed_is_in_the_command_that_repeats_it(text: str) -> None:
    assert f"{COMMAND} --seed 7" in text
    assert words(render_page(checked(), command="bptool gradcheck --seed 7")).count("--seed 7") == 1


def test_without_words_beside_the_tensors_there_is_no_column_for_them() -> None:
    whole = checked()
    right = whole.model_copy(update={"tensors": whole.tensors[:1]})

    def for_words(page: str) -> int:
        return sum(tag == "th" and attributes.get("class") == "words" for tag, attributes in WebPage(page).elements)

    assert for_words(render_page(whole, command="c")) == for_words(render_page(right, command="c")) + 1


class TestInABrowser:
    def test_it_loads_alone_and_complains_of_nothing(self, browser: Browser, tmp_path: Path) -> None:
        self._opened(browser, tmp_path, "w")

    @pytest.mark.parametrize("size", [360, 800, 1600])
    def test_nothing_sticks_out_at_the_side(self, browser: Browser, tmp_path: Path, size: int) -> None:
        tab = self._opened(browser, tmp_path, "a.name." * 12, width=size)
        assert tab.value("document.documentElement.scrollWidth") <= size

    def test_an_identity_folds(self, browser: Browser, tmp_path: Path) -> None:
        tab = self._opened(browser, tmp_path, "w")
        assert tab.value("document.querySelector('.told').open")
        tab.point_at(".told summary", click=True)
        assert not tab.value("document.querySelector('.told').open")

    def test_hostile_names_do_nothing(self, browser: Browser, tmp_path: Path) -> None:
        tab = self._opened(browser, tmp_path, HOSTILE)
        assert tab.value("document.querySelectorAll('img').length") == 0
        assert "<img" in tab.text("h1")

    @staticmethod
    def _opened(browser: Browser, folder: Path, name: str, **options: int) -> Tab:
        file = folder / "check.html"
        file.write_text(render_page(checked(name), command=name), "utf-8")
        tab = Tab(browser, **options)  # type: ignore[arg-type]
        tab.open(file)
        assert tab.requests() == [file.as_uri()]
        assert tab.complaints() == []
        return tab
