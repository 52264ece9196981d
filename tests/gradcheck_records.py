"""A check of gradients as a record, for whoever draws one."""

from __future__ import annotations

from typing import Any

from bptool.analysis.gradcheck.identities.identity import Identity
from bptool.analysis.gradcheck.mutation.record import MutationCheck
from bptool.analysis.gradcheck.result import Cost, GradcheckResult, ProbeCheck, TensorCheck

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m & 'co'"

PATHS = {
    "blocks.0.identity_norm": 0.5,
    "blocks.0.branch_norm": 0.25,
    "blocks.1.identity_norm": 1.0,
    "blocks.1.branch_norm": 0.125,
    "blocks.1.attention_branch_norm": 0.1,
}


def identity(name: str, holds: bool = True, **figures: float) -> Identity:
    detail = f"the figures of {name}"
    return Identity(name=name, holds=holds, relative_error=1e-16, tolerance=1e-12, detail=detail, figures=figures)


def checked(name: str = "w", **more: Any) -> GradcheckResult:
    """One that failed: a wrong tensor, an identity and a probe; a bug was missed.

    Args:
        name: of everything that a user names.
    """
    return GradcheckResult(
        target=name,
        settings=[],
        passed=False,
        seed=7,
        tensors=[
            TensorCheck(
                name="right",
                kind="input",
                shape=[],
                verdict="right",
                relative_error=1e-9,
                detectable_relative_error=2e-8,
            ),
            TensorCheck(
                name=name, kind="parameter", shape=[4, 3], verdict="wrong", relative_error=0.5, location="[3, :]"
            ),
        ],
        identities=[
            identity("logits_gradient"),
            Identity(
                name="residual_paths", holds=True, relative_error=0, tolerance=1e-12, detail="norms", figures=PATHS
            ),
            identity("clipping_norm", holds=False, norm=2.0),
        ],
        probes=[
            ProbeCheck(name="rng_replay", holds=True, detail="it draws no random numbers"),
            ProbeCheck(name="second_call", holds=False, detail=f"the gradient of {name} differs"),
        ],
        checked_count=13,
        sizes_cut=["model.d_model from 768 to 96"],
        assumptions=[f"{name}: row 0 is left out"],
        cost=Cost(
            forward_s=0.5,
            backward_s=1.0,
            check_s=30.0,
            passes=20.0,
            forwards_count=60,
            finite_differences_forwards_count=26,
            finite_differences_s=13.0,
            identities_s=6.0,
            mutations_s=12.0,
        ),
        estimates=[],
        precision=None,
        mutations=[
            MutationCheck(
                name="wrong sign", op="MmBackward0[1]", module=name, outcome="caught", relative_error=2.0, tensor=name
            ),
            MutationCheck(
                name="rounded", op="F", outcome="missed", relative_error=2e-8, tensor=name, detail="too small"
            ),
            MutationCheck(name="a", op="gelu", outcome="not_applicable", detail="gelu is not called"),
        ],
        **more,
    )
