"""The page of a profile, as text: its figures, its words, and that it stands alone."""

from __future__ import annotations

import pytest
from profile_records import HOSTILE, deep_profile, hostile_profile, small_profile
from web_page import WebPage, assert_stands_alone

from bptool.analysis.profile.result import ProfileResult
from bptool.report.profile.page import render_page
from bptool.units import format_duration, format_flops

PROFILES = [small_profile(), small_profile(recomputes=False), deep_profile(), hostile_profile()]


def rendered(profile: ProfileResult) -> str:
    return render_page(profile, command="bptool profile")


@pytest.mark.parametrize("profile", PROFILES, ids=["timed", "no recompute", "counted", "hostile"])
def test_it_stands_alone_and_is_small(profile: ProfileResult) -> None:
    text = rendered(profile)
    assert_stands_alone(text) if profile.target != HOSTILE else WebPage(text)
    assert len(text) < 2**19


def test_every_figure_is_there() -> None:
    profile = small_profile()
    words = WebPage(rendered(profile)).words
    assert profile.time is not None
    for said in [
        *(format_duration(d.median_s) for d in (profile.time.step, profile.time.forward, profile.time.backward)),
        *(format_flops(op.flops + op.pointwise_flops) for op in profile.ops if op.flops),
        *(one.name for one in profile.ratio_terms),
        *(one.counts for one in profile.conventions),
        *profile.assumptions,
        "The roofline of this machine",
    ]:
        assert said in words, said
    assert "The backward takes 2.30x the forward's time, and is 1.92x the forward in FLOPs." in words


def test_what_was_only_counted_has_no_times() -> None:
    words = WebPage(rendered(deep_profile())).words
    assert "It was counted; no step was run." in " ".join(words)
    assert "Where the time goes" not in words
    assert "Where the FLOPs go" in words
    assert "Nothing was timed" in " ".join(words)


def test_without_a_roofline_or_ops_there_is_no_plot() -> None:
    assert 'class="figure roofline"' in rendered(small_profile())
    assert 'class="figure roofline"' not in rendered(small_profile({"roofline": None}))
    assert 'class="figure roofline"' not in rendered(small_profile({"ops": []}))


def test_warnings_come_before_the_tables() -> None:
    words = WebPage(rendered(small_profile({"warnings": ["Few steps; --steps 30 narrows the interval."]}))).words
    assert words.index("Few steps; --steps 30 narrows the interval.") < words.index("One step, phase by phase")
