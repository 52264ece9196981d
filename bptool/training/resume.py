"""What may change between a run and its continuation."""

from __future__ import annotations

from collections.abc import Collection

from bptool.config.keys import dotted
from bptool.config.schema import Config
from bptool.errors import ResumeError

_FIXED = ("model.", "optimizer.name", "run.workload")
_FREE_IN_MODEL = ("model.dropout", "model.attention", "model.weights", "model.moe.auxiliary_loss")
_GUARDED = ("run.seed", "data.", "training.steps", "training.sequence_length", "schedule.", "optimizer.lr")
_BATCH = ("training.micro_batch_size", "training.gradient_accumulation_steps")
_PLACE = ("run.name", "run.directory")


def changed_keys(before: Config, after: Config) -> dict[str, tuple[object, object]]:
    """Dotted keys whose values differ, each with (before, after); the run's place does not count."""
    old, new = dotted(before), dotted(after)
    return {key: (old[key], new[key]) for key in new if old[key] != new[key] and key not in _PLACE}


def check_resumable(before: Config, after: Config, named: Collection[str]) -> dict[str, tuple[object, object]]:
    """The changed keys, once it is sure that they may change.

    Args:
        named: dotted keys that the user gave on the command line.

    Raises:
        ResumeError: a key would make it another model, or would change data order or schedule without being named.
    """
    changes = changed_keys(before, after)
    fixed = [key for key in changes if key.startswith(_FIXED) and key not in _FREE_IN_MODEL]
    if fixed:
        raise ResumeError(
            "a run cannot be resumed as another model or optimizer:\n" + _lines(changes, fixed),
            "leave these keys as they were, or start a new run",
        )
    guarded = [key for key in changes if key.startswith(_GUARDED)]
    if _global_batch(before) != _global_batch(after):
        guarded += [key for key in changes if key in _BATCH]
    unnamed = [key for key in guarded if key not in named]
    if unnamed:
        pairs = " ".join(f"{key}={changes[key][1]}" for key in unnamed)
        raise ResumeError(
            "these changes would alter the data order or the schedule:\n" + _lines(changes, unnamed),
            f"if that is meant, name them on the command line: {pairs}",
        )
    return changes


def _global_batch(config: Config) -> int:
    return config.training.micro_batch_size * config.training.gradient_accumulation_steps


def _lines(changes: dict[str, tuple[object, object]], keys: list[str]) -> str:
    return "\n".join(f"  {key}: {changes[key][0]} -> {changes[key][1]}" for key in keys)
