"""What a training step holds, in closed form: the formulas that people plan memory with, made from a config alone.

Symbols: P parameters, T parameter tensors, M Muon's and R the rest, G micro-batches of a step, C tokens of the loss's
chunk; and those of `saved_tensors`: b, s, h, a, k, d, f, V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from bptool.analysis.closed_forms.formula import Amount, amount, total
from bptool.analysis.closed_forms.saved_tensors import Device, layout
from bptool.config.keys import dotted, fields
from bptool.config.schema import Config, ModelSettings
from bptool.model.loss import chunk_tokens
from bptool.training.activation_checkpoint import keeps_casts
from bptool.training.optimizers import implementation_flags

KORTHIKANTI = 'Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"'
ZERO = 'Rajbhandari et al. 2020, "ZeRO", section 3.1'
DERIVATIVES = "what PyTorch's derivatives save, tensor by tensor"


@dataclass(frozen=True)
class Term:
    """One closed form: its name, bytes with their formula, and where it comes from."""

    name: str
    size: Amount
    source: str


@dataclass(frozen=True)
class Parameter:
    """A weight: its shape, whether it is inside a block, bytes of an element."""

    shape: tuple[int, ...]
    in_block: bool
    each: int = 4

    @property
    def count(self) -> int:
        """Number of its elements."""
        return prod(self.shape)


_ANY: Any = object()
COVERED: dict[str, Any] = {
    **dict.fromkeys(
        (
            *(
                f"model.{key}"
                for key in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size")
            ),
            *(
                f"model.{key}"
                for key in ("context_length", "norm_eps", "bias", "qk_norm", "tied_embeddings", "dropout")
            ),
            *(f"model.{key}" for key in ("weights", "init_std")),
            *(f"model.rope.{key}" for key in ("theta", "scaling", "factor", "low_frequency_factor")),
            *(f"model.rope.{key}" for key in ("high_frequency_factor", "original_context_length")),
            *(f"training.{key}" for key in ("steps", "micro_batch_size", "gradient_accumulation_steps")),
            *(f"training.{key}" for key in ("sequence_length", "clip_norm", "device", "compile")),
            *(f"optimizer.{key}" for key in ("lr", "weight_decay", "beta1", "beta2", "eps", "momentum", "nesterov")),
            *("optimizer.implementation", "activation_checkpoint.every"),
            *("activation_checkpoint.budget", "activation_checkpoint.plan"),  # the policy says whether they count
        ),
        _ANY,
    ),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.position": ("learned", "rope", "none"),
    "model.activation": ("gelu", "gelu-tanh", "relu", "swiglu"),
    "model.residual": (True,),
    "model.attention": ("sdpa", "eager"),
    "training.loss": ("fused", "plain"),
    "optimizer.name": ("gradient-descent", "sgd", "adam", "adamw", "muon", "adafactor"),
    "precision.bf16_update": ("nearest", "stochastic", "master"),
    "precision.mode": ("fp32", "tf32", "bf16-mixed", "bf16", "fp16-mixed"),
    "activation_checkpoint.policy": ("none", "full", "every_k"),
}
"""Dotted keys that the closed forms read or need not read, with the values that they know."""

_NO_MATTER = ("run", "data", "schedule", "checkpoint", "evaluation", "logging", "gradients")
"""Sections that change nothing in a step's memory."""


def uncovered(config: Config, device: Device = "cpu") -> list[str]:
    """What the closed forms do not know: `model.norm = 'none'`. Keys that came after them count where they are set."""
    usual = {"model.query_scale_dim": config.model.head_dim}  # `auto`, which is a number by now
    unknown = [
        f"{key} = {value!r}"
        for key, value in dotted(config).items()
        if key.split(".")[0] not in _NO_MATTER and usual.get(key) != value and not _is_covered(key, value)
    ]
    multiple = 8 if layout(config).product == 2 else 4
    if device != "cpu" and config.model.attention == "sdpa" and config.model.head_dim % multiple:
        unknown.append(f"model.head_dim = {config.model.head_dim}, which CUDA's attention kernels do not take as it is")
    return unknown


def _is_covered(key: str, value: Any) -> bool:
    allowed = COVERED.get(key)
    if allowed is None:
        return bool(key in fields() and value == fields()[key].default)
    return allowed is _ANY or value in allowed


def parameters_of(config: Config) -> list[Parameter]:
    """Every weight of the built-in model."""
    model = config.model
    each, h = layout(config).stream, model.d_model
    norms = 0 if model.norm == "none" else 2 if model.norm == "layernorm" and model.bias else 1
    outside = [(model.vocab_size, h)]
    outside += [(model.context_length, h)] if model.position == "learned" else []
    outside += [] if model.tied_embeddings else [(model.vocab_size, h)]
    vectors = [(h,)] * norms
    inside = [*_matrices(model), *vectors, *vectors, *([(model.head_dim,)] * 2 if model.qk_norm else [])]
    blocks = [Parameter(shape, True, each) for shape in inside] * model.n_layers
    return [Parameter(shape, False, each) for shape in (*outside, *vectors)] + blocks


