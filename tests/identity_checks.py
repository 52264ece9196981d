"""The identities of the built-in transformer at a small size, for tests that break it."""

from __future__ import annotations

from collections.abc import Sequence

from small_runs import small_config

from bptool.analysis.gradcheck.identities.check import check_identities
from bptool.analysis.gradcheck.identities.identity import Identities, Identity
from bptool.training.workload import transformer_workload

NAMES = [
    "logits_gradient",
    "residual_paths",
    "attention_query_gradient",
    "attention_key_gradient",
    "attention_value_gradient",
    "layer_order",
    "accumulation",
    "activation_checkpointing",
    "clipping_norm",
    "gradient_descent_update",
]


def of_transformer(changes: dict[str, object] | None = None, seed: int = 3) -> Identities:
    config = small_config(changes)
    return check_identities(config, transformer_workload(config), built_in=True, seed=seed)


def failed(found: Identities) -> list[str]:
    return [identity.name for identity in found.identities if not identity.holds]


def named(found: Sequence[Identity], name: str) -> Identity:
    (identity,) = (identity for identity in found if identity.name == name)
    return identity
