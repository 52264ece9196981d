"""What the built-in model's forward keeps for its backward, tensor by tensor, in closed form.

The plain block alone: LayerNorm or RMSNorm, attention of one kind in all layers, one feed-forward. The list is what
PyTorch's derivatives save (`tools/autograd/derivatives.yaml`), each storage once, with the copies that autocast and the
module's own code make in between.

Symbols: b sequences of a micro-batch, s tokens of a sequence, h model width, a query heads, k key and value heads,
d head width, f inner width of the feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from bptool.analysis.closed_forms.formula import Amount, amount
from bptool.config.schema import Config, ModelSettings
from bptool.training.activation_checkpoint import recomputed_blocks

OUTPUT = "output, the next norm's input"
"""Name of what a block hands on."""

WEIGHT_COPY = "16-bit copy of the weight"
"""Name of what autocast keeps of each linear layer until its backward."""

LOG_PROBABILITIES = "log-probabilities"
WEIGHT_GRADIENT = "gradient of the output weights"
"""Names of what the plain and the fused loss keep."""

SCALE = "scale of the scores"
SHARE = "the micro-batch's share of the step"
"""Names of the Python numbers that a product keeps; a GPU's are in host memory."""

RNG_STATE_BYTES = 5056
"""What `torch.get_rng_state` returns: the CPU generator's Mersenne twister, as PyTorch packs it."""

Device = Literal["cpu", "cuda", "cuda-cudnn"]
"""Whose kernels: `cuda` has flash attention in 16 bits and efficient attention in float32, `cuda-cudnn` cuDNN's."""

_NUMBER = "autograd keeps a product's other factor, a Python number too"


@dataclass(frozen=True)
class Saved:
    """One storage that outlives the forward.

    Attributes:
        name: what it is.
        module: dotted name of what makes it; in a block below the block, and empty for the block itself.
        size: bytes and formula.
        reason: why it is kept, where the paper's count of a layer has no such tensor.
    """

    name: str
    module: str
    size: Amount
    reason: str = ""


@dataclass(frozen=True)
class Layout:
    """A config's sizes in one place.

    Attributes:
        stream: bytes of an element of the residual stream.
        product: bytes of an element where matrices are multiplied.
        device: whose kernels.
    """

    config: Config
    stream: int
    product: int
    device: Device

    @property
    def model(self) -> ModelSettings:
        """`[model]`."""
        return self.config.model

    @property
    def cuda(self) -> bool:
        """Whether the kernels are CUDA's."""
        return self.device != "cpu"

    @property
    def mixed(self) -> bool:
        """Whether autocast makes 16-bit copies."""
        return self.product < self.stream

    @property
    def keeps_norm_input(self) -> bool:
        """Whether a norm's backward reads the residual stream itself, and not a float32 copy that it made."""
        return self.cuda or not (self.model.norm == "rmsnorm" and self.stream == 2)

    def noise(self, module: str, size: Callable[[int], Amount], each: int) -> Saved:
        """What dropout keeps to be repeated: a CPU the factor of each element, CUDA a byte."""
        if self.cuda:
            return Saved("dropout's noise", module, size(1))
        return Saved("dropout's noise", module, size(each), "a CPU keeps numbers where CUDA keeps one byte")

    def wide(self, each: int, **width: int) -> Amount:
        """A tensor with `width` for each token."""
        training = self.config.training
        return amount(each, b=training.micro_batch_size, s=training.sequence_length, **width)

    def hidden(self, each: int) -> Amount:
        """A tensor as wide as the model."""
        return self.wide(each, h=self.model.d_model)

    def inner(self, each: int) -> Amount:
        """A tensor as wide as the feed-forward's inside."""
        return self.wide(each, f=self.model.d_ff)

    def queries(self, each: int) -> Amount:
        """A tensor of all query heads."""
        return self.wide(each, a=self.model.n_heads, d=self.model.head_dim)

    def keys(self, each: int) -> Amount:
        """A tensor of all key or value heads."""
        return self.wide(each, k=self.model.n_kv_heads, d=self.model.head_dim)

    def scores(self, each: int) -> Amount:
        """One number for each query head and pair of tokens."""
        s = self.config.training.sequence_length
        return self.wide(each, s_2=s, a=self.model.n_heads)


