"""Models of other architectures and other makers, as small workloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bptool.training.workload import Batch, Workload

VOCABULARY, TOKENS, CLASSES = 96, 24, 10


def perceptron() -> Workload:
    """With dropout, whose masks are kept."""

    def model() -> nn.Module:
        first = (nn.Flatten(), nn.Linear(768, 128), nn.GELU(), nn.Dropout(0.1))
        return nn.Sequential(*first, nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, CLASSES))

    return Workload(model, _pictures, _classified)


def convolutional() -> Workload:
    return Workload(Convolutional, _pictures, _classified)


def vision_transformer() -> Workload:
    return Workload(VisionTransformer, _pictures, _classified)


def recurrent(kind: Callable[..., nn.Module]) -> Workload:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())

    return Workload(lambda: Recurrent(kind), lambda g: {"x": _tokens(g), "y": _tokens(g)}, loss)


def gpt2() -> Workload:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4}
    return _language(lambda: GPT2LMHeadModel(GPT2Config(**shape, use_cache=False, bos_token_id=0, eos_token_id=0)))


def llama() -> Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    # Its fused attention is called with a mask or without, as the values of the tokens' positions have it.
    return _language(lambda: LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation="eager")))


def bert() -> Workload:
    from transformers import BertConfig, BertForMaskedLM

    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
    return _language(lambda: BertForMaskedLM(BertConfig(**shape, num_hidden_layers=2, num_attention_heads=4)))


def t5() -> Workload:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"vocab_size": VOCABULARY, "d_model": 48, "d_ff": 96, "d_kv": 12, "num_layers": 2, "num_heads": 4}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "use_cache": False}
    return _language(lambda: T5ForConditionalGeneration(T5Config(**shape, **tokens)))


def pretrained_vision_transformer() -> Workload:
    """Its weights are drawn again and again until none is out of bounds."""
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = ViTConfig(**shape, image_size=16, patch_size=4, num_labels=CLASSES)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["x"]).logits, batch["y"])

    return Workload(lambda: ViTForImageClassification(config), _pictures, loss)


FOREIGN: Mapping[str, Callable[[], Workload]] = {
    "perceptron": perceptron,
    "convolutional": convolutional,
    "vision transformer": vision_transformer,
    "rnn": lambda: recurrent(nn.RNN),
    "lstm": lambda: recurrent(nn.LSTM),
    "gru": lambda: recurrent(nn.GRU),
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "vit": pretrained_vision_transformer,
}


class Convolutional(nn.Module):
    """Two convolutions, normalised over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        )
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).flatten(1))
        return y


class VisionTransformer(nn.Module):
    """Patches, a class token, and PyTorch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 4, 4)
        self.position, self.token = nn.Parameter(torch.zeros(1, 17, 48)), nn.Parameter(torch.zeros(1, 1, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        y: Tensor = self.head(self.encoder(tokens)[:, 0])
        return y


class Recurrent(nn.Module):
    """Two recurrent layers over embedded tokens."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.layers = kind(32, 48, num_layers=2, batch_first=True)
        self.head = nn.Linear(48, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(self.embedding(x))[0])
        return y


def _language(model: Callable[[], Any]) -> Workload:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        result: Tensor = model(input_ids=batch["ids"], labels=batch["ids"]).loss
        return result

    return Workload(model, lambda generator: {"ids": _tokens(generator)}, loss)


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(VOCABULARY, (2, TOKENS), generator=generator)


def _pictures(generator: torch.Generator) -> Batch:
    return {
        "x": torch.randn(4, 3, 16, 16, generator=generator),
        "y": torch.randint(CLASSES, (4,), generator=generator),
    }


def _classified(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])
