"""What adds up to the step's peak: at one instant, each closed form and the ledger's allocations that it stands for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bptool.analysis.closed_forms import terms
from bptool.analysis.closed_forms.formula import Amount, amount, total
from bptool.analysis.closed_forms.moments import Moment
from bptool.analysis.closed_forms.saved_tensors import (
    LOG_PROBABILITIES,
    OUTPUT,
    Device,
    after_saved,
    before_saved,
    block_saved,
    recomputed_saved,
)
from bptool.analysis.closed_forms.terms import Parameter
from bptool.analysis.memory.sweeps import block_of
from bptool.config.schema import Config
from bptool.instruments.memory.trace import Allocation, Category
from bptool.training.activation_checkpoint import recomputed_blocks

Group = Literal[
    "weights",
    "optimizer state",
    "gradients",
    "inputs",
    "activations",
    "blocks",
    "outside of the blocks",
    "logits",
    "the loss's operands",
    "autocast's cache",
    "rest",
]


@dataclass(frozen=True)
class Share:
    """One part of what is held.

    Attributes:
        size: None where there is no closed form.
        held: the ledger's allocations.
        why: what makes a difference, should there be one.
    """

    name: Group
    size: Amount | None
    held: Sequence[Allocation]
    why: str


def peak_shares(
    config: Config,
    parameters: Sequence[Parameter],
    live: Sequence[Allocation],
    moment: Moment,
    device: Device,
    *,
    covered: bool,
) -> list[Share]:
    """What is held at a moment, by closed form; where the model is not covered, of weights and optimizer."""
    held: defaultdict[Group, list[Allocation]] = defaultdict(list)
    for allocation in live:
        group = _group(config, allocation, moment) if covered else _CATEGORY_GROUPS[allocation.category]
        held[group].append(allocation)
    at_work = f"blocks.{moment.at_work} is at work" if moment.at_work is not None else "the ledger saw it at work"
    shares = [
        Share("weights", terms.weights(parameters).size, held["weights"], _UNTRAINED),
        Share(
            "optimizer state",
            terms.optimizer_state(config, parameters, device).size,
            held["optimizer state"],
            _UNTRAINED,
        ),
    ]
    if not covered:
        rows: list[Group] = ["gradients", "inputs", "activations", "rest"]
        return shares + [Share(name, None, held[name], "") for name in rows]
    return [
        *shares,
        Share("inputs", terms.inputs(config).size, held["inputs"], ""),
        Share("gradients", _gradients(config, parameters, moment), held["gradients"], f"{at_work}, which has some"),
        Share("blocks", _blocks(config, moment, device), held["blocks"], f"{at_work}, which holds a part of its own"),
        Share(
            "outside of the blocks",
            _outside(config, moment, device),
            held["outside of the blocks"],
            "some is released already, or not yet there",
        ),
        Share("logits", _logits(config, moment), held["logits"], "not all at once at this instant"),
        Share(
            "the loss's operands",
            _operands(config, moment),
            held["the loss's operands"],
            "the loss is at another of its products",
        ),
        Share(
            "autocast's cache",
            _cache(config, moment),
            held["autocast's cache"],
            "some of the block's are not made yet, or are there without a cache while they are multiplied",
        ),
        Share("rest", None, held["rest"], ""),
    ]


_UNTRAINED = "parameters that are not trained, and buffers, have no gradient and no state"


def is_logits(config: Config, allocation: Allocation) -> bool:
    """Whether it is as wide as the vocabulary for each token of a chunk, and the loss's."""
    shape = f"[{terms.chunk_of(config)}, {config.model.vocab_size}]"
    return block_of(allocation.module) is None and allocation.tensor.endswith(shape)


_CATEGORY_GROUPS: dict[Category, Group] = {
    "parameters": "weights",
    "optimizer_state": "optimizer state",
    "inputs": "inputs",
    "gradients": "gradients",
    "activations": "activations",
    "temporaries": "rest",
}


def _group(config: Config, allocation: Allocation, moment: Moment) -> Group:
    new = allocation.born >= moment.since
    differentiating = moment.phase in ("forward", "backward", "recompute", "step")
    if allocation.category in ("parameters", "optimizer_state", "inputs"):
        return _CATEGORY_GROUPS[allocation.category]
    if new and differentiating and is_logits(config, allocation):
        return "logits"
    if new and differentiating and _is_waiting(config, allocation, moment):
        return "outside of the blocks"
    if allocation.category == "gradients":
        return "gradients"
    if allocation.category == "activations":
        return "outside of the blocks" if block_of(allocation.module) is None else "blocks"
    if new and moment.phase == "forward" and _is_cached(allocation):
        return "autocast's cache"
    return "the loss's operands" if new and _is_operand(config, allocation, moment) else "rest"


