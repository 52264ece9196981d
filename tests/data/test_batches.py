"""Batches against slices of the stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bptool.data.batches import TokenBatches, held_out_batches
from bptool.data.order import WindowOrder
from bptool.interop.token_files import NANOGPT, Tokens, read_token_file, write_token_file

STREAM: Tokens = np.arange(1000, dtype=np.uint16)  # token i is its own position


def global_batch(step: int, micro: int, accumulation: int, world_size: int = 1) -> list[list[int]]:
    """All sequences of a step, each with its last target, in order of rank and micro-batch."""
    return [
        [*row, int(last)]
        for rank in range(world_size)
        for batch in TokenBatches(
            STREAM,
            sequence_length=8,
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            seed=3,
            rank=rank,
            world_size=world_size,
        ).micro_batches(step)
        for row, last in zip(batch["tokens"].tolist(), batch["targets"][:, -1], strict=True)
    ]


@pytest.mark.parametrize("step", [0, 1, 9, 10, 12345])
def test_batch_is_the_slices_of_the_stream(step: int) -> None:
    """A naive second form: sample by sample, by Python's own slicing (the order has its own tests)."""
    order = WindowOrder(1000, 8, 3)
    expected = []
    for sample in range(step * 12, (step + 1) * 12):
        start = int(order.starts(sample, 1)[0])
        expected.append(STREAM.tolist()[start : start + 9])
    assert global_batch(step, 4, 3) == expected


@given(step=st.integers(0, 10**6))
def test_division_of_the_batch_changes_nothing(step: int) -> None:
    whole = global_batch(step, 12, 1)
    assert len(whole) == 12
    for micro, accumulation, world_size in ((1, 12, 1), (4, 3, 1), (3, 2, 2), (1, 1, 12), (2, 3, 2)):
        assert global_batch(step, micro, accumulation, world_size) == whole


def test_shapes_types_and_targets() -> None:
    batches = TokenBatches(
        STREAM, sequence_length=8, micro_batch_size=4, gradient_accumulation_steps=3, seed=0
    ).micro_batches(7)
    assert len(batches) == 3
    for batch in batches:
        assert set(batch) == {"tokens", "targets"}
        for tensor in batch.values():
            assert tensor.shape == (4, 8)
            assert tensor.dtype == torch.int64
            assert tensor.is_contiguous()
        assert torch.equal(batch["targets"], batch["tokens"] + 1)


def test_epoch_covers_the_split_once() -> None:
    n_windows = WindowOrder(1000, 8, 3).n_windows
    seen = [token for step in range(n_windows) for row in global_batch(step, 1, 1) for token in row[:-1]]
    assert len(seen) == len(set(seen)) == n_windows * 8 > 1000 - 2 * 8


def test_memory_mapped_tokens(tmp_path: Path) -> None:
    write_token_file(tmp_path / "train.bin", STREAM, NANOGPT)
    mapped = read_token_file(tmp_path / "train.bin", vocab_size=1000).tokens
    made = {"sequence_length": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "seed": 3}
    for one, other in zip(
        TokenBatches(mapped, **made).micro_batches(4),
        TokenBatches(STREAM, **made).micro_batches(4),
        strict=True,
    ):
        assert torch.equal(one["tokens"], other["tokens"])
        one["tokens"][0, 0] = 0  # a copy, which the step may write to


def test_held_out_windows_are_evenly_spaced() -> None:
    batches = held_out_batches(STREAM[:81], sequence_length=8, micro_batch_size=2, sequences=5)
    assert [batch["tokens"].shape[0] for batch in batches] == [2, 2, 1]
    rows = torch.cat([batch["tokens"] for batch in batches])
    assert rows[:, 0].tolist() == [0, 16, 32, 48, 64]  # ten windows, each second one
    assert rows[1].tolist() == list(range(16, 24))
    assert torch.equal(torch.cat([batch["targets"] for batch in batches]), rows + 1)


@pytest.mark.parametrize(("n_tokens", "expected"), [(9, 1), (16, 1), (17, 2), (1000, 124)])
def test_held_out_takes_what_there_is(n_tokens: int, expected: int) -> None:
    batches = held_out_batches(STREAM[:n_tokens], sequence_length=8, micro_batch_size=64, sequences=500)
    rows = torch.cat([batch["targets"] for batch in batches])
    assert len(rows) == expected
    assert rows.flatten().tolist() == list(range(1, 8 * expected + 1))
