"""The settings whose peaks are measured: each a TARGET and its KEY=VALUEs, as one would type them."""

from __future__ import annotations

GPT = "gpt2 training.micro_batch_size=4 training.sequence_length=512"
GROUPED = (
    "llama3.2-1b model.n_layers=4 model.vocab_size=32000 training.micro_batch_size=2 training.sequence_length=1024"
)
"""Grouped-query attention, rotations, a gated feed-forward."""
TINY = "tiny"

_MODES = ("fp32", "tf32", "bf16-mixed", "bf16", "fp16-mixed")
_WAYS = ("", "model.attention=eager", "activation_checkpoint.policy=full", "training.loss=plain")
_UPDATES = (
    *("adamw optimizer.implementation=foreach", "adamw optimizer.implementation=loop", "adam", "sgd", "adafactor"),
    *("muon", "gradient-descent"),
)
_GPT_ALONE = (
    "training.gradient_accumulation_steps=3",
    "training.gradient_accumulation_steps=2 precision.mode=fp32",
    "model.dropout=0.1",
    "model.dropout=0.1 model.attention=eager",
    "model.dropout=0.1 model.attention=eager precision.mode=fp32",
    "activation_checkpoint.policy=every_k activation_checkpoint.every=3",
    "training.micro_batch_size=1 training.sequence_length=128",
    "training.micro_batch_size=3 training.sequence_length=500",
    "training.clip_norm=0",
)
_GROUPED_ALONE = (
    "model.qk_norm=true",
    "model.sliding_window=256",
    "model.moe.n_experts=8 model.moe.n_active=2 model.moe.d_expert=2048",
    "model.tied_embeddings=false training.gradient_accumulation_steps=2",
)

SETTINGS: tuple[str, ...] = (
    TINY,
    f"{TINY} precision.mode=fp32 optimizer.implementation=loop",
    *(f"{base} precision.mode={mode} {way}".rstrip() for base in (GPT, GROUPED) for mode in _MODES for way in _WAYS),
    *(f"{GPT} precision.mode=bf16-mixed optimizer.name={update}" for update in _UPDATES),
    *(f"{GPT} precision.mode=bf16-mixed {change}" for change in _GPT_ALONE if "precision" not in change),
    *(f"{GPT} {change}" for change in _GPT_ALONE if "precision" in change),
    *(f"{GROUPED} precision.mode=bf16-mixed {change}" for change in _GROUPED_ALONE),
    "gpt2-medium training.micro_batch_size=8 training.sequence_length=1024 precision.mode=bf16-mixed",
)
