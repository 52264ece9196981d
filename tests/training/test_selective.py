"""What is saved, also of operations that only a GPU runs; and what cannot be computed again is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small_runs import same_bits
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bptool.config.block_plan import ALIKE_EVERYWHERE
from bptool.errors import TargetError, UsageError
from bptool.model.grouped import GROUPED_LINEAR
from bptool.training.selective import Attention, Chooser, Matmuls, Named, Numbering, nature, selective_contexts

aten = torch.ops.aten
QKV = (None, None, None)
DROPPING = [
    (aten._scaled_dot_product_flash_attention.default, (*QKV, 0.1)),
    (aten._scaled_dot_product_efficient_attention.default, (*QKV, None, True, 0.1)),
    (aten._scaled_dot_product_cudnn_attention.default, (*QKV, None, True, 0.1)),
]


class Saves:
    """What a forward would save, asked without running anything."""

    def __init__(self, chooser: Callable[[], Chooser]) -> None:
        self._mode: Any = selective_contexts(chooser)[0]

    def __call__(self, func: Any, *args: Any) -> bool:
        return bool(self._mode._saves(func, nature(func), args))


@pytest.mark.parametrize(("func", "args"), DROPPING)
def test_what_is_dropped_after_attention_that_drops_is_saved_too(func: Any, args: tuple[Any, ...]) -> None:
    """A saved operation draws nothing the second time, and what comes after it would draw other numbers."""
    saves = Saves(Attention)
    assert not saves(aten.native_dropout.default)
    assert saves(func, *args)
    assert saves(aten.native_dropout.default)


@pytest.mark.parametrize(("func", "args"), DROPPING)
def test_without_dropout_in_it_nothing_else_is(func: Any, args: tuple[Any, ...]) -> None:
    saves = Saves(Attention)
    assert saves(func, *args[:-1], 0.0)
    assert not saves(aten.native_dropout.default)


def test_random_numbers_that_are_written_in_place_cannot_be_saved() -> None:
    saves = Saves(Attention)
    assert not saves(aten.bernoulli_.float, None, 0.5)
    assert saves(DROPPING[0][0], *DROPPING[0][1])
    with pytest.raises(UsageError, match="bernoulli_"):
        saves(aten.bernoulli_.float, None, 0.5)


def test_every_other_product() -> None:
    saves = Saves(lambda: Matmuls(every=2))
    assert [saves(product) for product in (aten.mm.default, aten.addmm.default, aten.bmm.default)] == [
        True,
        False,
        True,
    ]


def test_operations_are_named_in_turn_and_attention_alike_everywhere() -> None:
    numbered = Numbering()
    asked = [aten.mm.default, DROPPING[0][0], aten.mm.default, DROPPING[1][0]]
    assert [numbered(func) for func in asked] == ["mm-1", "attention-1", "mm-2", "attention-2"]
    saves = Saves(lambda: Named({"mm-2", "attention-1", "nothing-1"}))
    assert [saves(func, *QKV) for func in asked] == [False, True, True, False]


def test_products_and_attention_are_what_has_the_same_number_everywhere() -> None:
    """As the config knows them, which loads no PyTorch: what the policies that save by operation save."""
    every = [getattr(torch.ops.aten, name) for name in dir(torch.ops.aten) if not name.startswith("__")]
    overloads = [getattr(packet, name) for packet in every for name in getattr(packet, "overloads", list)()]
    chosen = {nature(func).name for func in [*overloads, GROUPED_LINEAR] if Matmuls()(func)}
    assert chosen == ALIKE_EVERYWHERE


def block(x: Tensor, weight: Tensor) -> Tensor:
    hidden = torch.nn.functional.dropout(torch.tanh(x @ weight), 0.5)
    return torch.sigmoid(hidden.t().contiguous().t() @ weight) + x


def gradients(contexts: Callable[[], Any]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    x, weight = torch.randn(6, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    result = checkpoint(block, x, weight, use_reentrant=False, context_fn=contexts)
    result.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return {"x": x.grad, "weight": weight.grad}


@pytest.mark.parametrize("names", [{"add-1"}, {"mm-1"}, {"mm-1", "tanh-1"}, {"mm-2", "sigmoid-1", "clone-1"}])
def test_gradients_are_pytorchs_own_to_the_bit(names: set[str]) -> None:
    """Beside its own selective recomputation of the same operations."""
    numbered = Numbering()

    def policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        chosen = nature(func).counts and not context.is_recompute and numbered(func) in names
        return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE

    ours = gradients(partial(selective_contexts, lambda: Named(names)))
    assert same_bits(ours, gradients(lambda: create_selective_checkpoint_contexts(policy)))


def test_what_is_saved_goes_when_it_was_used() -> None:
    """Nothing of a block is left after its backward: neither a cycle nor a place holds it."""
    first, again = selective_contexts(Matmuls)
    x, weight = torch.randn(6, 6, requires_grad=True), torch.randn(6, 6)
    result = checkpoint(block, x, weight, use_reentrant=False, context_fn=lambda: (first, again))
    assert len(first.kept) == 2  # type: ignore[attr-defined]
    result.sum().backward()
    assert first.kept == {}  # type: ignore[attr-defined]


def run(function: Callable[[Tensor], Tensor], chooser: Callable[[], Chooser]) -> None:
    x = torch.randn(4, 4, requires_grad=True)
    checkpoint(function, x, use_reentrant=False, context_fn=partial(selective_contexts, chooser)).sum().backward()


def test_a_result_that_was_written_into_is_refused() -> None:
    with pytest.raises(TargetError, match="written into by a later operation in place"):
        run(lambda x: (x @ x).mul_(2.0).exp(), Matmuls)


def test_a_block_that_does_something_else_the_second_time_is_refused() -> None:
    calls: list[int] = []

    def other(x: Tensor) -> Tensor:
        calls.append(1)
        return torch.exp(x @ x).sin() if len(calls) == 1 else torch.cos(x @ x).sin()

    with pytest.raises(TargetError, match=r"aten\.cos\.default is run at a place where the forward ran another"):
        run(other, Matmuls)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"matmul-1"}, "saves matmul, which a block does not run"),
        ({"softmax-1", "bmm-2"}, "saves bmm, softmax, which a block does not run"),
    ],
)
def test_a_plan_of_which_a_block_runs_nothing_is_refused(names: set[str], message: str) -> None:
    """And what it does run is said, with how often where that is more than once."""
    with pytest.raises(TargetError, match=message) as caught:
        gradients(partial(selective_contexts, lambda: Named(names)))
    said = str(caught.value.remedy)
    assert "mm (2)" in said
    assert "tanh" in said


def test_a_number_beyond_a_block_s_last_saves_nothing() -> None:
    """Blocks of one plan may differ: an expert more, a layer less. Nor does an operation that another device runs."""
    plain = gradients(partial(selective_contexts, lambda: Named({"tanh-1"})))
    assert same_bits(plain, gradients(partial(selective_contexts, lambda: Named({"tanh-1", "mm-7", "softmax-1"}))))


def test_a_cast_may_be_missing_as_it_is_in_another_precision() -> None:
    plain = gradients(partial(selective_contexts, lambda: Named({"tanh-1"})))
    assert same_bits(plain, gradients(partial(selective_contexts, lambda: Named({"_to_copy-1"}))))


def test_what_fails_in_a_block_is_what_is_said() -> None:
    """A forward that did not end has not run all that it would."""

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("out of everything")

    with pytest.raises(RuntimeError, match="out of everything"):
        run(fails, lambda: Named({"mm-1"}))
