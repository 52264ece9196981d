"""From a TARGET and its KEY=VALUEs to a complete config, or to all that is wrong with them at once."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from bptool.config.keys import all_keys, dotted, flatten, shown
from bptool.config.overrides import COMMAND_LINE, parse_overrides
from bptool.config.presets import preset_text
from bptool.config.problems import Problem, validate
from bptool.config.schema import Config
from bptool.config.target import CodeTarget, FileTarget, PresetTarget, Target
from bptool.errors import ConfigError, StorageError

__all__ = ["Loaded", "all_keys", "dotted", "load", "load_config", "parse_config"]

# Pickles are refused when they are to be read; passed over, they would leave random weights in their place.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


class Loaded(NamedTuple):
    """A config, and what was taken for granted to make it complete, in sentences."""

    config: Config
    notes: tuple[str, ...]


def load_config(target: Target, overrides: Sequence[str]) -> Config:
    """The same as `load`, without the notes."""
    return load(target, overrides).config


def load(target: Target, overrides: Sequence[str]) -> Loaded:
    """The settings of `target` with the command line's KEY=VALUEs on top, and defaults where neither says.

    Raises:
        ConfigError: a file that is no TOML or JSON, or every key that is wrong, with where it comes from.
        StorageError: a file that cannot be read.
    """
    changes = parse_overrides(overrides)
    taken: dict[str, str] = {}
    match target:
        case CodeTarget():
            values: dict[str, Any] = {"run": {"workload": str(target)}}
        case PresetTarget():
            values = _parse_toml(preset_text(target.name), str(target))
        case FileTarget():
            values, taken = _read_settings(target.path)
    settings = flatten(values) | changes
    workload = settings.get("run.workload")
    if workload and isinstance(workload, str):
        _refuse_own_model(workload, changes)
    config = parse_config(settings, str(target), changes.keys())
    still = [words for key, words in taken.items() if key not in changes]
    note = f"{target} leaves out keys, and its family's defaults were taken: {', '.join(still)}"
    return Loaded(config, (note,) if still else ())


def parse_config(values: Mapping[str, Any], source: str, from_command_line: Set[str] = frozenset()) -> Config:
    """The config that tables of values make, nested or with dotted keys.

    Args:
        values: what a TOML or JSON file holds.
        source: where the values come from, for messages.
        from_command_line: the dotted keys that come from the command line instead.

    Raises:
        ConfigError: with a line for each unknown key, wrong value and conflict between keys.
    """
    result = validate(flatten(values))
    if isinstance(result, Config):
        return result
    raise _config_error(result, source, from_command_line)


def _config_error(problems: Sequence[Problem], source: str, from_command_line: Set[str]) -> ConfigError:
    typed = [not from_command_line.isdisjoint(problem.keys) for problem in problems]
    if all(typed):
        return ConfigError(COMMAND_LINE, [problem.text for problem in problems])
    marks = [f" (from the {COMMAND_LINE})" if mark else "" for mark in typed]
    return ConfigError(source, [problem.text + mark for problem, mark in zip(problems, marks, strict=True)])


def _refuse_own_model(workload: str, changes: Mapping[str, Any]) -> None:
    refused = [key for key in changes if key.partition(".")[0] in {"model", "data"}]
    if refused:
        problems = [f"{key}: {workload} brings its own model and data" for key in refused]
        raise ConfigError(COMMAND_LINE, problems, f"Make the change in {workload.rpartition(':')[0]}")


def _read_settings(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's settings, and of those that it left to its family the keys with words for what was taken."""
    file = path / "config.json" if path.is_dir() else path
    text = _read_text(file)
    if file.suffix == ".toml":
        return _parse_toml(text, str(file)), {}
    values = _parse_json(text, str(file))
    if "run" in values and "training" in values:  # a run's own config.json
        return values, {}
    return _huggingface_settings(values, file, folder=path if path.is_dir() else None)


def _huggingface_settings(
    values: dict[str, Any], file: Path, folder: Path | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The shape in a Hugging Face config.json, with the weights and the tokenizer that `folder` holds."""
    from bptool.config.huggingface import read_huggingface

    read = read_huggingface(values, str(file))
    settings: dict[str, Any] = {"model": read.settings.model_dump()}
    if folder and any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        settings["model"]["weights"] = str(folder)
    if folder and (folder / "tokenizer.json").is_file():
        settings["data"] = {"tokenizer": str(folder / "tokenizer.json")}
    return settings, {f"model.{key}": words for key, words in read.defaults.items()}


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(file), [f"not UTF-8 text: {error.reason} at byte {error.start}"]) from error


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:  # its text ends with "(at line 3, column 5)" or "(at end of document)"
        lines = text.split("\n")
        end = f"at line {len(lines)}, column {len(lines[-1]) + 1}"
        raise ConfigError(source, [f"not TOML: {error}".replace("at end of document", end)]) from error


def _parse_json(text: str, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg} (at line {error.lineno}, column {error.colno})"
        raise ConfigError(source, [problem]) from error
    if not isinstance(values, dict):
        raise ConfigError(source, [f"found {shown(values)}, expected a JSON object"])
    return values
