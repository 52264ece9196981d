"""What a person reads of a check of gradients."""

from __future__ import annotations

from typing import Any

import pytest

from bptool.analysis.gradcheck.result import Cost, GradcheckResult, ProbeCheck, TensorCheck
from bptool.report.gradcheck.console import render

COST = Cost(
    forward_s=0.5,
    backward_s=1.0,
    check_s=30.0,
    passes=20.0,
    forwards_count=60,
    finite_differences_forwards_count=2_000_000,
    finite_differences_s=1_000_000.0,
)


def tensor(name: str, verdict: Any, **more: Any) -> TensorCheck:
    return TensorCheck(name=name, kind="parameter", shape=[4, 3], verdict=verdict, **more)


def result(*tensors: TensorCheck, **more: Any) -> GradcheckResult:
    probes = more.pop("probes", [ProbeCheck(name="second_call", holds=True, detail="the same gradient")])
    passed = more.pop("passed", True)
    return GradcheckResult(
        target="m.py:f",
        settings=[],
        passed=passed,
        seed=7,
        tensors=list(tensors),
        identities=[],
        estimates=[],
        precision=None,
        probes=probes,
        checked_count=1_000_000,
        sizes_cut=more.pop("sizes_cut", []),
        assumptions=more.pop("assumptions", []),
        cost=COST,
    )


RIGHT = [tensor(f"w{i}", "right", relative_error=1e-10, detectable_relative_error=i * 1e-9) for i in range(20)]


def test_the_verdict_comes_first_and_many_right_tensors_are_one_line() -> None:
    text = render(result(*RIGHT))
    assert text.splitlines()[0] == "m.py:f: no gradient is wrong (20 right), seed 7"
    assert (
        "20 tensors are right: relative errors up to 1.0e-10; any error from 1.9e-08 on would have been caught" in text
    )
    assert "  w3 " not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_words_are_wrapped_to_the_width(width: int) -> None:
    words = "forward-mode jvp agrees with the differences, so that it is the backward's formula which is wrong here"
    probe = ProbeCheck(name="second_call", holds=False, detail=f"{words} " * 3)
    shown = result(tensor("w", "wrong", relative_error=0.5, detail=words), probes=[probe], assumptions=[words])
    lines = render(shown, width=width).split("\n")
    assert [line for line in lines if len(line) > max(width, 71)] == []  # the table of figures is as wide as that
    assert " ".join(" ".join(lines).split()).count(words) == 5


def test_nobodys_words_steer_the_terminal() -> None:
    assert "\x1b" not in render(result(tensor("w\x1b[2J", "right")))


def test_few_right_tensors_are_shown_each() -> None:
    assert all(f"  w{i} " in render(result(*RIGHT[:5])) for i in range(5))


def test_wrong_tensors_come_first_and_are_named_last() -> None:
    zero = tensor("key.bias", "structurally_zero", relative_error=0.0)
    wrong = tensor("w", "wrong", relative_error=0.5, location="[3, :]", cut_by="detach", detail="it is zero")
    lines = render(result(zero, wrong, *RIGHT[:2], passed=False)).splitlines()
    table = [line.split()[0] for line in lines if line.startswith("  ")]
    assert table[:2] == ["w", "key.bias"]
    assert any("at [3, :]; cut by detach; it is zero" in line for line in lines)
    assert lines[-1] == "not right: w (wrong)"


def test_a_probe_that_fails_is_shown_first_and_named() -> None:
    probes = [ProbeCheck(name="rng_replay", holds=True), ProbeCheck(name="second_call", holds=False, detail="why")]
    text = render(result(*RIGHT, probes=probes, passed=False))
    assert text.index("second call") < text.index("rng replay")
    assert text.splitlines()[-1] == "not right: probe second_call"


def test_cost_cuts_and_what_is_left_out() -> None:
    text = render(result(*RIGHT, sizes_cut=["model.d_model from 768 to 96"], assumptions=["w: row 0 is left out"]))
    assert "made smaller for float64\n  model.d_model from 768 to 96" in text
    assert "  w: row 0 is left out" in text
    assert "11d 13h over all 1.00M numbers, 2.00M forwards" in text
    assert "30.00 s: as long as 20 forwards and backwards" in text


def test_the_next_command_repeats_the_seed_of_a_failure() -> None:
    assert "  bptool gradcheck m.py:f --seed 7" in render(result(tensor("w", "wrong"), passed=False))
