from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from bptool.training.seeds import derive_seed, seed_step

parts = st.lists(st.one_of(st.integers(), st.text(max_size=5)), min_size=1, max_size=4)


@given(parts, parts)
def test_other_parts_give_another_seed(left: list[int | str], right: list[int | str]) -> None:
    assert 0 <= derive_seed(*left) < 2**63  # what torch and numpy take
    assert (derive_seed(*left) == derive_seed(*right)) == (left == right)


def test_a_seed_is_the_same_in_every_process() -> None:
    """Python's own hash of a text differs from process to process."""
    program = "from bptool.training.seeds import derive_seed; print(derive_seed(7, 'step', 3))"
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "123"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert int(result.stdout) == derive_seed(7, "step", 3)


def test_a_steps_random_numbers_are_a_function_of_seed_and_step() -> None:
    def drawn(seed: int, step: int) -> list[float]:
        seed_step(seed, step)
        numbers: list[float] = torch.rand(4).tolist()
        return numbers

    first = drawn(1, 5)
    torch.rand(100)  # whatever was drawn in between
    assert drawn(1, 5) == first
    assert first not in (drawn(1, 6), drawn(2, 5))
