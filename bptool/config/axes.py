"""`KEY=VALUE,VALUE` on the command line: an axis of a grid. A word without a comma is an override as ever.

Commas in quotes and in brackets belong to a value: `data.source="a,b"` and `model.rope={theta=5e5,scaling='none'}` are
overrides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from bptool.config.keys import choices, dotted, fields
from bptool.config.overrides import COMMAND_LINE, parse_overrides
from bptool.config.problems import validate
from bptool.config.schema import Config
from bptool.errors import ConfigError

_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "\"'"


@dataclass(frozen=True)
class Axis:
    """A key, and the values that it takes in turn, as they were typed."""

    key: str
    words: tuple[str, ...]

    def override(self, word: str) -> str:
        """As `parse_overrides` takes it."""
        return f"{self.key}={word}"

    def changes(self, word: str) -> dict[str, Any]:
        """The dotted keys that a value sets: more than one where it is a table, or `budget:4GiB`."""
        return parse_overrides([self.override(word)])


class Split(NamedTuple):
    """A command line's words."""

    overrides: list[str]
    axes: list[Axis]


def split_axes(words: Sequence[str]) -> Split:
    """Which words are axes, and which are overrides.

    Raises:
        ConfigError: with each value that is missing or there twice, each key that is set twice, each key that does not
            exist and each value that it does not take. Values that contradict each other are told later, row by row.
    """
    parse_overrides(words)  # for the words that are no KEY=VALUE at all
    split = Split([], [])
    for word in words:
        key, _, text = word.partition("=")
        values = split_values(text)
        if len(values) == 1:
            split.overrides.append(word)
        else:
            split.axes.append(Axis(key.strip(), tuple(value.strip() for value in values)))
    if problems := list(dict.fromkeys(_problems(split))):
        raise ConfigError(COMMAND_LINE, problems)
    return split


def split_values(text: str) -> list[str]:
    """The text between its commas; those inside of brackets and quotes do not count."""
    values, depth, quote = [""], 0, ""
    for before, character in zip(["", *text], text, strict=False):
        if quote:
            quote = "" if character == quote and before != "\\" else quote
        elif character in _QUOTES and (depth or not values[-1].strip()):  # an apostrophe in a word is none
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == "," and depth <= 0:
            values.append("")
            continue
        values[-1] += character
    return values


def rows_of(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """Every combination of the axes' values, the last axis changing first."""
    return [
        dict(zip([axis.key for axis in axes], words, strict=True)) for words in product(*(axis.words for axis in axes))
    ]


def setting(axis: Axis, word: str) -> Any:
    """A value as a record has it: a number or truth value where it is one, else as it was typed."""
    changes = axis.changes(word)
    return changes[axis.key] if changes.keys() == {axis.key} else word


def labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each row's settings in few words: values that differ between rows, with their key where they say little alone."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    varying = [key for key in keys if len({str(row.get(key)) for row in rows}) > 1] or keys[:1]
    telling = [str(value) for key in varying for value in {str(row[key]) for row in rows if key in row}]
    shared = {value for value, count in Counter(telling).items() if count > 1}

    def words(row: Mapping[str, Any]) -> Iterator[str]:
        for key in filter(row.__contains__, varying):
            text = shown_setting(row[key])
            speaks = key in fields() and choices(key) and str(row[key]) not in shared
            yield text if speaks else f"{key.rpartition('.')[2]}={text}"

    return [" ".join(words(row)) for row in rows]


def shown_setting(value: Any) -> str:
    """A setting as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _problems(split: Split) -> Iterator[str]:
    for axis in split.axes:
        yield from _of_values(axis)
    yield from _set_twice(split)
    for word in split.overrides:
        yield from _wrong(parse_overrides([word]))
    for axis in split.axes:
        for word in filter(None, axis.words):
            yield from _wrong(axis.changes(word))


def _of_values(axis: Axis) -> Iterator[str]:
    if "" in axis.words:
        yield f"{axis.key}={','.join(axis.words)}: found no value beside a comma; an empty text is written ''"
    known = [axis.changes(word) for word in axis.words]
    twice = dict.fromkeys(word for i, word in enumerate(axis.words) if word and known[i] in known[:i])
    if twice:
        yield f"{axis.key}: {', '.join(twice)} given more than once, and each row would be run again"


def _set_twice(split: Split) -> Iterator[str]:
    """An axis is the only one that sets its keys, or else rows would have other settings than they say."""
    typed: dict[str, list[str]] = {}
    for axis in split.axes:
        for key in dict.fromkeys([axis.key, *(key for word in axis.words for key in axis.changes(word))]):
            typed.setdefault(key, []).append(f"{axis.key}={','.join(axis.words)}")
    for word in split.overrides:
        for key in parse_overrides([word]):
            if key in typed:
                typed[key].append(word)
    for key, words in typed.items():
        if len(words) > 1:
            yield f"{key}: set by {' and by '.join(words)}; leave out one of them"


def _wrong(changes: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the values by themselves, whatever the others are."""
    found = validate({**dotted(Config()), **changes})
    if not isinstance(found, Config):
        yield from (problem.text for problem in found if set(problem.keys) <= changes.keys())
