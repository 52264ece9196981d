"""TARGET: what a command works on, the same words for every command.

Rules, the first that fits:

1. nothing: the preset `tiny`.
2. a preset's name. A file or folder of that name is `./NAME`.
3. an existing path: a run's .toml file, a config.json (Hugging Face's, or a run's own), or the folder that
   holds one. A Hugging Face folder brings its weights and its tokenizer; its config.json alone the shape.
4. `file.py:name` or `package.module:name`: a callable that returns a Workload. It is found and called later,
   by whoever builds the workload; here only the file must exist.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from bptool.config.presets import DEFAULT_PRESET, preset_names
from bptool.errors import StorageError, TargetError, nearest

_SUFFIXES = {".toml", ".json", ".py"}
_KINDS = (
    "TARGET is a preset ({presets}), a run's .toml file or folder, a Hugging Face config.json or the folder "
    "that holds one (nothing is downloaded), or FILE.py:NAME or PACKAGE.MODULE:NAME, which returns a Workload"
)


@dataclass(frozen=True)
class PresetTarget:
    """A preset."""

    name: str
    """Default name of a run, here and below."""

    def __str__(self) -> str:
        return f"preset '{self.name}'"


@dataclass(frozen=True)
class FileTarget:
    """A file with settings, or a folder that holds a config.json."""

    name: str
    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class CodeTarget:
    """A callable that returns a Workload: the user's own model."""

    name: str
    """The callable's name, and the default name of a run."""
    place: Path | str
    """A Python file, or the dotted name of a module."""

    def __str__(self) -> str:
        return f"{self.place}:{self.name}"


Target = PresetTarget | FileTarget | CodeTarget


def resolve_target(text: str | None) -> Target:
    """What `text` means, by the rules above.

    Raises:
        TargetError: it means nothing; the message names the nearest preset or file, the remedy what fits.
        StorageError: a path that may not be looked at.
    """
    if text is None:
        return PresetTarget(DEFAULT_PRESET)
    if text in preset_names():
        return PresetTarget(text)
    if text and _exists(Path(text)):
        return _path_target(Path(text))
    place, colon, name = text.rpartition(":")
    if colon:
        return _code_target(text, place, name)
    raise _error(f"'{text}' is neither a preset nor a file{nearest(text, _candidates(text))}")


def _path_target(path: Path) -> FileTarget:
    if path.is_dir():
        if not _exists(path / "config.json"):
            raise _error(f"the folder '{path}' holds no config.json")
        return FileTarget(_folder_name(path), path)
    if path.suffix == ".py":
        raise _error(f"'{path}' needs the name of a callable: '{path}:NAME'{_defined_in(path)}")
    if path.suffix not in _SUFFIXES:
        raise _error(f"'{path}' is neither a .toml nor a .json file")
    name = _folder_name(path.parent) if path.name == "config.json" else path.stem.lstrip(".")
    return FileTarget(name, path)


def _code_target(text: str, place: str, name: str) -> CodeTarget:
    if not name.isidentifier():
        raise _error(f"'{text}': '{name}' cannot be the name of a callable")
    if place.endswith(".py"):
        if not _exists(Path(place)):
            raise _error(f"'{text}': there is no file '{place}'{nearest(place, _candidates(place))}")
        return CodeTarget(name, Path(place))
    if not all(part.isidentifier() for part in place.split(".")):
        raise _error(f"'{text}': '{place}' is neither a .py file nor the dotted name of a module")
    return CodeTarget(name, place)


def _error(message: str) -> TargetError:
    return TargetError(message, _KINDS.format(presets=", ".join(preset_names())))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError as error:
        raise StorageError(f"'{path}' cannot be read: {error.strerror}") from error
    except OSError:  # too long to be a path
        return False


def _folder_name(folder: Path) -> str:
    return folder.resolve().name.lstrip(".")


def _candidates(text: str) -> list[str]:
    """The presets, and what lies beside the path that was meant."""
    try:
        beside = [path for path in Path(text).parent.iterdir() if path.is_dir() or path.suffix in _SUFFIXES]
    except OSError:  # there is no such folder, or it may not be listed
        beside = []
    return [*preset_names(), *map(str, beside)]


def _defined_in(path: Path) -> str:
    """The functions that a file defines, for a message; nothing where it cannot be parsed."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return ""
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return f" (it defines {', '.join(names)})" if names else ""
