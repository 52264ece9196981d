"""What several commands refuse before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bptool.errors import UsageError


def refuse_device(device: str, gpu: str | None) -> None:
    """`--device` and `--gpu`.

    Raises:
        UsageError: one is not known, or they contradict each other.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device} is neither auto, cpu nor cuda", "a GPU's name goes into --gpu")
    if device == "cpu" and gpu:
        raise UsageError("--device cpu and --gpu exclude each other", "leave out one of them")


def refuse_files(files: Mapping[str, Path | None], *, force: bool) -> None:
    """Files to write, by their option.

    Raises:
        UsageError: one is there already, or cannot be written.
    """
    asked = {option: file for option, file in files.items() if file is not None}
    for option, file in asked.items():
        if file.is_dir():
            raise UsageError(f"{option} {file} is a folder", f"name a file in it, such as {option} {file / 'estimate'}")
        if file.exists() and not force:
            raise UsageError(f"{file} exists already", "choose another name, or overwrite it with --force")
        if not file.parent.is_dir():
            raise UsageError(f"{option} {file}: there is no folder {file.parent}", f"mkdir -p {file.parent}")
    if len(set(asked.values())) < len(asked):
        raise UsageError(f"{' and '.join(asked)} name the same file", "give each a name of its own")
