from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bptool.config.schema import ModelSettings
from bptool.errors import NonFiniteError, UsageError
from bptool.model.sampling import sample
from bptool.model.transformer import Transformer, build


@pytest.fixture
def model() -> Transformer:
    settings = ModelSettings(
        n_layers=1, d_model=8, n_heads=2, vocab_size=5, context_length=6, init_std=0.5, dropout=0.5
    )
    return build(settings, device="cpu", seed=0).train()


def drawn(model: Transformer, prompt: list[int], n_tokens: int, seed: int = 0, **keys: Any) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return list(sample(model, prompt, n_tokens, generator=generator, **{"temperature": 1.0, "top_k": 0, **keys}))


def likeliest(model: Transformer, prompt: list[int], n_tokens: int) -> list[int]:
    ids = list(prompt)
    model.eval()
    for _ in range(n_tokens):
        ids.append(int(model(torch.tensor([ids[-6:]]))[0, -1].argmax()))
    model.train()
    return ids[len(prompt) :]


@pytest.mark.parametrize("keys", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-40}])
def test_the_likeliest_tokens_far_beyond_the_context(model: Transformer, keys: dict[str, Any]) -> None:
    for prompt in ([3], [0, 4, 1, 1, 2, 3, 0, 4, 4]):
        assert drawn(model, prompt, 12, **keys) == likeliest(model, prompt, 12)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 3), (1.0, 99)])
def test_tokens_come_with_their_probability(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, temperature: float, top_k: int
) -> None:
    logits = [1.0, -1.0, 2.0, 0.0, 0.5]
    monkeypatch.setattr(model, "forward", lambda tokens: torch.tensor(logits).expand(1, tokens.shape[1], 5))
    kept = sorted(logits, reverse=True)[: top_k or None]
    weights = [math.exp(x / temperature) if x in kept else 0.0 for x in logits]
    n = 1000
    ids = drawn(model, [2], n, temperature=temperature, top_k=top_k)
    for token, weight in enumerate(weights):
        p = weight / sum(weights)
        assert ids.count(token) == pytest.approx(n * p, abs=4 * math.sqrt(n * p * (1 - p)) + 1e-9)


def test_the_seed_alone_decides(model: Transformer) -> None:
    torch.manual_seed(1)
    first = drawn(model, [1], 30, seed=7)
    torch.manual_seed(2)
    assert drawn(model, [1], 30, seed=7) == first
    assert drawn(model, [1], 30, seed=8) != first


def test_mode_and_grad_mode_are_the_callers_between_tokens(model: Transformer) -> None:
    recorded: list[bool] = []
    model.register_forward_hook(lambda _, args, out: recorded.append(out.requires_grad))
    for _ in sample(model, [1], 2, temperature=1.0, top_k=0, generator=torch.Generator()):
        assert model.training
        assert all(module.training for module in model.modules())
        assert torch.is_grad_enabled()
    assert recorded == [False, False]
    assert not model.eval().training
    drawn(model, [1], 1)
    assert not model.training


def test_an_empty_prompt_is_refused(model: Transformer) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        drawn(model, [], 1)


def test_nan_logits_are_an_answer_and_no_crash(model: Transformer) -> None:
    with torch.no_grad():
        model.get_parameter("final_norm.weight").fill_(math.nan)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        drawn(model, [1], 1)
    assert model.training


def test_nothing_is_drawn_where_nothing_is_asked_for(model: Transformer) -> None:
    assert drawn(model, [1], 0) == []
