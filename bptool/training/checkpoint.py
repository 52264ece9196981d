"""Checkpoints: what resume reads. A half-written one can never be taken for a whole one.

    checkpoints/step-00000200/
        model.safetensors       the weights, under the plain model's names
        optimizer.safetensors   the optimizers' state, as PARAMETER/KEY
        state.json              step, loss scale, data fingerprint, versions
        checksums.json          SHA-256 of each of the others

A checkpoint is written under a temporary name, flushed to the disk, and renamed; the folder's own entry is flushed too.
Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bptool.errors import CheckpointError, StorageError
from bptool.files import flush

MODEL, OPTIMIZER, STATE, CHECKSUMS = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "checksums.json",
)
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a run.

    Attributes:
        step: optimizer steps done.
        model: weights by name.
        optimizer: optimizer state by `PARAMETER/KEY`.
        state: everything else, as JSON has it.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


class CheckpointFolder:
    """A run's checkpoints, oldest to newest.

    Args:
        folder: made when the first checkpoint is written.
        keep: how many of the newest stay.
        warn: told of each checkpoint that is passed over, and why.
    """

    def __init__(self, folder: Path, *, keep: int, warn: Callable[[str], None] = lambda message: None) -> None:
        self.folder = folder
        self._keep = keep
        self._warn = warn

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write `checkpoint`, then delete the oldest beyond `keep`; returns its folder.

        Raises:
            StorageError: it could not be written; what was there before still is.
        """
        final = self.folder / f"step-{checkpoint.step:08d}"
        temporary = self.folder / f"{_TEMPORARY}{checkpoint.step:08d}"
        try:
            self._discard_unfinished()
            temporary.mkdir(parents=True)
            _write(temporary, checkpoint)
            if final.exists():  # a resumed run arrives where an invalid checkpoint lies
                shutil.rmtree(final)
            temporary.rename(final)
            flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise StorageError(
                f"checkpoint of step {checkpoint.step} could not be written to {self.folder}: {error}",
                "earlier checkpoints are untouched; make room or fix permissions, then resume the run",
            ) from error
        self._delete_all_but_newest(final)
        return final

    def newest_valid(self) -> Checkpoint | None:
        """The newest checkpoint whose checksums hold, or None; invalid ones are named and passed over."""
        for folder in reversed(self.finished()):
            problem = _problem(folder)
            if problem is None:
                try:
                    return _read(folder)
                except (SafetensorError, OSError, ValueError, KeyError) as error:
                    problem = f"it cannot be read ({error})"
            if not folder.exists():  # the run is training, and has let it go for a newer one
                return self.newest_valid()
            self._warn(f"checkpoint {folder.name} is passed over: {problem}")
        return None

    def require_newest(self) -> Checkpoint:
        """`newest_valid()`, where a run cannot go on without one.

        Raises:
            CheckpointError: there is none.
        """
        if not self.finished():
            raise CheckpointError(
                f"no valid checkpoint in {self.folder}: none was written yet",
                "a run writes one every checkpoint.every steps, when it is interrupted, and at its end",
            )
        checkpoint = self.newest_valid()
        if checkpoint is None:
            raise CheckpointError(
                f"no valid checkpoint in {self.folder}",
                "start the run anew with --force, which deletes what is left of it",
            )
        return checkpoint

    def finished(self) -> list[Path]:
        """Folders of finished checkpoints, by step; their content is not looked at."""
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []

    def _discard_unfinished(self) -> None:
        for leftover in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)

    def _delete_all_but_newest(self, written: Path) -> None:
        """Only `written` is known to be good; of a later step there can be none but such as a resume passed over."""
        older = [folder for folder in self.finished() if folder.name < written.name]
        valid = [folder for folder in older if _problem(folder, deep=False) is None]
        kept = [*valid[max(len(valid) - (self._keep - 1), 0) :], written]
        for folder in self.finished():
            if folder not in kept:
                gone = folder.with_name(f"{_TEMPORARY}{folder.name}")  # a reader sees it whole or not at all
                with suppress(OSError):
                    folder.rename(gone)
                    shutil.rmtree(gone)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(_plain(checkpoint.model), folder / MODEL, metadata={"format": "pt"})
    save_file(_plain(checkpoint.optimizer), folder / OPTIMIZER)
    state = {**checkpoint.state, "step": checkpoint.step}
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n")
    checksums = {name: _sha256(folder / name) for name in (MODEL, OPTIMIZER, STATE)}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n")
    for path in (*(folder / name for name in checksums), folder / CHECKSUMS, folder):
        flush(path)


def _read(folder: Path) -> Checkpoint:
    state = json.loads((folder / STATE).read_text())
    return Checkpoint(state["step"], load_file(folder / MODEL), load_file(folder / OPTIMIZER), state)


def _problem(folder: Path, *, deep: bool = True) -> str | None:
    """Why the checkpoint is not valid, or None where it is; not `deep`: whether its files are all there."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        for name in (MODEL, OPTIMIZER, STATE):
            if not (folder / name).is_file():
                return f"{name} is missing"
            if deep and _sha256(folder / name) != checksums[name]:
                return f"{name} does not match its checksum (cut short, or changed)"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except OSError as error:
        return f"it cannot be read ({error})"
    except (ValueError, KeyError, TypeError) as error:
        return f"{CHECKSUMS} is not what was written ({error})"
    return None


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors takes: contiguous tensors, each with memory of its own (tied weights are written twice)."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return plain


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
