"""A profile as text: the answer first, figures that add up, and no line too wide."""

from __future__ import annotations

import re

import pytest
from profile_records import HOSTILE, deep_profile, hostile_profile, small_profile

from bptool.analysis.profile.result import Duration, FiniteDifferences, ProfileResult
from bptool.report.profile.console import headline, render
from bptool.report.profile.page import render_page


def block(profile: ProfileResult, title: str, width: int = 100) -> list[str]:
    """The lines of one table, without its heading."""
    blocks = render(profile, width=width).split("\n\n")
    (found,) = (text for text in blocks if text.startswith(title))
    return found.split("\n")[1:]


def test_the_answer_is_first_and_the_next_command_last() -> None:
    lines = render(small_profile()).split("\n")
    assert lines[0].startswith("tiny on cpu: the backward takes 2.30x the forward's time [2.23 to 2.39], ")
    assert lines[-2:] == ["next:", "  bptool profile tiny --html profile.html --trace profile.json"]
    lines = render(deep_profile({"settings": ["precision.mode=bf16"]})).split("\n")
    assert lines[0].startswith("llama3-405b precision.mode=bf16 on h100, counted: the backward is ")
    assert lines[-1] == "  bptool memory-estimate llama3-405b precision.mode=bf16 --gpu h100"


def test_a_backward_with_recomputation_in_it_says_so_of_its_time_and_of_its_flops() -> None:
    """Where it was compiled into it; the FLOPs of one are then those of the other."""
    plain = small_profile()
    assert plain.time
    profile = small_profile({"time": plain.time.model_copy(update={"recompute": None}), "compiled": True})
    flops = plain.flops
    work = (flops.dgrad_flops + flops.wgrad_flops + flops.recompute_flops) / flops.forward_flops
    assert "the backward, recomputation included, takes 2.30x" in headline(profile)
    assert f"{work:.2f}x in FLOPs" in headline(profile)
    assert "recomputation included" not in headline(plain)
    page = render_page(profile, command="bptool profile")
    assert "The backward, recomputation included, takes" in page
    assert f"is {work:.2f}x the forward in FLOPs" in page


def test_what_was_gathered_before_an_interruption() -> None:
    lines = render(small_profile({"interrupted": True})).split("\n")
    assert "tiny on cpu, interrupted after 3 timed steps: the backward" in lines[0]
    assert lines[-1] == "  bptool profile tiny --steps 3"


def test_the_point_of_backpropagation() -> None:
    gpt2 = FiniteDifferences(
        parameters_count=124_439_808,
        gradients_s=1.31,
        forward_s=0.546,
        forwards=2.4,
        finite_differences_s=248_879_616 * 0.546,
    )
    words = " ".join(render(small_profile({"finite_differences": gpt2})).split())
    assert (
        "all 124,439,808 took 1.31 s, 2.4 forwards; finite differences would take 248,879,616 forwards, about 4.3 years"
        in words
    )


def test_where_nothing_was_timed_no_column_is_about_time() -> None:
    text = render(deep_profile())
    for absent in ("10% to 90%", "accounted for", "MFU  ", "by module  time", "s by module", "without FLOPs", "n/a"):
        assert absent not in text
    assert "at least" in text
    assert "TFLOP by module" in text


def test_a_kind_of_work_that_is_not_done_is_not_shown() -> None:
    assert "recompute" in render(small_profile())
    plain = render(small_profile(recomputes=False))
    assert "recompute  " not in plain
    assert "nothing is recomputed" in plain


@pytest.mark.parametrize("profile", [small_profile(), deep_profile()], ids=["timed", "counted"])
def test_terms_add_up_to_the_ratio_as_they_are_printed(profile: ProfileResult) -> None:
    *terms, together = block(profile, "why the ratio is")
    figures = [float(number) for line in terms for number in re.findall(r"(?<= )[+-]?\d\.\d{4}", line)]
    assert len(figures) == 1 + len(profile.ratio_terms)
    assert figures[0] == 2.0
    assert f"{sum(figures):.4f}" == together.split()[-1] == f"{profile.flops.backward_over_forward:.4f}"


