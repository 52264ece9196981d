"""The predicted time of GPUs that are not here, held to what others measured on them.

Sources, all of them runs of whole training steps in bf16:

    nanogpt     GPT-2 124M, 12 x 1024 tokens a micro-batch and 5 of them a step, 8 A100 40 GB, compiled, PyTorch 2.0:
                562 ms a step, all-reduce included (nanoGPT's issue 110, whose author finds it pretty good)
    titan-a100  Llama 3 8B, 1 x 8192 tokens, 64 A100 80 GB, selective recomputation, FSDP2: 2973 tokens/s a GPU
                (torchtitan, docs/performance.md of 2024, which calls it an MFU of 58.2%)
    titan-h100  Llama 3.1 8B, 2 x 8192 tokens, 8 H100 of 500 W, selective recomputation, FSDP2: 5762 tokens/s a GPU,
                and 6667 compiled (torchtitan, benchmarks/llama3_h100_202412_torchtitan.md)

Where the optimizer's state is sharded over many GPUs, one's share of the update is next to nothing: forward and
backward are compared, without recomputation, as not all of it was done.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest

from bptool.analysis.profile.counting import count_question
from bptool.analysis.profile.prediction import PUBLISHED, predict
from bptool.analysis.profile.roofline import gpu_rates
from bptool.analysis.question import ask


class Published(NamedTuple):
    target: str
    settings: tuple[str, ...]
    gpu: str
    seconds: float
    """Of forward and backward of one micro-batch, and what else took time."""


_COMMON = ("training.gradient_accumulation_steps=1", "training.loss=plain")
_LLAMA = ("training.sequence_length=8192", "precision.mode=bf16", "activation_checkpoint.policy=none", *_COMMON)
_GPT2 = ("training.micro_batch_size=12", "training.sequence_length=1024", "precision.mode=bf16-mixed", *_COMMON)
RUNS = {
    "nanogpt": Published("gpt2", _GPT2, "a100-40gb", 0.562 / 5),
    "titan-a100": Published("llama3-8b", ("training.micro_batch_size=1", *_LLAMA), "a100-80gb", 8192 / 2973),
    "titan-h100": Published("llama3-8b", ("training.micro_batch_size=2", *_LLAMA), "h100", 16384 / 5762),
    "titan-h100-compiled": Published("llama3-8b", ("training.micro_batch_size=2", *_LLAMA), "h100", 16384 / 6667),
}


@cache
def predicted_s(run: Published) -> float:
    question = ask(run.target, run.settings, command="profile", gpu=run.gpu)
    tally = count_question(question).tally
    assert question.machine.gpu is not None
    found = predict(tally.costs, 1, gpu_rates(question.machine.gpu, question.config.precision.mode), None)
    return sum(phase.predicted_s for phase in found.phases if phase.phase in ("forward", "backward"))


@pytest.mark.parametrize("name", RUNS)
def test_it_is_a_lower_bound_and_not_a_useless_one(name: str) -> None:
    """As far from it as is said to whoever asks."""
    ratio = RUNS[name].seconds / predicted_s(RUNS[name])
    low, high = PUBLISHED
    assert low - 0.05 <= ratio <= high + 0.05


def test_how_far_is_told_by_the_nearest_and_the_farthest() -> None:
    ratios = [run.seconds / predicted_s(run) for run in RUNS.values()]
    assert (round(min(ratios), 1), round(max(ratios), 1)) == PUBLISHED
