"""What a person reads of known bugs in a target's backward."""

from __future__ import annotations

from bptool.analysis.gradcheck.mutation.record import MutationCheck
from bptool.report.gradcheck.mutations import mutations_text, summary

FOUND = [
    MutationCheck(
        name="wrong sign", op="MmBackward0[1]", module="a.b", outcome="caught", relative_error=2.0, tensor="w"
    ),
    MutationCheck(name="transposed", op="MmBackward0[0]", outcome="no_effect", detail="the gradient stays the same"),
    MutationCheck(
        name="rounded to float32", op="F", outcome="missed", relative_error=2e-8, tensor="w", detail="why it is missed"
    ),
    MutationCheck(name="a", op="gelu", outcome="not_applicable", detail="gelu is not called"),
    MutationCheck(name="b", op="gelu or relu", outcome="not_applicable", detail="gelu or relu is not called"),
    MutationCheck(name="c", outcome="not_applicable", detail="no gradient has a shape for it"),
]


def test_what_is_missed_comes_first_with_the_reason() -> None:
    lines = mutations_text(FOUND).splitlines()
    assert lines[0] == (
        "mutations: of 2 known bugs that change the gradient the check catches 1"
        " (1 change nothing here, 3 do not apply)"
    )
    assert lines[2].split() == ["rounded", "to", "float32", "missed", "2.0e-08", "F;", "why", "it", "is", "missed"]
    assert lines[3].split() == ["wrong", "sign", "caught", "2.0e+00", "MmBackward0[1]", "in", "a.b"]
    assert lines[4].split()[:3] == ["transposed", "no", "effect"]


def test_what_does_not_apply_is_told_once() -> None:
    assert mutations_text(FOUND).splitlines()[-2:] == [
        "  not applicable: 2 bugs of functions that it does not call (gelu, relu)",
        "  not applicable: c: no gradient has a shape for it",
    ]


def test_nothing_is_said_of_what_is_not_there() -> None:
    assert summary(FOUND[:1]) == "of 1 known bugs that change the gradient the check catches 1"
