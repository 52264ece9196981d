"""Time the steps of one trainer on one model, in a process of its own: `step_seconds.py TRAINER MODEL STEPS`.

Trainers:
    bptool    the real run with everything on: metrics, TensorBoard, checks, the allocator's settings
    bptool-untuned  the same on glibc's own allocator settings
    plain     the plainest PyTorch loop around the same model: eager, all logits at once, PyTorch's default AdamW
    nanogpt   a compiled GPT-2 the way nanoGPT does it: fused QKV, tied head, all logits and their cross-entropy,
              gradients clipped, and AdamW as it is on a CPU there (nanoGPT asks for the fused one on CUDA alone)

Prints JSON: the seconds of each step after the warm-up, and the tokens of one step.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptool.config.loading import load_config
from bptool.config.schema import Config
from bptool.config.target import resolve_target

WARM_UP_STEPS = 3
MODELS = {
    # 6 layers, 384 wide, 256 tokens, bytes: nanoGPT's character model
    "small": [
        "tiny",
        "model.n_layers=6",
        "model.d_model=384",
        "model.n_heads=6",
        "model.norm=layernorm",
        "model.position=learned",
        "model.activation=gelu",
        "training.micro_batch_size=16",
    ],
    "gpt2": [
        "gpt2",
        "model.vocab_size=50304",
        "training.sequence_length=256",
        "training.micro_batch_size=2",
        "training.gradient_accumulation_steps=1",
        "precision.mode=fp32",
        "data.tokenizer=bytes",
    ],
}


def config_of(model: str, steps: int, extra: list[str]) -> Config:
    target, *overrides = MODELS[model]
    quiet = ["evaluation.every=0", "evaluation.sequences=1", "evaluation.sample_tokens=0", "checkpoint.every=0"]
    return load_config(resolve_target(target), [*overrides, *quiet, f"training.steps={steps}", *extra])


def bptool_seconds(config: Config) -> list[float]:
    """Wall time from step to step, so that what happens between steps counts too."""
    from bptool.analysis.train import Trainer
    from bptool.config.overrides import override
    from bptool.report.train.listeners import run_listeners
    from bptool.training.loop import Listener
    from bptool.training.opening import OpenedRun
    from bptool.training.run_folder import RunFolder

    class Stopwatch(Listener):
        def __init__(self) -> None:
            self.times = [time.perf_counter()]

        def step_done(self, step: int, scalars: Mapping[str, float]) -> None:
            self.times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = override(config, {"run.directory": folder, "run.name": "benchmark"})
        with RunFolder.create(config, force=False) as run:
            opened = OpenedRun(run, config, None)
            trainer, stopwatch = Trainer(opened, lambda message: None), Stopwatch()
            with run_listeners(trainer, opened) as listeners:
                trainer.train([*listeners, stopwatch])
    pairs = zip(stopwatch.times, stopwatch.times[1:], strict=False)
    return [end - start for start, end in pairs][:-1]  # the last step's evaluation and checkpoint are not a step


def untuned_seconds(config: Config) -> list[float]:
    from unittest.mock import patch

    with patch("bptool.analysis.train.tune_cpu_allocator"):
        return bptool_seconds(config)


def plain_seconds(config: Config) -> list[float]:
    from bptool.model.transformer import build

    model = build(config.model, device="cpu", seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return _timed(config, optimizer, lambda tokens, targets: _cross_entropy(model(tokens), targets))


def nanogpt_seconds(config: Config) -> list[float]:
    settings = config.model
    model = CompactGPT(
        settings.n_layers, settings.d_model, settings.n_heads, settings.vocab_size, settings.context_length
    )
    model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return _timed(config, optimizer, lambda tokens, targets: _cross_entropy(model(tokens), targets), clip_norm=1.0)


def _cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def _timed(
    config: Config,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    clip_norm: float = 0,
) -> list[float]:
    training = config.training
    shape = (training.micro_batch_size, training.sequence_length + 1)
    seconds = []
    for _ in range(training.steps):
        start = time.perf_counter()
        ids = torch.randint(config.model.vocab_size, shape)
        loss_of(ids[:, :-1], ids[:, 1:]).backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def _start_small(module: nn.Module) -> None:
    """As nanoGPT does. With PyTorch's own embeddings most of what softmax gives is subnormal, which a CPU multiplies at
    a tenth of its rate."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class CompactGPT(nn.Module):
    """GPT-2 the compact way, as a yardstick: it shares no code with bptool's model."""

    def __init__(self, n_layers: int, d_model: int, n_heads: int, vocab_size: int, context_length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.places = nn.Embedding(context_length, d_model)
        self.blocks = nn.ModuleList(_CompactBlock(d_model, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(_start_small)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(tokens_BT) + self.places.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV


class _CompactBlock(nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x_BTD)).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).flatten(2))
        branch_BTD: Tensor = self.down(F.gelu(self.up(self.norm_2(x_BTD))))
        return x_BTD + branch_BTD


TRAINERS = {
    "bptool": bptool_seconds,
    "bptool-untuned": untuned_seconds,
    "plain": plain_seconds,
    "nanogpt": nanogpt_seconds,
}


def main() -> None:
    trainer, model, steps, *extra = sys.argv[1:]
    config = config_of(model, int(steps), extra)
    seconds = TRAINERS[trainer](config)[WARM_UP_STEPS:]
    tokens = config.training.micro_batch_size * config.training.sequence_length
    print(json.dumps({"seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