def layout(config: Config, device: Device = "cpu") -> Layout:
    """What `precision.mode` makes of the sizes."""
    mode = config.precision.mode
    stream = 2 if mode == "bf16" else 4
    return Layout(config, stream, 4 if mode in ("fp32", "tf32") else 2, device)


def block_saved(config: Config, index: int, device: Device = "cpu") -> list[Saved]:
    """What block `index` has made and still holds when the forward ends.

    Its output is its own; what it was given is the block's before it.
    """
    sizes = layout(config, device)
    recomputed = recomputed_blocks(config.model.n_layers, config.activation_checkpoint)
    kept = [] if index in recomputed else list(_block(sizes))
    if index in recomputed and not sizes.cuda:  # CUDA's stays in host memory too
        kept += _scale(sizes)  # the hooks that checkpoint() drops tensors with are not shown it
        kept.append(Saved("random state, to replay dropout", "", amount(RNG_STATE_BYTES), "checkpoint() saves it"))
    if index + 1 in recomputed or sizes.keeps_norm_input:
        kept.append(Saved(OUTPUT, "", sizes.hidden(sizes.stream), _wide_stream(sizes)))
    return kept


def recomputed_saved(config: Config, device: Device = "cpu") -> list[Saved]:
    """What a block holds once the backward has computed it again."""
    return list(_block(layout(config, device)))


def before_saved(config: Config, device: Device = "cpu") -> list[Saved]:
    """The same of what is before the blocks."""
    return list(_before(layout(config, device)))


def after_saved(config: Config, device: Device = "cpu") -> list[Saved]:
    """The same of what is after them: the last norm and the loss."""
    sizes = layout(config, device)
    return [*_norm(sizes, "final_norm"), *_loss(sizes)]


def _wide_stream(sizes: Layout) -> str:
    return "under autocast the residual stream stays float32" if sizes.mixed else ""


def _block(sizes: Layout) -> Iterator[Saved]:
    """All but the output."""
    yield from _norm(sizes, "attention_norm")
    yield from _attention(sizes)
    if sizes.keeps_norm_input:
        yield Saved(
            "stream after attention, the next norm's input", "", sizes.hidden(sizes.stream), _wide_stream(sizes)
        )
    yield from _norm(sizes, "feed_forward_norm")
    yield from _feed_forward(sizes)


def _norm(sizes: Layout, module: str) -> Iterator[Saved]:
    """Of a norm over the model's width; its output is there where the layers after it read it as it is."""
    if sizes.model.norm == "layernorm":
        each = 4 if sizes.cuda else sizes.stream
        yield Saved("mean of each row", module, sizes.wide(each))
        yield Saved("1/deviation of each row", module, sizes.wide(each))
    else:
        if not sizes.keeps_norm_input:
            yield Saved("float32 copy of the input", module, sizes.hidden(4), "RMSNorm works in float32")
        yield Saved("1/rms of each row", module, sizes.wide(4))
        if not sizes.cuda:
            yield Saved("normalised input", module, sizes.hidden(4), "its product with the weight needs it")
    plain_loss = sizes.config.training.loss == "plain"
    if not sizes.mixed and (module != "final_norm" or plain_loss):
        yield Saved("output, the next layers' input", module, sizes.hidden(sizes.stream))


def _input_cast(sizes: Layout, module: str) -> Iterator[Saved]:
    """Of the linear layers that read one input."""
    if sizes.mixed:
        yield Saved("16-bit copy of the input", module, sizes.hidden(2), "the stream is float32, the products are not")


def _weight_cast(sizes: Layout, module: str, weight: Amount) -> Iterator[Saved]:
    if sizes.mixed:
        yield Saved(WEIGHT_COPY, module, weight, "autocast's copies of the weights, for the backward")


