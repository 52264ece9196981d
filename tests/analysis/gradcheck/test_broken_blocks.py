"""A right transformer block raises no alarm; each of the bugs in its hand-written backwards does."""

from __future__ import annotations

import pytest
import torch
from broken_backwards import BUGS, Block, ids_and_targets

from bptool import GradientTarget
from bptool.analysis.gradcheck.check import check_gradients
from bptool.analysis.gradcheck.differences import EPSILON, estimate_noise
from bptool.analysis.gradcheck.directions import Directions
from bptool.analysis.gradcheck.subject import Subject, gaussian_like


def target(width: int, bug: str, seed: int) -> GradientTarget:
    torch.manual_seed(seed)
    return GradientTarget(Block(width, bug), ids_and_targets(seed))


def is_seen(width: int, bug: str, seed: int) -> bool:
    """Whether one of the directions of a single group of all tensors shows it: the check's first and coarsest look."""
    subject = Subject(target(width, bug, seed), seed=seed)
    _, gradients = subject.gradient()
    everywhere = {
        n: gaussian_like(leaf.base, subject.generator("x")) * leaf.scale for n, leaf in subject.leaves.items()
    }
    noise = estimate_noise(subject, everywhere, EPSILON)
    directions = Directions(subject, gradients, noise, floor=1e-11 * noise.sigma / EPSILON)
    draws = (directions.draw(list(subject.leaves), k) for k in range(4))
    return any(not directions.measure(draw).agrees and directions.confirmed(draw) for draw in draws)


def test_there_are_enough_bugs() -> None:
    assert len(BUGS) == len(set(BUGS)) >= 30


@pytest.mark.parametrize("width", [8, 32, 256])
def test_the_right_block_raises_no_alarm(width: int) -> None:
    result = check_gradients(target(width, "", width), seed=width)
    assert result.passed, result.failures()
    assert {t.verdict for t in result.tensors} == {"right"}
    assert max(t.detectable_relative_error or 1 for t in result.tensors) < 1e-5


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_seen(bug: str, width: int) -> None:
    assert is_seen(width, bug, seed=width)


@pytest.mark.parametrize(
    ("bug", "tensor", "location"),
    [
        ("linear: one element of the weight gradient is zero", "output.weight", "[7, 4]"),
        ("linear: one row of the weight gradient is 1% off", "output.weight", "[1, :]"),
        ("linear: weight gradient is None", "output.weight", "everywhere"),
        ("layer norm: another eps", "scale_1", "everywhere"),
        ("attention: one head forgotten", "query.bias", "[4:8]"),
        ("rope: last pair not rotated back", "key.bias", "[1:8:2]"),
        ("embedding: repeated ids overwrite each other", "table", None),
    ],
)
def test_the_wrong_tensor_nearest_to_the_loss_is_where_the_bug_is(bug: str, tensor: str, location: str | None) -> None:
    result = check_gradients(target(8, bug, 0), seed=0)
    last = [found for found in result.tensors if found.verdict == "wrong"][-1]
    assert last.name == tensor
    assert location is None or last.location == location


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_whole_check_catches_it(bug: str) -> None:
    result = check_gradients(target(8, bug, 1), seed=1)
    assert not result.passed
    assert "wrong" in {tensor.verdict for tensor in result.tensors}


@pytest.mark.slow
@pytest.mark.parametrize("width", [8, 32, 256])
@pytest.mark.parametrize("seed", range(10))
def test_every_bug_is_seen_with_every_seed_and_no_other(seed: int, width: int) -> None:
    assert [bug for bug in BUGS if not is_seen(width, bug, seed)] == []
    assert not is_seen(width, "", seed)
