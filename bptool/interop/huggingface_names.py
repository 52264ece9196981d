"""What Hugging Face calls each tensor of the models that bptool builds, and how it is laid out.

One table maps the names in both directions. What differs beside names: GPT-2 keeps query, key and value in one matrix
(`c_attn`), and keeps a block's matrices transposed, [in, out] (its `Conv1D`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bptool.config.huggingface import huggingface_config
from bptool.config.schema import ModelSettings

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Entry:
    """One of their tensors and the parameters of ours that it holds, stacked along their first dimension.

    Attributes:
        theirs: its full name.
        ours: our names.
        rows: size of each of ours along the first dimension.
        shape: shape of theirs.
        transposed: theirs is [in, out] where ours is [out, in].
        expert: theirs is of this expert alone, and ours has all of them in its first dimension.
    """

    theirs: str
    ours: tuple[str, ...]
    rows: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool
    expert: int | None = None

    def to_ours(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our parameters, from their tensor; one expert's part, where it is of one expert alone."""
        upright = tensor.t().contiguous() if self.transposed else tensor
        return dict(zip(self.ours, upright.split(self.rows), strict=True))

    def to_theirs(self, state_dict: Mapping[str, Tensor]) -> Tensor:
        """Their tensor, from our state dict; contiguous, as safetensors wants it."""
        if self.expert is not None:
            return state_dict[self.ours[0]][self.expert].detach().contiguous()
        parts = [state_dict[name].detach() for name in self.ours]
        upright = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (upright.t() if self.transposed else upright).contiguous()


@dataclass(frozen=True)
class Names:
    """What one family calls its tensors; module names, of which each has a `.weight` and may have a `.bias`.

    Attributes:
        prefix: of all but the head's; files of the bare model leave it out.
        top: their module -> ours, outside the blocks.
        block: the prefix of a block's modules, with its number to be filled in.
        in_block: their module -> ours; several of ours are stacked along their outputs, and `{}` is an expert's number.
        transposed: a block's matrices are [in, out].
        no_parameters: ends of names that old files hold though they are no parameters.
        renamed: ends of names that do not follow from the module's, as they would -> as they are.
        outer: what stands in the prefix's place where the model is a part of a larger one.
        other_parts: beginnings of the names of that one's other parts.
    """

    prefix: str
    top: Mapping[str, str]
    block: str
    in_block: dict[str, tuple[str, ...]]
    transposed: bool
    no_parameters: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
    outer: tuple[str, ...] = ()
    other_parts: tuple[str, ...] = ()

    def full(self, name: str) -> str:
        """The name with its prefix, whether the file has it, another or none."""
        if name.endswith(HEAD) or name.startswith(self.other_parts):
            return HEAD if name.endswith(HEAD) else name
        for prefix in self.outer:
            if name.startswith(prefix):
                return self.prefix + name.removeprefix(prefix)
        return name if name.startswith(self.prefix) else self.prefix + name

    def passed_over(self, name: str) -> bool:
        """Whether a full name is none of the model's parameters, but may be in its files."""
        return name.endswith(self.no_parameters) or name.startswith(self.other_parts)

    def entries(self, settings: ModelSettings) -> dict[str, Entry]:
        """Every tensor of a model, by its full name."""
        shapes = parameter_shapes(settings)
        made: list[Entry] = []
        for theirs, modules, transposed in self._modules(settings.n_layers):
            for kind in ("weight", "bias"):
                ours = tuple(f"{name}.{kind}" for name in modules)
                if ours[0] in shapes:
                    made += _entries(self._renamed(f"{theirs}.{kind}"), ours, transposed, shapes)
        return {entry.theirs: entry for entry in made}

    def _renamed(self, name: str) -> str:
        for end, other in self.renamed.items():
            if name.endswith(end):
                return name.removesuffix(end) + other
        return name

    def _modules(self, n_layers: int) -> Iterator[tuple[str, tuple[str, ...], bool]]:
        """Their module, ours, and whether its matrix is transposed; also those that a model may lack."""
        for theirs, ours in self.top.items():
            yield self.prefix + theirs, (ours,), False
        for i in range(n_layers):
            for theirs, names in self.in_block.items():
                theirs = self.prefix + self.block.format(i) + theirs
                yield theirs, tuple(f"blocks.{i}.{name}" for name in names), self.transposed
        yield HEAD.removesuffix(".weight"), ("head",), False


