"""A residual block's gradient is the sum of two paths: what the addition passes on, and what the branch passes back.

    x_mid = x_in + attention(x_in)          d x_in  = d x_mid + J_attention^T d x_mid
    x_out = x_mid + feed_forward(x_mid)     d x_mid = d x_out + J_feed_forward^T d x_out

The left sides are read in one backward of the whole model; each branch's part is made anew by a backward of that branch
alone, on a copy of its input that nothing else hangs on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bptool.analysis.gradcheck.identities.identity import Agreement, Identity, agree, as_identity, rounding_unit
from bptool.model.transformer import Block, Transformer

NAME = "residual_paths"


@dataclass
class _Seen:
    """What entered a block, and its middle."""

    inputs: tuple[Any, ...] = ()
    middle: Tensor | None = field(default=None)


class ResidualPaths:
    """Watches the residual stream of the built-in transformer in one forward and backward."""

    def __init__(self, model: Transformer) -> None:
        self._blocks: list[Block] = list(model.blocks)  # type: ignore[arg-type]
        self._seen = [_Seen() for _ in self._blocks]
        self._last: Tensor | None = None
        self._handles = [model.final_norm.register_forward_pre_hook(self._see_last)]
        for block, seen in zip(self._blocks, self._seen, strict=True):
            self._handles.append(block.register_forward_pre_hook(_see_inputs(seen)))
            self._handles.append(block.feed_forward_norm.register_forward_pre_hook(_see_middle(seen)))

    def _see_last(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._last = _watched(inputs[0])

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def identity(self) -> Identity:
        """After the backward."""
        agreements, words = [], []
        figures: dict[str, float] = {}
        leaving = [*(seen.inputs[0] for seen in self._seen[1:]), self._last]
        for number, (block, seen, out) in enumerate(zip(self._blocks, self._seen, leaving, strict=True)):
            found, norms = _block_paths(block, seen, out, number)
            agreements += found
            figures |= {f"blocks.{number}.{key}": value for key, value in norms.items()}
            words.append(f"{number}: {norms['identity_norm']:.3g} + {norms['branch_norm']:.3g}")
        passed = (
            "identity path + branch path" if self._blocks[0].residual else "branch path alone (model.residual=false)"
        )
        detail = f"each block's gradient = {passed}; norms by block, last first: {', '.join(reversed(words))}"
        return as_identity(NAME, agreements, detail, figures)


def _block_paths(
    block: Block, seen: _Seen, out: Tensor | None, number: int
) -> tuple[list[Agreement], dict[str, float]]:
    """Both additions of one block, and the norms of the paths through all of it."""
    x_in, middle = seen.inputs[0], seen.middle
    assert middle is not None, "every block has a feed-forward"
    assert out is not None, "the last block's output enters the last norm"
    out_grad = torch.zeros_like(out) if out.grad is None else out.grad
    middle_grad = torch.zeros_like(out) if middle.grad is None else middle.grad
    skip = 1.0 if block.residual else 0.0
    lower = _through(lambda x: _attention_branch(block, x, seen.inputs[1:]), x_in, middle_grad)
    upper = _through(lambda x: _feed_forward_branch(block, x), middle, out_grad)
    roundings = _roundings(block, x_in)
    agreements = [
        _sum_agrees(middle.grad, skip * out_grad, upper, roundings, f"block {number}, around the feed-forward"),
        _sum_agrees(x_in.grad, skip * middle_grad, lower, roundings, f"block {number}, around attention"),
    ]
    norms = {
        "identity_norm": float(skip * out_grad.norm()),
        "branch_norm": float((skip * upper + lower).norm()) if block.residual else float(lower.norm()),
        "attention_branch_norm": float(lower.norm()),
        "feed_forward_branch_norm": float(upper.norm()),
    }
    return agreements, norms


def _sum_agrees(found: Tensor | None, identity: Tensor, branch: Tensor, roundings: float, where: str) -> Agreement:
    """Each element within rounding of the sum; a branch's products mix its elements, so its largest counts for all."""
    size = identity.abs() + branch.abs().max()
    return agree(found, identity + branch, roundings * rounding_unit(branch.dtype) * size, where)


def _through(branch: Callable[[Tensor], Tensor], x: Tensor, slope: Tensor) -> Tensor:
    """`J^T slope` of one branch."""
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(branch(x), x, slope)
    return found


def _attention_branch(block: Block, x_BTD: Tensor, rest: tuple[Any, ...]) -> Tensor:
    y_BTD: Tensor = block.attention_post_norm(block.attention(block.attention_norm(x_BTD), *rest))
    return y_BTD


def _feed_forward_branch(block: Block, x_BTD: Tensor) -> Tensor:
    found = block.feed_forward(block.feed_forward_norm(x_BTD))
    y_BTD: Tensor = block.feed_forward_post_norm(found if isinstance(found, Tensor) else found[0])
    return y_BTD


def _roundings(block: Block, x_BTD: Tensor) -> float:
    """Lengths of all the sums of a block's forward and backward, one after the other: each matrix's both sides, and
    the tokens that attention sums over."""
    sides = sum(sum(parameter.shape[-2:]) for parameter in block.parameters())
    return float(2 * (sides + 4 * x_BTD.shape[1]))


def _watched(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.retain_grad()
    return x


def _see_inputs(seen: _Seen) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        _watched(inputs[0])
        seen.inputs = inputs

    return see


def _see_middle(seen: _Seen) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.middle = _watched(inputs[0])

    return see
