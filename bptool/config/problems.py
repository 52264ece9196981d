"""What is wrong with a config, in one line for each mistake: the key, what was found, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from bptool.config.keys import allowed, allows_auto, choices, fields, nest, sections, shown
from bptool.config.schema import AUTO, Config, ConflictError
from bptool.errors import nearest

# What others call the same thing, where the spelling alone would lead elsewhere.
_OTHER_NAMES = {
    "n_embd": "model.d_model",
    "hidden_size": "model.d_model",
    "dim": "model.d_model",
    "intermediate_size": "model.d_ff",
    "num_key_value_heads": "model.n_kv_heads",
    "block_size": "model.context_length",
    "max_position_embeddings": "model.context_length",
    "rope_theta": "model.rope.theta",
    "num_experts": "model.moe.n_experts",
    "num_local_experts": "model.moe.n_experts",
    "num_experts_per_tok": "model.moe.n_active",
    "moe_intermediate_size": "model.moe.d_expert",
    "rms_norm_eps": "model.norm_eps",
    "batch_size": "training.micro_batch_size",
    "max_iters": "training.steps",
    "max_steps": "training.steps",
    "grad_clip": "training.clip_norm",
    "dtype": "precision.mode",
    "learning_rate": "optimizer.lr",
    "warmup_iters": "schedule.warmup_steps",
}


class Problem(NamedTuple):
    """One mistake."""

    keys: tuple[str, ...]
    """The dotted keys that it depends on, the likeliest culprit first."""
    text: str
    """The line that tells it."""


def validate(values: Mapping[str, Any]) -> Config | list[Problem]:
    """The config that the flat `values` make, or all that is wrong with them.

    A wrong value hides the checks that come after it. So each mistake is told, its culprit taken out (the
    default stands in), and the rest validated again until nothing is left; a conflict with a value that was
    taken out is nobody's mistake.
    """
    problems = [_misplaced(key, value) for key, value in values.items() if not _has_place(key, value)]
    known = {key: _whole(key, value) for key, value in values.items() if key in fields()}
    taken_out: set[str] = set()
    while True:
        try:
            config = Config.model_validate(nest(known))
        except ValidationError as error:
            found = list(_problems_of(error))
        else:
            return problems or config
        problems += [problem for problem in found if taken_out.isdisjoint(problem.keys)]
        culprits = {next(key for key in problem.keys if key in known) for problem in found}
        assert culprits, "every mistake has a key that somebody gave: the defaults are valid"
        taken_out |= culprits
        known = {key: value for key, value in known.items() if key not in culprits}


def _has_place(key: str, value: object) -> bool:
    return key in fields() or (key in sections() and value == {})


def _whole(key: str, value: object) -> object:
    """`1e3` for a key that takes a whole number is 1000."""
    if fields()[key].annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _problems_of(error: ValidationError) -> Iterator[Problem]:
    for line in error.errors(include_url=False):
        key = ".".join(str(part) for part in line["loc"])
        cause = line.get("ctx", {}).get("error")
        if isinstance(cause, ConflictError):
            yield Problem(cause.keys, str(cause))
        elif line["input"] != AUTO or not allows_auto(key):  # else the keys that `auto` follows from are told
            yield _wrong_value(key, line["input"])


def _wrong_value(key: str, value: object) -> Problem:
    words = ("true", "false") if fields()[key].annotation is bool else choices(key)
    hint = nearest(value.lower(), words) if isinstance(value, str) else ""
    return Problem((key,), f"{key}: found {shown(value)}, expected {allowed(key)}{hint}")


def _misplaced(key: str, value: object) -> Problem:
    name = key if key.isprintable() else shown(key)
    if key in sections():
        example = next(known for known in fields() if known.startswith(f"{key}."))
        return Problem((key,), f"{name}: found {shown(value)}, expected a table of keys such as '{example}'")
    return Problem((key,), f"{name}: unknown key{_meant(key)}")


def _meant(key: str) -> str:
    """The key that an unknown one stands for: another tool's name, another section's, or the nearest."""
    section, _, name = key.rpartition(".")
    here = section in sections()
    namesakes = [known for known in fields() if _name(known) == name]
    if name in _OTHER_NAMES:
        return f", did you mean '{_OTHER_NAMES[name]}'?"
    if namesakes and (here or not section):
        where = f" in [{section}]" if here else ""
        return f"{where}, did you mean {' or '.join(repr(known) for known in namesakes)}?"
    siblings = {_name(known): known for known in fields() if here and known == f"{section}.{_name(known)}"}
    if matches := difflib.get_close_matches(name, siblings, n=1):
        return f", did you mean '{siblings[matches[0]]}'?"
    return nearest(name if here else key, namesakes or fields())


def _name(key: str) -> str:
    return key.rpartition(".")[2]