def _matrices(model: ModelSettings) -> list[tuple[int, ...]]:
    h, queries, keys = model.d_model, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    up = [(model.d_ff, h)] * (2 if model.activation == "swiglu" else 1)
    matrices = [(queries, h), (keys, h), (keys, h), (h, queries), *up, (h, model.d_ff)]
    return [*matrices, *([(rows,) for rows, _ in matrices] if model.bias else [])]


def weights(parameters: Sequence[Parameter]) -> Term:
    """All of them."""
    return Term("weights", _each_parameter("P", parameters), "parameters x bytes of their format")


def gradients(parameters: Sequence[Parameter]) -> Term:
    """One of each, in its parameter's format."""
    return Term("gradients", _each_parameter("P", parameters), "one for each parameter, in its format")


def optimizer_state(config: Config, parameters: Sequence[Parameter], device: Device = "cpu") -> Term:
    """What the update rule remembers, and the float32 copies of bf16 weights, should it have some."""
    copied = [p for p in parameters if p.each == 2] if config.precision.bf16_update == "master" else []
    if not copied:
        return _rule_state(config, parameters, device)
    wide = [replace(p, each=4) if p.each == 2 else p for p in parameters]
    rule = _rule_state(config, wide, device)
    source = f"{rule.source}; float32 copies of the weights, and all of it in float32"
    return Term(rule.name, _each_parameter("P", [replace(p, each=4) for p in copied]) + rule.size, source)


def _rule_state(config: Config, parameters: Sequence[Parameter], device: Device) -> Term:
    """What the update rule remembers, in the parameters' format, and a step counter of 4 bytes for each tensor.

    A GPU holds the counters of fused kernels alone; the others' stay in host memory (`_init_group` of
    torch/optim/adam.py and of torch/optim/_adafactor.py).
    """
    name = config.optimizer.name
    on_host = device != "cpu" and (name == "adafactor" or not implementation_flags(config.optimizer)["fused"])

    def counters(counted: Sequence[Parameter]) -> Amount:
        return total([] if on_host else [amount(4, T=len(counted))])

    if name == "gradient-descent" or (name == "sgd" and config.optimizer.momentum == 0):
        return Term("optimizer state", total([]), "plain gradient descent remembers nothing")
    if name == "sgd":
        return Term("optimizer state", _each_parameter("P", parameters), "SGD: a momentum for each parameter")
    if name == "adafactor":
        source = 'Shazeer and Stern 2018, "Adafactor": row and column sums of matrices, vectors whole'
        return Term("optimizer state", _adafactor(parameters) + counters(parameters), source)
    if name == "muon":
        hidden = [p for p in parameters if p.in_block and len(p.shape) == 2]
        rest = [p for p in parameters if not (p.in_block and len(p.shape) == 2)]
        size = _each_parameter("M", hidden) + _moments("R", rest) + counters(rest)
        return Term("optimizer state", size, "Muon: a momentum for hidden matrices (M); AdamW's two for the rest (R)")
    source = f"{ZERO}: two moments" + ("" if on_host else "; and a counter for each tensor")
    return Term("optimizer state", _moments("P", parameters) + counters(parameters), source)


def _moments(symbol: str, parameters: Sequence[Parameter]) -> Amount:
    return total(amount(2 * each, **{symbol: _count(group)}) for each, group in _by_format(parameters))


def _adafactor(parameters: Sequence[Parameter]) -> Amount:
    """A row's and a column's sum over the last two dimensions; a tensor of one dimension keeps them all."""
    sizes = []
    for each, group in _by_format(parameters):
        matrices = [p.shape for p in group if len(p.shape) > 1]
        rows = sum(prod(shape[:-1]) for shape in matrices)
        columns = sum(prod(shape[:-2]) * shape[-1] for shape in matrices)
        vectors = _count([p for p in group if len(p.shape) < 2])
        sizes += [amount(each, rows=rows), amount(each, columns=columns), amount(each, vectors=vectors)]
    return total(sizes)


def _each_parameter(symbol: str, parameters: Sequence[Parameter]) -> Amount:
    return total(amount(each, **{symbol: _count(group)}) for each, group in _by_format(parameters))


def _by_format(parameters: Sequence[Parameter]) -> list[tuple[int, list[Parameter]]]:
    formats = sorted({p.each for p in parameters})
    return [(each, [p for p in parameters if p.each == each]) for each in formats]