def _attention(sizes: Layout) -> Iterator[Saved]:
    model = sizes.model
    queries = {"h": model.d_model, "a": model.n_heads, "d": model.head_dim}
    keys = {"h": model.d_model, "k": model.n_kv_heads, "d": model.head_dim}
    yield from _input_cast(sizes, "attention")
    for name, weight in (("query", queries), ("key", keys), ("value", keys)):
        yield from _weight_cast(sizes, f"attention.{name}", amount(2, **weight))
    if model.qk_norm:
        yield from _head_norms(sizes)
    if model.attention == "eager":
        yield from _eager_attention(sizes)
    else:
        yield from _unfused_attention(sizes) if model.dropout and not sizes.cuda else _fused_attention(sizes)
    yield from _weight_cast(sizes, "attention.output", amount(2, **queries))
    yield from _branch_dropout(sizes)


def _head_norms(sizes: Layout) -> Iterator[Saved]:
    model = sizes.model
    each = sizes.stream if sizes.cuda else 4
    for name, heads in (("query", {"a": model.n_heads}), ("key", {"k": model.n_kv_heads})):
        module = f"attention.{name}_norm"
        maker = f"attention.{name}" if sizes.product == each else module
        yield Saved("input", maker, sizes.wide(each, **heads, d=model.head_dim), "RMSNorm works in float32")
        yield Saved("1/rms of each head", module, sizes.wide(4, **heads))
        if not sizes.cuda:
            size = sizes.wide(4, **heads, d=model.head_dim)
            yield Saved("normalised input", module, size, "its weight's gradient needs it")


def _maker(sizes: Layout, name: str) -> str:
    """Where what attention reads as its queries or keys was made."""
    if sizes.model.position == "rope" or (sizes.model.qk_norm and sizes.mixed):
        return "attention"
    return f"attention.{name}_norm" if sizes.model.qk_norm else f"attention.{name}"


def _fused_attention(sizes: Layout) -> Iterator[Saved]:
    model, c = sizes.model, sizes.product
    # CUDA's only fused float32 kernel knows no groups of heads, so the module copies keys and values to each.
    copied = sizes.cuda and c == 4 and model.n_kv_heads < model.n_heads
    keys = sizes.queries(c) if copied else sizes.keys(c)
    yield Saved("query", _maker(sizes, "query"), sizes.queries(c))
    yield Saved("key", "attention" if copied else _maker(sizes, "key"), keys)
    yield Saved("value", "attention" if copied else "attention.value", keys)
    yield Saved("attention's output", "attention", sizes.queries(c))
    yield Saved("log of each softmax's sum", "attention", _log_sums(sizes))
    if sizes.device == "cuda" and c == 2:
        yield Saved(
            "seed of the kernel's dropout", "attention", amount(16), "flash attention has it without dropout too"
        )
        yield Saved(
            "offset of the kernel's dropout", "attention", amount(8), "flash attention has it without dropout too"
        )
    if (model.position == "rope" or model.qk_norm) and not (sizes.cuda and c == 4):
        yield Saved("the output in the order of tokens", "attention", sizes.queries(c), "heads were apart until here")