_LLAMA = Names(
    prefix="model.",
    top={"embed_tokens": "embedding", "norm": "final_norm"},
    block="layers.{}.",
    in_block={
        "input_layernorm": ("attention_norm",),
        "self_attn.q_proj": ("attention.query",),
        "self_attn.k_proj": ("attention.key",),
        "self_attn.v_proj": ("attention.value",),
        "self_attn.o_proj": ("attention.output",),
        "self_attn.q_norm": ("attention.query_norm",),
        "self_attn.k_norm": ("attention.key_norm",),
        "post_attention_layernorm": ("feed_forward_norm",),
        "mlp.gate_proj": ("feed_forward.gate",),
        "mlp.up_proj": ("feed_forward.up",),
        "mlp.down_proj": ("feed_forward.down",),
    },
    transposed=False,
    no_parameters=(".rotary_emb.inv_freq",),
)
# With a norm after each branch, the name of Llama's second norm is that of the one after attention.
_GEMMA2 = replace(
    _LLAMA,
    in_block=_LLAMA.in_block
    | {
        "post_attention_layernorm": ("attention_post_norm",),
        "pre_feedforward_layernorm": ("feed_forward_norm",),
        "post_feedforward_layernorm": ("feed_forward_post_norm",),
    },
)
_QWEN3_MOE = replace(
    _LLAMA,
    in_block=_LLAMA.in_block
    | {
        "mlp.gate": ("feed_forward.router",),
        **{f"mlp.experts.{{}}.{name}_proj": (f"feed_forward.experts.{name}",) for name in ("gate", "up", "down")},
    },
)
_MIXTRAL = replace(
    _LLAMA,
    in_block=_LLAMA.in_block
    | {
        "block_sparse_moe.gate": ("feed_forward.router",),
        "block_sparse_moe.experts.{}.w1": ("feed_forward.experts.gate",),
        "block_sparse_moe.experts.{}.w2": ("feed_forward.experts.down",),
        "block_sparse_moe.experts.{}.w3": ("feed_forward.experts.up",),
    },
)
_DEEPSEEK = replace(
    _QWEN3_MOE,
    in_block=_QWEN3_MOE.in_block
    | {
        "self_attn.q_a_proj": ("attention.query_down",),
        "self_attn.q_a_layernorm": ("attention.query_latent_norm",),
        "self_attn.q_b_proj": ("attention.query_up",),
        "self_attn.kv_a_proj_with_mqa": ("attention.key_value_down",),
        "self_attn.kv_a_layernorm": ("attention.key_value_latent_norm",),
        "self_attn.kv_b_proj": ("attention.key_value_up",),
        **{f"mlp.shared_experts.{name}_proj": (f"feed_forward.shared.{name}",) for name in ("gate", "up", "down")},
    },
    renamed={"mlp.gate.bias": "mlp.gate.e_score_correction_bias"},
    # The released model's head for the token after the next, which is no part of the main model.
    other_parts=("model.layers.61.",),
)

