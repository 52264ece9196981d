"""The whole check of a transformer block with each of the bugs that the tests write into its backward, and without any:
caught, false alarms and time, at three widths over ten seeds. `test_broken_blocks` holds the check's first look."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from broken_backwards import BUGS, Block, ids_and_targets

from bptool import GradientTarget
from bptool.analysis.gradcheck.check import check_gradients
from bptool.analysis.gradcheck.result import GradcheckResult

pytestmark = pytest.mark.benchmark

SEEDS = range(10)


def checked(width: int, bug: str, seed: int) -> GradcheckResult:
    torch.manual_seed(seed)
    return check_gradients(GradientTarget(Block(width, bug), ids_and_targets(seed)), seed=seed)


@pytest.mark.parametrize("width", [8, 32, 256])
def test_caught_and_false_alarms(width: int) -> None:
    torch.set_num_threads(1)
    missed: Counter[str] = Counter()
    seconds, alarms, largest = [], 0, 0.0
    for seed in SEEDS:
        right = checked(width, "", seed)
        alarms += not right.passed or {tensor.verdict for tensor in right.tensors} != {"right"}
        largest = max(largest, *(tensor.detectable_relative_error or 1.0 for tensor in right.tensors))
        for bug in BUGS:
            start = time.perf_counter()
            found = checked(width, bug, seed)
            seconds.append(time.perf_counter() - start)
            missed[bug] += found.passed or "wrong" not in {tensor.verdict for tensor in found.tensors}
    tried = len(seconds)
    caught = tried - missed.total()
    print(
        f"\n{len(BUGS)} bugs in a block {width} wide, {len(SEEDS)} seeds: caught {caught} of {tried},"
        f" {alarms} false alarms in {len(SEEDS)}, {sum(seconds) / tried:.2f} s a check;"
        f" without a bug any error from {largest:.0e} on would have been caught"
    )
    print("".join(f"  missed {count} times: {bug}\n" for bug, count in missed.items() if count), end="")
    assert caught == tried
    assert alarms == 0