def _log_sums(sizes: Layout) -> Amount:
    training = sizes.config.training
    s = training.sequence_length
    if sizes.cuda and sizes.product == 4:
        s = -(-s // 32) * 32  # efficient attention pads its rows (attention.cu)
    return amount(4, b=training.micro_batch_size, s=s, a=sizes.model.n_heads)


def _unfused_attention(sizes: Layout) -> Iterator[Saved]:
    """What scaled_dot_product_attention falls back to (attention.cpp, `_scaled_dot_product_attention_math`)."""
    reason = "a CPU has no fused attention with dropout; PyTorch writes it out, in float32"
    for name in ("query", "key", "value"):
        yield Saved(f"{name}, a float32 copy for each query head", "attention", sizes.queries(4), reason)
    yield Saved("softmax", "attention", sizes.scores(4), reason)
    yield sizes.noise("attention", sizes.scores, 4)
    yield Saved("attention weights after dropout", "attention", sizes.scores(4), reason)
    yield Saved("the output in the order of tokens", "attention", sizes.queries(sizes.product))


def _eager_attention(sizes: Layout) -> Iterator[Saved]:
    model, c, s = sizes.model, sizes.product, sizes.config.training.sequence_length
    query = _maker(sizes, "query") if model.qk_norm else "attention"
    yield Saved("query", query, sizes.queries(c))
    yield Saved("key, a copy for each query head", "attention", sizes.queries(c))
    yield Saved("value, a copy for each query head", "attention", sizes.queries(c))
    yield from _scale(sizes)
    yield Saved("mask of the future", "attention", amount(1, s=s, s_2=s))
    yield Saved("softmax", "attention", sizes.scores(4), "softmax is taken in float32")
    if model.dropout:
        yield sizes.noise("attention", sizes.scores, c)
    if model.dropout or c == 2:
        yield Saved("attention weights, as multiplied with the values", "attention", sizes.scores(c))
    yield Saved("the output in the order of tokens", "attention", sizes.queries(c))


def _scale(sizes: Layout) -> Iterator[Saved]:
    if sizes.model.attention == "eager" and not sizes.cuda:
        yield Saved(SCALE, "attention", amount(8), _NUMBER)


def _feed_forward(sizes: Layout) -> Iterator[Saved]:
    model, c = sizes.model, sizes.product
    weight = amount(2, h=model.d_model, f=model.d_ff)
    gated = model.activation == "swiglu"
    yield from _input_cast(sizes, "feed_forward" if gated else "feed_forward.up")
    if gated:
        yield from _weight_cast(sizes, "feed_forward.gate", weight)
        yield Saved("gate, the input of SiLU", "feed_forward.gate", sizes.inner(c))
        yield Saved("SiLU's output", "feed_forward", sizes.inner(c))
    yield from _weight_cast(sizes, "feed_forward.up", weight)
    if model.activation != "relu":
        yield Saved("up's output", "feed_forward.up", sizes.inner(c))
    yield Saved("input of down", "feed_forward", sizes.inner(c))
    yield from _weight_cast(sizes, "feed_forward.down", weight)
    yield from _branch_dropout(sizes)


def _branch_dropout(sizes: Layout) -> Iterator[Saved]:
    if sizes.model.dropout:
        yield sizes.noise("dropout", sizes.hidden, sizes.product)


def _before(sizes: Layout) -> Iterator[Saved]:
    model = sizes.model
    first_recomputed = 0 in recomputed_blocks(model.n_layers, sizes.config.activation_checkpoint)
    if sizes.model.dropout:
        yield sizes.noise("dropout", sizes.hidden, sizes.stream)
    if sizes.keeps_norm_input or first_recomputed:
        yield Saved("embeddings, the first block's input", "embedding", sizes.hidden(sizes.stream))
    if model.position == "rope":
        for name in ("cosines", "sines"):
            angles = amount(2, s=sizes.config.training.sequence_length, d=model.head_dim)
            yield Saved(f"{name} of the rotation", "", angles)


def _loss(sizes: Layout) -> Iterator[Saved]:
    model, training = sizes.model, sizes.config.training
    if training.loss == "fused":
        yield Saved("gradient of the loss's input", "loss", sizes.hidden(sizes.stream), "made in the forward")
        yield Saved(WEIGHT_GRADIENT, "loss", amount(4, V=model.vocab_size, h=model.d_model), "summed in float32")
    else:
        if sizes.mixed:
            yield Saved("16-bit copy of the loss's input", "loss", sizes.hidden(2))
            yield Saved("16-bit copy of the output weights", "loss", amount(2, V=model.vocab_size, h=model.d_model))
        yield Saved(LOG_PROBABILITIES, "loss", sizes.wide(4, V=model.vocab_size), "taken in float32")
        yield Saved("targets", "loss", sizes.wide(8))
        yield Saved("number of targets in the sum", "loss", amount(4))
    yield Saved("number of valid targets", "loss", amount(8))
    yield Saved("loss", "loss", amount(4))
    if training.gradient_accumulation_steps > 1 and not sizes.cuda:
        yield Saved(SHARE, "loss", amount(8), _NUMBER)
