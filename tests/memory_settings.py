"""Settings whose peak is predicted and measured on a CPU: what is asserted to the byte, and printed as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHAPE = {
    "model.n_layers": 1,
    "model.d_model": 64,
    "model.d_ff": 128,
    "model.context_length": 32,
    "model.vocab_size": 128,
}
DEEP = {"model.n_layers": 3, "model.context_length": 64, "training.micro_batch_size": 4}
WIDE = {"model.d_model": 128, "model.n_heads": 4, "model.n_kv_heads": 2, "model.d_ff": 256, "model.context_length": 208}
LARGE_VOCABULARY = {"model.vocab_size": 2000, "training.micro_batch_size": 4, "training.loss": "plain"}
EAGER = {"model.attention": "eager"}
PLAIN = {"training.loss": "plain"}
GPT = {"model.norm": "layernorm", "model.position": "learned", "model.activation": "gelu", "model.bias": True}
BF16, MIXED, FP16 = ({"precision.mode": mode} for mode in ("bf16", "bf16-mixed", "fp16-mixed"))
STOCHASTIC, MASTER = (BF16 | {"precision.bf16_update": update} for update in ("stochastic", "master"))
BRIEF = {"training.micro_batch_size": 1, "model.context_length": 4}
"""So few tokens that the peak is the optimizer's."""
FULL = {"activation_checkpoint.policy": "full"}
EVERY_2 = {"activation_checkpoint.policy": "every_k", "activation_checkpoint.every": 2}
DROPOUT = {"model.dropout": 0.1}


def optimizer(name: str, implementation: str = "auto") -> dict[str, Any]:
    return {"optimizer.name": name, "optimizer.implementation": implementation}


def accumulated(count: int) -> dict[str, Any]:
    return {"training.gradient_accumulation_steps": count}


FAST: list[dict[str, Any]] = [
    {},
    optimizer("adamw", "foreach"),
    optimizer("adamw", "loop"),
    optimizer("adam") | PLAIN,
    optimizer("sgd", "foreach") | {"optimizer.nesterov": False},
    optimizer("sgd", "loop") | {"optimizer.momentum": 0.0},
    optimizer("gradient-descent") | PLAIN,
    optimizer("muon"),
    optimizer("adafactor", "foreach"),
    optimizer("adafactor", "loop") | {"training.clip_norm": 0.0},
    accumulated(2) | DROPOUT,
    accumulated(7) | PLAIN,
    GPT | DROPOUT,
    EAGER | {"model.n_layers": 2},
    EAGER | FULL | {"model.n_layers": 3},
    DEEP | FULL,
    BF16,
    MIXED | GPT,
    FP16 | PLAIN,
    BF16 | EAGER | optimizer("adafactor"),
    STOCHASTIC | BRIEF,
    STOCHASTIC | optimizer("muon"),
    MASTER,
    MASTER | optimizer("sgd", "loop") | BRIEF,
]
SLOW: list[dict[str, Any]] = [
    # sizes
    {"model.n_layers": 6},
    DEEP,
    WIDE,
    WIDE | DEEP,
    LARGE_VOCABULARY,
    LARGE_VOCABULARY | {"training.loss": "fused"},
    {"training.micro_batch_size": 1, "model.context_length": 16},
    {"training.micro_batch_size": 7, "model.context_length": 50},
    {"model.context_length": 800, "training.micro_batch_size": 1},
    # blocks
    {"model.norm": "none", "model.activation": "relu", "model.residual": False},
    {"model.tied_embeddings": False, "model.n_kv_heads": 1, "model.qk_norm": True},
    {"model.activation": "gelu-tanh", "model.position": "none"},
    GPT | EAGER | {"model.n_layers": 2},
    # optimizers
    optimizer("sgd", "fused"),
    optimizer("muon", "loop") | {"model.bias": True},
    optimizer("muon", "foreach") | DEEP | FULL,
    optimizer("adam", "foreach") | BF16,
    optimizer("adamw", "loop") | MIXED,
    optimizer("sgd", "foreach") | MIXED,
    optimizer("adafactor", "foreach") | LARGE_VOCABULARY,
    optimizer("gradient-descent") | EAGER | BF16,
    # recomputation
    DEEP | FULL | DROPOUT,
    DEEP | EVERY_2,
    DEEP | EVERY_2 | EAGER,
    DEEP | EVERY_2 | DROPOUT | accumulated(2),
    {"model.n_layers": 6} | FULL | PLAIN,
    WIDE | FULL | BF16,
    DEEP | FULL | MIXED | EAGER,
    EAGER | FULL | DROPOUT | accumulated(2) | {"model.n_layers": 3},
    # precision
    BF16 | DEEP,
    BF16 | WIDE,
    BF16 | GPT | DROPOUT | accumulated(3),
    BF16 | EAGER | DROPOUT | PLAIN,
    BF16 | optimizer("muon"),
    BF16 | LARGE_VOCABULARY,
    STOCHASTIC | DEEP | FULL | accumulated(2),
    STOCHASTIC | optimizer("gradient-descent") | BRIEF,
    STOCHASTIC | optimizer("sgd", "loop") | BRIEF,
    STOCHASTIC | optimizer("adamw", "loop") | BRIEF,
    STOCHASTIC | optimizer("adafactor", "loop") | BRIEF,
    MASTER | DEEP | FULL | accumulated(2),
    MASTER | optimizer("gradient-descent") | BRIEF,
    MASTER | optimizer("adam", "foreach") | BRIEF,
    MASTER | optimizer("muon") | BRIEF,
    MASTER | optimizer("adafactor", "foreach") | BRIEF,
    MIXED,
    MIXED | DEEP,
    MIXED | WIDE | accumulated(2),
    MIXED | PLAIN | DROPOUT | accumulated(3),
    MIXED | LARGE_VOCABULARY | {"training.loss": "fused"},
    FP16,
    FP16 | EAGER,
    FP16 | DEEP | FULL,
    FP16 | GPT | accumulated(2),
]

TRACKABLE = [
    *({}, optimizer("adamw", "foreach"), optimizer("sgd", "loop"), optimizer("muon"), PLAIN, GPT, EAGER),
    *(DEEP | FULL, DEEP | FULL | DROPOUT | EAGER, BF16, MIXED | PLAIN),
    {"training.micro_batch_size": 1, "model.context_length": 16},
]


def name(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items()) or "default"