def _count(parameters: Sequence[Parameter]) -> int:
    return sum(p.count for p in parameters)


def bytes_per_parameter(
    config: Config, parameters: Sequence[Parameter], device: Device = "cpu"
) -> list[tuple[str, float]]:
    """The recipe's bytes for each parameter: fp32 AdamW's are 4 + 4 + 8, pure bf16's 2 + 2 + 4."""
    count = max(_count(parameters), 1)
    terms = weights(parameters), gradients(parameters), optimizer_state(config, parameters, device)
    return [(term.name, term.size.n_bytes / count) for term in terms]


def inputs(config: Config) -> Term:
    """Token ids and targets of all the step's micro-batches, 8 bytes each."""
    training = config.training
    count, b, s = training.gradient_accumulation_steps, training.micro_batch_size, training.sequence_length
    if b == 1:
        size = Amount(((8, (("G", count), ("(s+1)", s + 1))),))
        return Term("inputs", size, "ids of 8 bytes, of every micro-batch; one sequence's targets are the ids, shifted")
    return Term("inputs", amount(2 * 8, G=count, b=b, s=s), "ids and targets of 8 bytes, of every micro-batch")


def logits(config: Config) -> Term:
    """All that is as wide as the vocabulary, for each token, when most of it is there.

    Plain: float32 log-probabilities, their gradient and the logits' gradient at once in the backward. Fused: one
    chunk's float32 logits, which become their own gradient, and beside them a 16-bit copy where products are in 16 bit.
    """
    sizes, vocab_size = layout(config), config.model.vocab_size
    if config.training.loss == "plain":
        return Term("logits at their most", sizes.wide(12, V=vocab_size), "plain loss: three times in float32")
    each = 4 if sizes.product == 4 else 6
    source = "fused loss: one chunk's, in float32" + (", and a 16-bit copy" if each == 6 else "")
    return Term("logits at their most", amount(each, C=chunk_of(config), V=vocab_size), source)


def loss_operands(config: Config) -> Term:
    """What the loss multiplies, while it does: the last norm's output and autocast's copies, where none is kept."""
    sizes, training = layout(config), config.training
    saved = training.loss == "plain"
    operands = [] if saved and not sizes.mixed else [sizes.hidden(sizes.stream)]
    if sizes.mixed and not saved:
        operands += [sizes.hidden(2), amount(2, V=config.model.vocab_size, h=config.model.d_model)]
    if sizes.product == 4 and not saved:  # in 16 bit the most is there before these
        operands.append(amount(8, C=chunk_of(config), h=config.model.d_model))
    source = "the last norm's output, and autocast's copies or a chunk's gradient, before and after masking"
    return Term("the loss's operands", total(operands), source)


def autocast_cache(config: Config, blocks: int) -> Term:
    """16-bit copies that only autocast holds, until its end, after the forward of so many blocks.

    Of biases, which no backward reads; where blocks are recomputed there is no cache.
    """
    biases = sum(prod(shape) for shape in _matrices(config.model) if len(shape) == 1)
    cached = biases and layout(config).mixed and keeps_casts(config.activation_checkpoint)
    used = [amount(2, blocks=blocks, biases=biases)] if cached else []
    return Term("autocast's cache", total(used), "autocast keeps 16-bit copies of parameters until the forward ends")


def chunk_of(config: Config) -> int:
    """Tokens whose logits are there at once: a chunk's, or all of them with the plain loss."""
    training, model = config.training, config.model
    tokens = training.micro_batch_size * training.sequence_length
    return tokens if training.loss == "plain" else chunk_tokens(tokens, model.vocab_size, model.d_model)


def is_gpt_layer(config: Config) -> bool:
    """Whether the paper's count is of such a layer: plain heads, an inner width of 4 h, GELU."""
    model = config.model
    whole_heads = model.n_kv_heads == model.n_heads and model.n_heads * model.head_dim == model.d_model
    return whole_heads and model.d_ff == 4 * model.d_model and model.activation.startswith("gelu")


def paper_layers(config: Config, *, recomputed: bool) -> list[Term]:
    """A GPT layer's activations with 16-bit numbers and dropout, as Korthikanti et al. count them.

    Fused attention does what they call selective recomputation: it makes the scores again in the backward.
    """
    sizes = layout(config)
    if recomputed:
        return [Term("a GPT layer, recomputed", sizes.hidden(2), f"{KORTHIKANTI}, section 5")]
    linear = sizes.hidden(34)
    whole = Term("a GPT layer", linear + sizes.scores(5), f"{KORTHIKANTI}, eq. 2: s·b·h·(34 + 5·a·s/h)")
    if config.model.attention == "eager":
        return [whole]
    return [whole, Term("a GPT layer, attention recomputed", linear, f"{KORTHIKANTI}, section 5: 34·s·b·h")]
