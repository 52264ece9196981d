"""Activation checkpointing: what the forward keeps of each block, and what the backward computes again.

Every policy gives the gradient of `none`, to the bit where the operations themselves are deterministic: what is
computed again is computed from the same inputs, with the same random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from bptool.config.block_plan import BlockPolicy, NamedPolicy, parse_plan, saved_operations, write_plan
from bptool.config.schema import ActivationCheckpointSettings
from bptool.errors import TargetError
from bptool.training.instrument import Announcer
from bptool.training.offload import offloading
from bptool.training.selective import Attention, Chooser, Matmuls, Named, selective_contexts

Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]
"""Of a forward and of its recomputation."""

Recompute = Callable[[nn.Module, Callable[[], Chooser] | None], None]
"""Has a module's backward compute it again, but for the results that choosers choose; None: for none."""

CHOOSERS: dict[NamedPolicy, Callable[[], Chooser]] = {
    "save_matmuls": Matmuls,
    "save_every_other_matmul": partial(Matmuls, every=2),
    "save_attention": Attention,
}
"""What the policies that save by operation save."""
_SUBLAYERS: dict[NamedPolicy, re.Pattern[str]] = {
    "attention": re.compile(r"attention|attn", re.IGNORECASE),
    "mlp": re.compile(r"mlp|feed_?forward|ffn|(^|_|layer)ff$|moe|experts", re.IGNORECASE),
}
"""What a block's module is called, by its name or its class, in the models of this world."""
SUBLAYER_POLICIES: tuple[NamedPolicy, ...] = tuple(_SUBLAYERS)
"""Those that a block may be too foreign for."""
_NOT_NAMED = re.compile(r"norm|(^|_)ln|drop", re.IGNORECASE)
_NOT_OF_CLASS = re.compile(r"(norm|dropout)$", re.IGNORECASE)
"""What the modules next to it are."""


class PolicyUnfit(TargetError):
    """The policy is for other blocks than the model's."""


def block_policies(n_blocks: int, settings: ActivationCheckpointSettings) -> list[BlockPolicy]:
    """What each block does.

    Raises:
        PolicyUnfit: the plan is for another number of blocks.
    """
    match settings.policy:
        case "every_k":
            return ["none" if index % settings.every else "full" for index in range(n_blocks)]
        case "plan":
            plan = parse_plan(settings.plan)
            if len(plan) != n_blocks:
                raise PolicyUnfit(
                    f"activation_checkpoint.plan is for {len(plan)} blocks; the model has {n_blocks}",
                    "say what each block does, such as " + write_plan(["full"] * max(n_blocks, 1)),
                )
            return plan
        case "budget":
            raise AssertionError("a budget is a plan by the time that a step is built")
        case policy:
            return [policy] * n_blocks


def recomputed_blocks(n_blocks: int, settings: ActivationCheckpointSettings) -> list[int]:
    """Indices of the blocks that the backward computes again as a whole."""
    return [index for index, policy in enumerate(block_policies(n_blocks, settings)) if policy == "full"]


def keeps_casts(settings: ActivationCheckpointSettings) -> bool:
    """Whether autocast is to keep its 16-bit copies of weights until the forward ends.

    The backward needs them anyway where nothing is recomputed, and a weight that is used twice is then cast once. A
    recomputation makes its own, and those of the forward would be kept for nothing; what is offloaded would stay.
    """
    return settings.policy == "none"


def apply(blocks: Sequence[nn.Module], settings: ActivationCheckpointSettings, recompute: Recompute) -> None:
    """Make the chosen blocks recompute.

    Each block's `forward`, or a sublayer's, is replaced on the instance, so that parameter names stay those of the
    plain model. Dropout is replayed: the random state of the forward is restored for the recomputation.

    Args:
        recompute: how; `announced` where blocks run as they are.

    Raises:
        PolicyUnfit: the policy is for sublayers, and none of the blocks has one.
    """
    policies = block_policies(len(blocks), settings)
    for kind in SUBLAYER_POLICIES:
        chosen = [block for block, policy in zip(blocks, policies, strict=True) if policy == kind]
        if chosen and not any(has_sublayers(block, kind) for block in chosen):
            raise _no_sublayer(chosen[0], kind)
    for block, policy in zip(blocks, policies, strict=True):
        match policy:
            case "none" | "offload":
                pass
            case "attention" | "mlp" as sublayer:
                for module in _sublayers(block, sublayer):
                    recompute(module, None)
            case _:
                recompute(block, _chooser_of(policy))


def apply_offload(blocks: Sequence[nn.Module], settings: ActivationCheckpointSettings) -> None:
    """Have what the chosen blocks save leave the device, compiled as they may be by now."""
    for block, policy in zip(blocks, block_policies(len(blocks), settings), strict=True):
        if policy == "offload":
            block.forward = offloading(block, block.forward)


@cache
def _chooser_of(policy: BlockPolicy) -> Callable[[], Chooser] | None:
    """What makes a chooser of the results that the policy saves; None where it saves none."""
    if policy == "full":
        return None
    for name, chooser in CHOOSERS.items():
        if policy == name:
            return chooser
    return partial(Named, saved_operations(policy))


def announced(announcer: Announcer) -> Recompute:
    """Recomputation of modules that run as they are, each time announced as a phase."""

    def recompute(module: nn.Module, chooser: Callable[[], Chooser] | None) -> None:
        def contexts() -> Contexts:
            forward, recomputation = selective_contexts(chooser) if chooser else (nullcontext(), nullcontext())
            return forward, _phase(announcer, recomputation)

        module.forward = partial(checkpoint, module.forward, use_reentrant=False, context_fn=contexts)

    return recompute


@contextmanager
def _phase(announcer: Announcer, recomputation: AbstractContextManager[object]) -> Iterator[None]:
    with announcer.phase("recompute"), recomputation:
        yield


def has_sublayers(block: nn.Module, policy: NamedPolicy) -> bool:
    """Whether the block has a module that the policy, `attention` or `mlp`, is about."""
    return bool(_sublayers(block, policy))


def _sublayers(block: nn.Module, policy: NamedPolicy) -> list[nn.Module]:
    """The outermost modules of the block that are what the policy recomputes."""
    found: list[nn.Module] = []
    for name, child in block.named_children():
        kind = type(child).__name__
        meant = _SUBLAYERS[policy].search(name) or _SUBLAYERS[policy].search(kind)
        if meant and not (_NOT_NAMED.search(name) or _NOT_OF_CLASS.search(kind)):
            found.append(child)
        else:
            found += _sublayers(child, policy)
    return found


def _no_sublayer(block: nn.Module, policy: NamedPolicy) -> PolicyUnfit:
    names = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children()) or "nothing"
    return PolicyUnfit(
        f"activation_checkpoint.policy={policy}: no module of a {type(block).__name__} is called so; it has {names}",
        "use activation_checkpoint.policy=full, or save_matmuls, which need no names",
    )
