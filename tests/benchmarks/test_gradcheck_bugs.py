"""The check of a transformer block with each of the bugs that the tests write into its backward, and without any:
caught, false alarms and time, at three widths over ten seeds.

The right block gets the whole check. A block with a bug gets the check's verdicts, tensor by tensor, until one is
`wrong`: no probe is needed to find these bugs, and where the wrong entries are is not asked. The whole check of a block
with each bug is a slow test of `test_broken_blocks`.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from broken_backwards import BUGS, Block, ids_and_targets

from bptool import GradientTarget
from bptool.analysis.gradcheck.check import check_gradients
from bptool.analysis.gradcheck.differences import EPSILON, estimate_noise
from bptool.analysis.gradcheck.subject import Subject, gaussian_like
from bptool.analysis.gradcheck.verdicts import Verdicts

pytestmark = pytest.mark.benchmark

SEEDS = range(10)


def target(width: int, bug: str, seed: int) -> GradientTarget:
    torch.manual_seed(seed)
    return GradientTarget(Block(width, bug), ids_and_targets(seed))


def is_caught(width: int, bug: str, seed: int) -> bool:
    """Whether a tensor's verdict is `wrong`."""
    subject = Subject(target(width, bug, seed), seed=seed)
    (_, gradients), (_, repeated) = subject.gradient(), subject.gradient()
    generator = subject.generator("noise")
    everywhere = {name: gaussian_like(leaf.base, generator) * leaf.scale for name, leaf in subject.leaves.items()}
    verdicts = Verdicts(subject, gradients, repeated, estimate_noise(subject, everywhere, EPSILON))
    return any(tensor.verdict == "wrong" for tensor in verdicts.each())


@pytest.mark.parametrize("width", [8, 32, 256])
def test_caught_and_false_alarms(width: int) -> None:
    torch.set_num_threads(1)
    missed: Counter[str] = Counter()
    alarms, largest, of_right, of_wrong = 0, 0.0, 0.0, 0.0
    for seed in SEEDS:
        start = time.process_time()
        right = check_gradients(target(width, "", seed), seed=seed)
        middle = time.process_time()
        alarms += not right.passed or {tensor.verdict for tensor in right.tensors} != {"right"}
        largest = max(largest, *(tensor.detectable_relative_error or 1.0 for tensor in right.tensors))
        missed.update(bug for bug in BUGS if not is_caught(width, bug, seed))
        of_right += middle - start
        of_wrong += time.process_time() - middle
    tried = len(SEEDS) * len(BUGS)
    caught = tried - missed.total()
    print(
        f"\n{len(BUGS)} bugs in a block {width} wide, {len(SEEDS)} seeds: caught {caught} of {tried},"
        f" {of_wrong / tried:.2f} s each to the first wrong tensor;\n"
        f"  {alarms} false alarms in {len(SEEDS)} whole checks without a bug, {of_right / len(SEEDS):.2f} s each:"
        f" any error from {largest:.0e} on would have been caught"
    )
    print("".join(f"  missed {count} times: {bug}\n" for bug, count in missed.items()), end="")
    assert caught == tried
    assert alarms == 0
