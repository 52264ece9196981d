"""Small models of `transformers`, unlike freshly made ones, and the same models as bptool reads them from a folder."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from bptool.config.huggingface import model_settings_from_huggingface
from bptool.interop.huggingface import load_weights
from bptool.model.transformer import Transformer, build

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

__all__ = ["made", "read_back", "transformers"]

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 400,
    "vocab_size": 53,
    "initializer_range": 0.3,
}


def made(config: str, model: str, **keys: Any) -> Any:
    """A model of transformers with weights of its own: norms and biases are away from where they begin."""
    torch.manual_seed(0)
    unfilled = {"pad_token_id": None}  # a padding id has no gradient there
    found = getattr(transformers, model)(getattr(transformers, config)(**{**SHAPE, **unfilled, **keys}))
    with torch.no_grad():
        for tensor in [*found.parameters(), *(b for name, b in found.named_buffers() if "correction" in name)]:
            if tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) / 5)
    return found


def read_back(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    """The model that bptool builds from a folder's config.json, with the folder's weights."""
    settings = model_settings_from_huggingface(json.loads((folder / "config.json").read_text()), "config.json")
    model = build(settings.model_copy(update=changes), device="cpu", seed=0, dtype=dtype)
    model.load_state_dict(load_weights(folder, settings))
    return model