def test_times_of_modules_add_up_to_what_was_measured() -> None:
    lines = block(small_profile(), "ms by module")
    root, (between, rest, measured) = lines[0], lines[-3:]
    parts = [float(line.split()[-2 if line is root else -1]) for line in (root, between, rest)]
    assert (between.split()[0], rest.split()[:2]) == ("outside", ["unexplained", "residual"])
    assert sum(parts) == pytest.approx(float(measured.split()[-1]), abs=0.02)


def test_alike_layers_share_a_line() -> None:
    assert [line.split("  ")[2] for line in block(small_profile(), "MFLOP by module")][2:3] == ["blocks.0 to 3"]


def test_time_without_flops_is_told_by_name() -> None:
    text = " ".join(render(small_profile()).split())
    assert "embedding_dense_backward wgrad 9.60 ms" in text
    assert "native_layer_norm forward, recompute 1.50 ms" in text
    assert "no product, 96.0 forwards of embedding" in text


def test_the_next_command_writes_what_was_not_asked_for_yet() -> None:
    def last(*given: str) -> str:
        return render(small_profile(), given=given).splitlines()[-1].strip()

    assert last("--html") == "bptool profile tiny --trace profile.json"
    assert last("--trace") == "bptool profile tiny --html profile.html"
    assert last("--trace", "--html") == "bptool memory-estimate tiny"


def test_the_ratio_of_times_that_compares_with_the_one_of_flops() -> None:
    profile = small_profile()
    assert profile.time is not None
    assert "early gradients" not in headline(profile)
    times = profile.time.model_copy(update={"backward_over_forward_by_kind": 1.987})
    said = headline(profile.model_copy(update={"time": times}))
    assert said.endswith("; with the loss's early gradients counted as backward: 1.99x in time")


def test_every_convention_and_the_headline_among_them() -> None:
    profile = small_profile()
    lines = block(profile, "MFU as others count", 160)
    assert [line.split("  ")[1] for line in lines] == [
        "parameters alone",
        "PaLM <- the headline",
        "causal",
        "executed",
    ]
    assert [re.findall(r"[\d.]+%", line) for line in lines] == [[f"{one.mfu:.1%}"] for one in profile.conventions]


def test_predicted_beside_measured() -> None:
    forward = next(line for line in block(small_profile(), "phase") if line.startswith("  forward"))
    profile = small_profile()
    assert profile.predicted is not None
    error = profile.predicted.phases[0].relative_error
    assert error is not None
    assert f"{error:+.1%}" in forward


def test_modules_without_gradients_are_listed_as_such() -> None:
    modules = small_profile().modules
    changed = [m.model_copy(update={"status": "frozen"}) if "norm" in m.name else m for m in modules]
    lines = block(small_profile({"modules": changed}), "modules without all of their gradients")
    assert [re.split("  +", line.strip()) for line in lines] == [
        ["never called", "probe"],
        ["frozen, a gradient passes through", "blocks.*.norm"],
    ]


def test_a_single_sample_has_no_spread() -> None:
    one = Duration(median_s=1.0, p10_s=1.0, p90_s=1.0, samples_s=[1.0])
    profile = small_profile()
    assert profile.time is not None
    time = profile.time.model_copy(update={"forward": one})
    (line,) = (row for row in block(small_profile({"time": time}), "phase") if row.startswith("  forward"))
    assert " to " not in line


@pytest.mark.parametrize("width", [40, 53, 80, 120, 200])
def test_no_line_is_too_wide(width: int) -> None:
    for profile in (small_profile(), deep_profile()):
        lines = render(profile, width=width).split("\n\nnext:")[0].split("\n")
        assert [line for line in lines if len(line) > width] == []


def test_names_cannot_steer_a_terminal() -> None:
    text = render(hostile_profile().model_copy(update={"target": "a\x1b[2Jb"}), picture="\x1b[1mdrawn\x1b[0m")
    assert text.count("\x1b") == 2  # the picture's own
    assert "a\\x1b[2Jb" in text
    assert HOSTILE[:12] in text
