"""The config's keys as one list of dotted names: what each means, what it takes, how tables map onto it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from bptool.config.schema import AUTO, Config, Section

_KINDS: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def all_keys() -> dict[str, str]:
    """Every dotted key (`model.rope.theta`) with its documentation, in the schema's order."""
    return {key: field.description or "" for key, field in fields().items()}


def dotted(config: Config) -> dict[str, Any]:
    """The config's values by dotted key: what hyper-parameter tables and the differences of two runs show."""
    return flatten(config.model_dump())


@functools.cache
def fields() -> Mapping[str, FieldInfo]:
    """Every dotted key's field: type, bounds, default, documentation."""
    return dict(_walk(Config, ""))


@functools.cache
def sections() -> frozenset[str]:
    """The dotted names of the tables: `model`, `model.rope`, `training` ..."""
    parents = (key.split(".")[:-1] for key in fields())
    return frozenset(".".join(parts[: i + 1]) for parts in parents for i in range(len(parts)))


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _walk(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys. An empty table stays a value, so that a misplaced one is not lost."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
        flat.update(nested or {f"{prefix}{key}": value})
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The tables that `flatten` made flat; every key must be one of `fields()`."""
    tables: dict[str, Any] = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        table[name] = value
    return tables


def choices(key: str) -> tuple[str, ...]:
    """The words that a key takes, where it takes nothing but certain words."""
    annotation = fields()[key].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def allows_auto(key: str) -> bool:
    """Whether the key takes a number, and `auto` for one that follows from other keys."""
    return fields()[key].annotation is int and fields()[key].default == AUTO


def allowed(key: str) -> str:
    """What a key takes, in words: `a whole number above 0 or "auto"`."""
    field = fields()[key]
    if choices(key):
        return "one of " + ", ".join(f'"{choice}"' for choice in choices(key))
    bounds = [phrase for constraint in field.metadata if (phrase := _bound(constraint))]
    words = " ".join([_KINDS[field.annotation], " and ".join(bounds)]).rstrip()
    return f'{words} or "{AUTO}"' if allows_auto(key) else words


def _bound(constraint: object) -> str:
    match constraint:
        case Gt(gt=bound):
            return f"above {bound}"
        case Ge(ge=bound):
            return f"at least {bound}"
        case Lt(lt=bound):
            return f"below {bound}"
        case Le(le=bound):
            return f"at most {bound}"
    return ""


def shown(value: object) -> str:
    """A value as a TOML file would have it, shortened where it is long."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list):
        return "a list"
    in_json = value is None or isinstance(value, (str, bool))
    written = json.dumps(value, ensure_ascii=False) if in_json else str(value)
    return written if len(written) <= 60 else f"{written[:57]}..."
