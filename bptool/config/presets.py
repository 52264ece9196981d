"""The presets: complete, commented TOML runs that come with bptool."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

DEFAULT_PRESET = "tiny"


def preset_names() -> list[str]:
    """The presets' names, the default first and the others in alphabetical order."""
    names = (Path(entry.name) for entry in _folder().iterdir())
    stems = [name.stem for name in names if name.suffix == ".toml"]
    return sorted(stems, key=lambda stem: (stem != DEFAULT_PRESET, stem))


def preset_text(name: str) -> str:
    """The TOML text of the preset `name`, comments included; `name` is one of `preset_names()`."""
    return (_folder() / f"{name}.toml").read_text(encoding="utf-8")


def _folder() -> Traversable:
    """An installed wheel holds the presets; a checkout has them in configs/, beside the package."""
    package = files("bptool")
    installed = package / "presets"
    return installed if installed.is_dir() else Path(str(package)).parent / "configs"
