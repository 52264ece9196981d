"""Text from a model, one token at a time. Shapes: T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bptool.errors import NonFiniteError, UsageError
from bptool.model.transformer import Transformer


def sample(
    model: Transformer,
    prompt_ids: Sequence[int],
    n_tokens: int,
    *,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> Iterator[int]:
    """The `n_tokens` ids that continue the prompt, each as soon as it is drawn.

    The model sees the last `context_length` ids. It is in eval mode while a token is drawn and in its former mode when
    the token is handed over.

    Args:
        model: asked again for the whole sequence at every token: no keys and values are kept.
        prompt_ids: one id at least.
        n_tokens: how many to draw.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw among the k likeliest; 0: among all.
        generator: the source of randomness; draws are made on its device.

    Raises:
        UsageError: the prompt is empty.
        NonFiniteError: the model's logits are NaN or infinite.
    """
    if not prompt_ids:
        raise UsageError(
            "the prompt is empty, and a model can only continue something", "give a prompt of one token at least"
        )
    device = model.embedding.weight.device
    ids = list(prompt_ids)
    for _ in range(n_tokens):
        context_1T = torch.tensor([ids[-model.settings.context_length :]], device=device)
        logits_V = _last_logits(model, context_1T).to(generator.device)
        ids.append(_draw(logits_V, temperature, top_k, generator))
        yield ids[-1]


@torch.no_grad()
def _last_logits(model: Transformer, context_1T: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        logits_V: Tensor = model(context_1T)[0, -1].float()
    finally:
        model.train(was_training)
    if not logits_V.isfinite().all():
        raise NonFiniteError("the model's logits are NaN or infinite, so no token can be drawn from them")
    return logits_V


def _draw(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if 0 < top_k < len(logits_V):
        kth_best = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth_best, -torch.inf)
    # Taking the largest away first keeps a tiny temperature from making infinities.
    probabilities_V = ((logits_V - logits_V.max()) / temperature).softmax(0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
