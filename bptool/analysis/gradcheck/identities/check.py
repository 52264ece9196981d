"""Every identity that a model's parts let one check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bptool.analysis.gradcheck.identities import accumulation, logits, order, residual, step
from bptool.analysis.gradcheck.identities.attention import AttentionCalls
from bptool.analysis.gradcheck.identities.identity import Identities, Identity
from bptool.analysis.gradcheck.identities.logits import LogitsGradient
from bptool.analysis.gradcheck.identities.observed import ObservedFunctions
from bptool.analysis.gradcheck.identities.order import LayerOrder, layers_of_transformer, layers_of_workload
from bptool.analysis.gradcheck.identities.residual import ResidualPaths
from bptool.analysis.gradcheck.model_at_hand import ModelAtHand, drawn_once
from bptool.analysis.gradcheck.random_state import random_state_kept
from bptool.config.schema import Config
from bptool.model.loss import IGNORED
from bptool.model.transformer import Transformer
from bptool.training.assembly import default_dtype
from bptool.training.workload import Workload


def check_identities(
    config: Config,
    workload: Workload,
    *,
    built_in: bool,
    seed: int,
    device: torch.device | None = None,
) -> Identities:
    """Check the identities of backpropagation on a model: some dozen forwards and backwards of it.

    Args:
        config: of sizes that float64 can afford.
        workload: what is trained; where it is not `built_in`, the identities of parts that PyTorch's own functions
            show (attention, cross-entropy) and of the step are checked.
        seed: weights, batch and dropout are functions of it.

    Raises:
        DeviceError: the device cannot do float64 or what the config asks.
    """
    at_hand = ModelAtHand(config, drawn_once(workload), built_in, seed, device or torch.device("cpu"))
    with random_state_kept(at_hand.device):
        return _all_identities(at_hand)


def _all_identities(at_hand: ModelAtHand) -> Identities:
    found, left_out = _of_transformer(at_hand) if at_hand.built_in else _of_workload(at_hand)
    whole_step: list[Callable[[ModelAtHand], Identity | str]] = [
        accumulation.accumulation,
        step.activation_checkpointing,
        step.clipping,
        step.gradient_descent,
    ]
    for check in whole_step:
        outcome = _in_its_dtype(check, at_hand)
        (left_out if isinstance(outcome, str) else found).append(outcome)  # type: ignore[arg-type]
    return Identities(identities=found, left_out=left_out)


def observed_identities(run: Callable[[], Tensor]) -> list[Identity]:
    """The identities of attention and cross-entropy wherever `run` calls PyTorch's own; it returns a scalar.

    Gradients are left in the parameters' and inputs' `.grad`, as a backward does.
    """
    seen = ObservedFunctions()
    with seen:
        result = run()
    result.backward()
    return seen.identities()


def _of_transformer(at_hand: ModelAtHand) -> tuple[list[Identity], list[str]]:
    """One forward and backward in float64, without dropout, with some targets ignored."""
    model = at_hand.exact_model().eval()
    assert isinstance(model, Transformer), "the built-in workload's model"
    (batch,) = at_hand.batches(1, torch.float64)
    targets_BT = batch["targets"].clone()
    targets_BT.flatten()[::5] = IGNORED
    last, paths, turns = (
        LogitsGradient(model),
        ResidualPaths(model),
        LayerOrder(layers_of_transformer(model), all_arrive=True),
    )
    attention = AttentionCalls(model, at_hand.config.model)
    with _closed_at_the_end(last, paths, turns, attention):
        at_hand.workload.loss(model, {**batch, "targets": targets_BT}).backward()
    return [last.identity(), paths.identity(), *attention.identities(), turns.identity()], []


def _of_workload(at_hand: ModelAtHand) -> tuple[list[Identity], list[str]]:
    model = at_hand.exact_model().eval()
    (batch,) = at_hand.batches(1, torch.float64)
    layers = layers_of_workload(at_hand.workload, model)
    turns = LayerOrder(layers, all_arrive=False)
    with default_dtype(torch.float64), _closed_at_the_end(turns):
        found = observed_identities(lambda: at_hand.workload.loss(model, batch))
    left_out = [f"{residual.NAME}: which addition is a block's is known of the built-in transformer alone"]
    names = {identity.name for identity in found}
    if logits.NAME not in names:
        left_out.append(f"{logits.NAME}: the loss calls no torch.nn.functional.cross_entropy with class indices")
    if not any(name.startswith("attention") for name in names):
        left_out.append(
            "attention: the model calls no torch.nn.functional.scaled_dot_product_attention without dropout"
        )
    if len(layers) > 1:
        found.append(turns.identity())
    else:
        left_out.append(f"{order.NAME}: the workload has no repeated blocks")
    return found, left_out


def _in_its_dtype(check: Callable[[ModelAtHand], Identity | str], at_hand: ModelAtHand) -> Identity | str:
    """Checks in float64 make what a user's model makes without saying its dtype in float64, too."""
    exact = check in (accumulation.accumulation, step.clipping) and not at_hand.built_in
    with default_dtype(torch.float64 if exact else torch.get_default_dtype()):
        return check(at_hand)


@contextmanager
def _closed_at_the_end(*watchers: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.close()
