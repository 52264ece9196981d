"""`KEY=VALUE` on the command line: a dotted key of the config, and a TOML value.

What is no TOML is text as it stands (`optimizer.name=sgd`), and so is whatever is given to a key that takes
text (`run.name=3`). A table sets the keys that it holds and leaves the others: `model.rope={theta=5e5}`.

A policy that needs another key may bring it: `activation_checkpoint.policy=budget:4GiB`, `every_k:3`, `plan:6*full`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from bptool.config.keys import dotted, fields, flatten, nest
from bptool.config.schema import Config
from bptool.errors import ConfigError

COMMAND_LINE = "command line"
_POLICY = "activation_checkpoint.policy"
_BROUGHT = {
    "budget": "activation_checkpoint.budget",
    "every_k": "activation_checkpoint.every",
    "plan": "activation_checkpoint.plan",
}


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The dotted keys that a command line sets, each with its value; of a key given twice the last counts.

    Whether the keys exist and what they take is not checked here: `parse_config` tells all of that at once.

    Raises:
        ConfigError: with each override that is not of the form KEY=VALUE.
    """
    problems = [problem for text in overrides if (problem := _malformed(text))]
    if problems:
        raise ConfigError(COMMAND_LINE, problems, "An override is KEY=VALUE, such as optimizer.lr=3e-4")
    changes: dict[str, Any] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        changes.update(flatten(_with_what_it_brings(key.strip(), _parse_value(key.strip(), value))))
    return changes


def override(config: Config, changes: Mapping[str, object]) -> Config:
    """A copy of `config` with the values of some dotted keys changed, validated again.

    It is for changes that bptool itself makes. What was `auto` keeps its number.
    """
    return Config.model_validate(nest({**dotted(config), **changes}))


def of_mode(mode: str) -> dict[str, object]:
    """The changes to another `precision.mode`, whose weights may be such that no `bf16_update` but the usual is."""
    return {"precision.mode": mode, "precision.bf16_update": "nearest"}


def _malformed(text: str) -> str:
    key, equals, _ = text.partition("=")
    if not equals:
        return f"'{text}': found no '=', expected KEY=VALUE"
    if not key.strip():
        return f"'{text}': found no key before the '='"
    if not all(part.strip() for part in key.split(".")):
        return f"'{text}': found the key '{key.strip()}', expected names with single dots between them"
    return ""


def _with_what_it_brings(key: str, value: object) -> dict[str, object]:
    """`policy=budget:4GiB` sets two keys."""
    policy, colon, brought = value.partition(":") if key == _POLICY and isinstance(value, str) else ("", "", "")
    other = _BROUGHT.get(policy.strip())
    if not colon or other is None:
        return {key: value}
    return {key: policy.strip(), other: _parse_value(other, brought.strip())}


def _parse_value(key: str, text: str) -> object:
    takes_text = key in fields() and fields()[key].annotation is str
    as_it_stands = text if takes_text else text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return as_it_stands
    if parsed.keys() != {"value"}:  # a line break in the text, and another key after it
        return as_it_stands
    value = parsed["value"]
    return as_it_stands if takes_text and not isinstance(value, str) else value