NAMES: Mapping[str, Names] = {
    "gpt2": Names(
        prefix="transformer.",
        top={"wte": "embedding", "wpe": "position", "ln_f": "final_norm"},
        block="h.{}.",
        in_block={
            "ln_1": ("attention_norm",),
            "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
            "attn.c_proj": ("attention.output",),
            "ln_2": ("feed_forward_norm",),
            "mlp.c_fc": ("feed_forward.up",),
            "mlp.c_proj": ("feed_forward.down",),
        },
        transposed=True,
        no_parameters=(".attn.bias", ".attn.masked_bias"),
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    "gemma2": _GEMMA2,
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
    "deepseek_v3": _DEEPSEEK,
    # Files of the models that also see hold the language model below a name of its own.
    "gemma3_text": replace(
        _GEMMA2,
        outer=("language_model.model.", "model.language_model.", "language_model."),
        other_parts=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    ),
}


def names_of(settings: ModelSettings) -> Names:
    """The names of the family that can express `settings`.

    Raises:
        UsageError: no family can.
    """
    return NAMES[huggingface_config(settings)["model_type"]]


def parameter_shapes(settings: ModelSettings) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a `Transformer(settings)`, by name; nothing is built."""
    width, vocabulary = settings.d_model, settings.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocabulary, width)}
    if settings.position == "learned":
        shapes["position.weight"] = (settings.context_length, width)
    for i in range(settings.n_layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in _block_shapes(settings, i)}
    shapes |= {f"final_norm.{kind}": (width,) for kind in _norm_kinds(settings)}
    if not settings.tied_embeddings:
        shapes["head.weight"] = (vocabulary, width)
    return shapes


def _norm_kinds(settings: ModelSettings) -> tuple[str, ...]:
    match settings.norm:
        case "layernorm":
            return ("weight", "bias")[: 1 + settings.bias]
        case "none":
            return ()
        case _:
            return ("weight",)


def _block_shapes(settings: ModelSettings, block: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    branch = _expert_shapes(settings) if settings.has_experts(block) else _feed_forward_shapes(settings)
    for name, shape, biased in [*_attention_shapes(settings), *branch]:
        yield f"{name}.weight", shape
        if biased:
            yield f"{name}.bias", shape[:1]
    after = ("attention_post_norm", "feed_forward_post_norm") if settings.post_norm else ()
    for norm in ("attention_norm", "feed_forward_norm", *after):
        for kind in _norm_kinds(settings):
            yield f"{norm}.{kind}", (settings.d_model,)


def _attention_shapes(settings: ModelSettings) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, the weight's shape, and whether there is a bias."""
    if settings.mla.kv_rank:
        yield from _latent_attention_shapes(settings)
        return
    width, bias = settings.d_model, settings.bias
    query, kept = settings.n_heads * settings.head_dim, settings.n_kv_heads * settings.head_dim
    for name, rows in (("query", query), ("key", kept), ("value", kept)):
        yield f"attention.{name}", (rows, width), bias or settings.qkv_bias
    yield "attention.output", (width, query), bias
    if settings.qk_norm:
        yield "attention.query_norm", (settings.head_dim,), False
        yield "attention.key_norm", (settings.head_dim,), False


def _latent_attention_shapes(settings: ModelSettings) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    width, n_heads, mla = settings.d_model, settings.n_heads, settings.mla
    queries = n_heads * settings.head_dim
    if mla.q_rank:
        yield "attention.query_down", (mla.q_rank, width), False
        yield "attention.query_latent_norm", (mla.q_rank,), False
        yield "attention.query_up", (queries, mla.q_rank), False
    else:
        yield "attention.query", (queries, width), False
    yield "attention.key_value_down", (mla.kv_rank + mla.rope_dim, width), False
    yield "attention.key_value_latent_norm", (mla.kv_rank,), False
    yield "attention.key_value_up", (n_heads * (mla.nope_dim + mla.value_dim), mla.kv_rank), False
    yield "attention.output", (width, n_heads * mla.value_dim), False


def _feed_forward_shapes(settings: ModelSettings) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    width, inner, bias = settings.d_model, settings.d_ff, settings.bias
    if settings.gated:
        yield "feed_forward.gate", (inner, width), bias
    yield "feed_forward.up", (inner, width), bias
    yield "feed_forward.down", (width, inner), bias


def _expert_shapes(settings: ModelSettings) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    width, moe = settings.d_model, settings.moe
    # The router's bias is the sigmoid's kept correction.
    yield "feed_forward.router", (moe.n_experts, width), moe.router == "sigmoid"
    inward = ("gate", "up") if settings.gated else ("up",)
    for kind, inner, stack in (
        ("experts", moe.d_expert, (moe.n_experts,)),
        ("shared", moe.n_shared * moe.d_expert, ()),
    ):
        if inner:
            for name in inward:
                yield f"feed_forward.{kind}.{name}", (*stack, inner, width), False
            yield f"feed_forward.{kind}.down", (*stack, width, inner), False


def _entries(
    theirs: str, ours: tuple[str, ...], transposed: bool, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Entry]:
    """The one tensor of theirs that holds ours, or one for each expert."""
    if "{}" in theirs:
        n_experts, *shape = shapes[ours[0]]
        for expert in range(n_experts):
            yield Entry(theirs.format(expert), ours, (shape[0],), tuple(shape), transposed=False, expert=expert)
        return
    rows = tuple(shapes[name][0] for name in ours)
    shape = [sum(rows), *shapes[ours[0]][1:]]
    transposed = transposed and len(shape) == 2
    yield Entry(theirs, ours, rows, tuple(reversed(shape) if transposed else shape), transposed)