def _is_cached(allocation: Allocation) -> bool:
    """A copy of a linear layer's weight or bias; that of its input has three dimensions."""
    is_copy = allocation.op == "aten._to_copy" and block_of(allocation.module) is not None
    return is_copy and allocation.module.endswith(_LINEAR) and allocation.tensor.count(",") < 2


_LINEAR = (".query", ".key", ".value", ".output", ".gate", ".up", ".down")


def _is_operand(config: Config, allocation: Allocation, moment: Moment) -> bool:
    if not (moment.phase == "forward" and _in_loss(config, moment)):
        return False
    tokens = config.training.micro_batch_size * config.training.sequence_length
    rows = (tokens, terms.chunk_of(config), config.model.vocab_size)
    ends = tuple(f"[{number}, {config.model.d_model}]" for number in rows)
    return allocation.module == "final_norm" or (allocation.module == "loss" and allocation.tensor.endswith(ends))


def _is_waiting(config: Config, allocation: Allocation, moment: Moment) -> bool:
    """The output weights' gradient before it is a parameter's own."""
    if not allocation.tensor.endswith(f"[{config.model.vocab_size}, {config.model.d_model}]"):
        return False
    if moment.phase == "forward":
        return allocation.category in ("activations", "gradients")
    return config.model.tied_embeddings and allocation.category != "parameters"


def _gradients(config: Config, parameters: Sequence[Parameter], moment: Moment) -> Amount:
    """Of the blocks that the backward is done with, and of what comes after them."""
    if moment.micro_batch > 0 or moment.phase in ("clip", "optimizer"):
        return terms.gradients(parameters).size
    if moment.phase not in ("backward", "recompute"):
        return total([])
    model = config.model
    done = model.n_layers - moment.blocks
    each = parameters[0].each
    in_blocks = sum(p.count for p in parameters if p.in_block) // model.n_layers
    head = 0 if model.tied_embeddings else model.vocab_size * model.d_model
    norm = sum(p.count for p in parameters if not p.in_block and len(p.shape) == 1)
    after = head + (norm if done or moment.at_work is not None else 0)
    return total([amount(each, blocks=done, P=in_blocks), amount(each, P=after)])


def _blocks(config: Config, moment: Moment, device: Device) -> Amount:
    """All that the blocks keep; the one at work counts as a whole."""
    backward = moment.phase in ("backward", "recompute")
    saved = [saved for index in range(moment.blocks) for saved in _block(config, index, moment, device)]
    if backward and moment.at_work in recomputed_blocks(config.model.n_layers, config.activation_checkpoint):
        saved += [one.size for one in recomputed_saved(config, device)]
    return total(saved)


def _block(config: Config, index: int, moment: Moment, device: Device) -> list[Amount]:
    return [s.size for s in block_saved(config, index, device) if not (index == moment.at_work and s.name == OUTPUT)]


def _outside(config: Config, moment: Moment, device: Device) -> Amount:
    if moment.phase not in ("forward", "backward", "recompute", "step"):
        return total([])
    saved = [one.size for one in before_saved(config, device)]
    if _in_loss(config, moment):
        return total([*saved, *(one.size for one in after_saved(config, device) if one.name != LOG_PROBABILITIES)])
    if moment.phase == "forward":
        return total(saved)
    waiting = amount(_stream(config), V=config.model.vocab_size, h=config.model.d_model)
    tied = [waiting] if config.model.tied_embeddings else []
    if moment.blocks == 0:
        return total(tied * 2)  # the output's gradient, and the embedding's, which is added to it in place
    norm = [one.size for one in after_saved(config, device) if one.module == "final_norm"]
    return total([*saved, *tied, *(norm if moment.module == "final_norm" else [])])


def _stream(config: Config) -> int:
    return 2 if config.precision.mode == "bf16" else 4


def _logits(config: Config, moment: Moment) -> Amount:
    """While the loss is taken or differentiated."""
    now = moment.phase in ("forward", "backward") and _in_loss(config, moment)
    return terms.logits(config).size if now else total([])


def _operands(config: Config, moment: Moment) -> Amount:
    now = moment.phase == "forward" and _in_loss(config, moment)
    return terms.loss_operands(config).size if now else total([])


def _cache(config: Config, moment: Moment) -> Amount:
    return terms.autocast_cache(config, moment.blocks).size if moment.phase == "forward" else total([])


def _in_loss(config: Config, moment: Moment) -> bool:
    through = moment.module == "final_norm" and moment.phase != "forward"
    return moment.at_work is None and moment.blocks == config.model.n_layers and not through
