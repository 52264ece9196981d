"""Identities, estimators and formats in `bptool gradcheck`, as a user meets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke

from bptool.training.step import TrainStep

TINY = ("model.n_layers=2", "model.d_model=16", "model.n_heads=2", "model.vocab_size=32", "training.sequence_length=8")
SOURCE = """
import torch
from torch import nn
import torch.nn.functional as F
from torch.distributions import Categorical
from bptool import GradientTarget, Workload, score_function, straight_through

def rounded():
    x, y = (torch.tensor([0.3, 1.8], requires_grad=True) for _ in range(2))
    return GradientTarget(lambda x, y: (straight_through(torch.round)(x) - 0.2).square().sum() + (y * y).sum(), (x, y))

def sampled():
    costs = torch.tensor([1.0, -2.0, 4.0])
    def function(logits, weight):
        choice = Categorical(logits=logits)
        k = choice.sample((2,))
        return score_function(weight * costs.to(weight)[k], choice.log_prob(k), "leave-one-out").mean()
    return GradientTarget(function, (torch.zeros(3, requires_grad=True), torch.ones((), requires_grad=True)))

def attention():
    q, k, v = (torch.randn(2, 4, 3, requires_grad=True) for _ in range(3))
    return GradientTarget(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v))

def classifier():
    return Workload(
        model=lambda: nn.Linear(3, 4),
        batch=lambda generator: torch.randn(5, 3, generator=generator),
        loss=lambda model, x: F.cross_entropy(model(x), torch.arange(5) % 4),
    )

def exploding():
    return Workload(
        model=lambda: nn.Linear(3, 4),
        batch=lambda generator: torch.randn(5, 3, generator=generator),
        loss=lambda model, x: model(x).exp().exp().mul(1e300).mean().exp(),
    )
"""


@pytest.fixture
def own(here: Path) -> Path:
    Path("mine.py").write_text(SOURCE)
    return here


def verdicts(result: dict[str, Any]) -> dict[str, str]:
    return {tensor["name"]: tensor["verdict"] for tensor in result["tensors"]}


class TestIdentities:
    def test_they_are_checked_on_the_transformer(self, here: Path) -> None:
        done = invoke("gradcheck", *TINY, "--json", "--seed", "1")
        assert done.code == 0
        found = done.result["identities"]
        assert len(found) == 10
        assert all(identity["holds"] and identity["relative_error"] < 1e-6 for identity in found)

    def test_the_lesson(self, here: Path) -> None:
        done = invoke("gradcheck", *TINY, "--seed", "1")
        assert done.code == 0
        assert "attention query gradient holds\n    dQ = dS K * 0.3536" in done.out
        sentence = "each block's gradient = identity path + branch path; norms by block, last first: 1: "
        assert sentence in " ".join(done.out.split()) + " "

    def test_one_that_fails_is_on_the_last_line(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        right = TrainStep.accumulate
        monkeypatch.setattr(TrainStep, "accumulate", lambda step, parts, weights: right(step, parts, [1] * len(parts)))
        done = invoke("gradcheck", *TINY, "--seed", "1")
        assert done.code == 1
        assert done.out.splitlines()[-1] == "not right: identity accumulation"
        assert "accumulation FAILS" in done.out

    def test_a_users_workload_and_function(self, own: Path) -> None:
        names = {
            target: [
                identity["name"] for identity in invoke("gradcheck", f"mine.py:{target}", "--json").result["identities"]
            ]
            for target in ("attention", "classifier", "rounded")
        }
        assert names["attention"] == [f"attention_{which}_gradient" for which in ("query", "key", "value")]
        assert "logits_gradient" in names["classifier"]
        assert names["rounded"] == []

    def test_what_could_not_be_checked_is_said(self, own: Path) -> None:
        said = " ".join(invoke("gradcheck", "mine.py:classifier").out.split())
        assert "layer_order: the workload has no repeated blocks" in said
        assert "accumulation: the workload's loss takes no batch of several micro-batches (ValueError)" in said

    def test_a_loss_that_is_not_finite_is_no_defect(self, own: Path) -> None:
        assert invoke("gradcheck", "mine.py:exploding").code == 1


class TestEstimators:
    def test_straight_through_is_told_with_its_bias(self, own: Path) -> None:
        done = invoke("gradcheck", "mine.py:rounded", "--json", "--seed", "3")
        assert done.code == 0
        assert verdicts(done.result) == {"x": "estimator", "y": "right"}
        (estimate,) = done.result["estimates"]
        assert (estimate["estimator"], estimate["method"]) == ("straight_through", "smoothing")
        assert done.result["tensors"][0]["relative_error"] == estimate["relative_bias"] > 0

    def test_a_score_function_is_unbiased(self, own: Path) -> None:
        done = invoke("gradcheck", "mine.py:sampled", "--json", "--seed", "3")
        assert done.code == 0
        assert verdicts(done.result)["logits"] == "estimator"
        assert verdicts(done.result)["weight"] == "right"
        (estimate,) = done.result["estimates"]
        assert estimate["unbiased"] is True


class TestPrecision:
    def test_every_gradient_beside_float64s(self, here: Path) -> None:
        done = invoke("gradcheck", *TINY, "--precision", "fp16-mixed", "--json")
        assert done.code == 0
        found = done.result["precision"]
        assert (found["mode"], found["loss_scale"]) == ("fp16-mixed", 65536)
        assert {record["name"] for record in found["tensors"]} == set(verdicts(done.result))
        assert invoke("gradcheck", *TINY, "--json").result["precision"] is None

    def test_as_text(self, here: Path) -> None:
        done = invoke("gradcheck", *TINY, "--precision", "bf16-mixed")
        assert done.code == 0
        assert "bf16-mixed beside float64" in done.out
        assert "loses most" in done.out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_a_format_that_this_device_has_not(self, here: Path) -> None:
        done = invoke("gradcheck", *TINY, "--precision", "tf32", "training.device=cpu")
        assert done.code == 3
        assert "needs a CUDA device" in done.err

    @pytest.mark.parametrize(
        ("target", "mode", "words"),
        [("tiny", "bf16mixed", "is no format"), ("mine.py:rounded", "bf16", "is a function without one")],
    )
    def test_mistakes(self, own: Path, target: str, mode: str, words: str) -> None:
        done = invoke("gradcheck", target, "--precision", mode)
        assert done.code == 2
        assert words in done.err
